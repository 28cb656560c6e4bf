"""Printing of the comparison of two runs: their inputs, the steps that differ, the worst layers, and the verdict."""

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from seft_dist.reproduce.compare import Comparison
from seft_dist.reproduce.promise import LOSS_RELATIVE, WEIGHT_ABSOLUTE, WEIGHT_RELATIVE, ConditionDifference
from seft_dist.reproduce.step_diff import StepDifference

_WORST = 5
_MOST_STEPS = 12
_MOST_DIFFERENCES = 8
_PROMISED = {
    "bits": "the same bits: same inputs, layout, versions and kind of machine",
    "tolerance": f"same masks and supports, loss within {LOSS_RELATIVE:.0e} of itself, final weights within "
    f"{WEIGHT_RELATIVE:.0e} of themselves + {WEIGHT_ABSOLUTE:.0e}, until a near-tie parts the runs",
    "none": "nothing",
}


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print a comparison, with its verdict at the end."""
    for title, path, layout in zip(
        ("first", "second"), (comparison.first, comparison.second), comparison.layouts, strict=True
    ):
        console.print(f"{title:8}{path}  ({layout})", soft_wrap=True)
    conditions = (
        ("inputs", comparison.terms.inputs, "same model, data and settings"),
        ("layout", comparison.terms.layout, "same"),
        ("environment", comparison.terms.environment, "same versions, code and kind of machine"),
    )
    for title, differences, same in conditions:
        console.print(f"{title:12}{_list(differences) or same}", soft_wrap=True, highlight=False)
    console.print(f"{'promised':12}{_PROMISED[comparison.terms.promise]}", soft_wrap=True, highlight=False)
    traced = "every layer" if comparison.traced else "no layers: a run has no trace (--trace true)"
    steps = f"{comparison.steps} steps ({traced}), {comparison.evolutions} evolutions"
    console.print(
        f"{'compared':12}{steps}; {len(comparison.differences)} steps differ", soft_wrap=True, highlight=False
    )
    if comparison.differences:
        console.print(_step_table(comparison.differences))
    if comparison.weights is not None:
        _print_weights(comparison, console)
    for problem in comparison.problems:
        console.print(f"note        {problem}", soft_wrap=True, highlight=False)
    style = "bold green" if comparison.held else "bold red"
    console.print(
        f"[{style}]{comparison.verdict}[/]" + (f": {comparison.why}" if comparison.why else ""),
        soft_wrap=True,
        highlight=False,
    )


def _list(differences: list[ConditionDifference]) -> str:
    shown = "; ".join(map(str, differences[:_MOST_DIFFERENCES]))
    more = len(differences) - _MOST_DIFFERENCES
    return shown + (f"; and {more} more" if more > 0 else "")


def _step_table(differences: list[StepDifference]) -> Table:
    """Make the table of the steps that differ; steps in between are left out by "..."."""
    table = Table(title="Steps that differ", box=SIMPLE, padding=0)
    for name in ("step", "inputs", "loss", "off by", "layers", "deltas off by", "support", "mask"):
        table.add_column(name, justify="left" if name == "inputs" else "right", no_wrap=True)
    shown = _select_steps(differences)
    for before, one in zip([None, *shown], shown, strict=False):
        if before is not None and differences.index(one) > differences.index(before) + 1:
            table.add_row("...")
        inputs = ", ".join(name for key, name in (("batch", "data"), ("lr", "lr")) if key in one.values)
        loss = one.values.get("loss")
        table.add_row(
            str(one.step),
            inputs,
            f"{loss[0]:.6f} {loss[1]:.6f}" if loss and None not in loss else "",
            f"{one.loss_relative:.1e}" if loss else "",
            str(len(one.layers)) if one.layers else "",
            f"{max(layer.delta_relative for layer in one.layers):.1e}" if one.layers else "",
            _positions([layer.support_positions for layer in one.layers]),
            _positions([layer.mask_positions for layer in one.layers]),
        )
    table.caption = "off by: as a share; deltas: the worst layer; support, mask: positions in one run only"
    return table


def _select_steps(differences: list[StepDifference]) -> list[StepDifference]:
    """Choose the steps to show: the first ones, those with an evolution, and the last one, up to a screenful."""
    if len(differences) <= _MOST_STEPS:
        return differences
    first, last = differences[: _MOST_STEPS // 2], differences[-1]
    moved = [one for one in differences[len(first) : -1] if any(layer.near_ties is not None for layer in one.layers)]
    return [*first, *moved[: _MOST_STEPS - len(first) - 1], last]


def _positions(counts: list[int | None]) -> str:
    known = [count for count in counts if count is not None]
    return f"{sum(known):,}" if known else ""


def _print_weights(comparison: Comparison, console: Console) -> None:
    """Print which exported tensors differ, the largest difference first."""
    assert comparison.weights is not None
    changed = sorted((row for row in comparison.weights if row.different), key=lambda row: -row.largest)
    if not changed:
        console.print(
            f"{'weights':12}all {len(comparison.weights)} exported tensors are equal, bit for bit", highlight=False
        )
        return
    table = Table(
        title=f"Exported weights: {len(changed)} of {len(comparison.weights)} tensors differ", box=SIMPLE, padding=0
    )
    for name in ("tensor", "differ", "largest", "beyond", "zeros", "support"):
        table.add_column(
            name, justify="left" if name == "tensor" else "right", no_wrap=name != "tensor", overflow="fold"
        )
    for row in changed[:_WORST]:
        support = (comparison.supports or {}).get(row.name.removesuffix(".weight"))
        numbers = (f"{row.different:,}", f"{row.largest:.1e}", f"{row.outside:,}", f"{row.zeros_moved:,}")
        table.add_row(
            row.name.removeprefix("model.").removesuffix(".weight"), *numbers, "" if support is None else f"{support:,}"
        )
    totals = (sum(getattr(row, key) for row in changed) for key in ("different", "outside", "zeros_moved"))
    different, outside, zeros = (f"{total:,}" for total in totals)
    supports = f"{sum(comparison.supports.values()):,}" if comparison.supports is not None else ""
    table.add_row("all", different, f"{changed[0].largest:.1e}", outside, zeros, supports)
    table.caption = "largest: absolute; beyond: the tolerance; zeros, support: positions in one run only"
    console.print(table)
