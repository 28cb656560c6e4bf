"""The comparison of two runs as people read it: what they share, the steps that differ, the worst layers, the verdict."""

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from seft_dist.reproduce.compare import Comparison
from seft_dist.reproduce.promise import LOSS_RELATIVE, WEIGHT_ABSOLUTE, WEIGHT_RELATIVE, Difference
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


def print_comparison(found: Comparison, console: Console) -> None:
    """Print what was found; the verdict comes last."""
    console.print(
        f"first   {found.first}  ({found.layouts[0]})\nsecond  {found.second}  ({found.layouts[1]})", soft_wrap=True
    )
    told = (
        ("inputs", found.terms.inputs, "same model, data and settings"),
        ("layout", found.terms.layout, "same"),
        ("environment", found.terms.environment, "same versions, code and kind of machine"),
    )
    for title, differences, same in told:
        console.print(f"{title:12}{_told(differences) or same}", soft_wrap=True, highlight=False)
    console.print(f"{'promised':12}{_PROMISED[found.terms.promise]}", soft_wrap=True, highlight=False)
    traced = "every layer" if found.traced else "no layers: a run has no trace (--trace true)"
    steps = f"{found.steps} steps ({traced}), {found.evolutions} evolutions"
    console.print(f"{'compared':12}{steps}; {len(found.differences)} steps differ", soft_wrap=True, highlight=False)
    if found.differences:
        console.print(_step_table(found.differences))
    if found.weights is not None:
        _print_weights(found, console)
    for problem in found.problems:
        console.print(f"note        {problem}", soft_wrap=True, highlight=False)
    style = "bold green" if found.held else "bold red"
    console.print(
        f"[{style}]{found.verdict}[/]" + (f": {found.why}" if found.why else ""), soft_wrap=True, highlight=False
    )


def _told(differences: list[Difference]) -> str:
    shown = "; ".join(map(str, differences[:_MOST_DIFFERENCES]))
    more = len(differences) - _MOST_DIFFERENCES
    return shown + (f"; and {more} more" if more > 0 else "")


def _step_table(differences: list[StepDifference]) -> Table:
    table = Table(title="Steps that differ", box=SIMPLE, padding=0)
    for name in ("step", "inputs", "loss", "off by", "layers", "deltas off by", "support", "mask"):
        table.add_column(name, justify="left" if name == "inputs" else "right", no_wrap=True)
    shown = _some(differences)
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


def _some(differences: list[StepDifference]) -> list[StepDifference]:
    """The first ones, those with an evolution, and the last; not more than fit on a screen."""
    if len(differences) <= _MOST_STEPS:
        return differences
    first, last = differences[: _MOST_STEPS // 2], differences[-1]
    moved = [one for one in differences[len(first) : -1] if any(layer.near_ties is not None for layer in one.layers)]
    return [*first, *moved[: _MOST_STEPS - len(first) - 1], last]


def _positions(counts: list[int | None]) -> str:
    known = [count for count in counts if count is not None]
    return f"{sum(known):,}" if known else ""


def _print_weights(found: Comparison, console: Console) -> None:
    assert found.weights is not None
    changed = sorted((row for row in found.weights if row.different), key=lambda row: -row.largest)
    if not changed:
        console.print(
            f"{'weights':12}all {len(found.weights)} exported tensors are equal, bit for bit", highlight=False
        )
        return
    table = Table(
        title=f"Exported weights: {len(changed)} of {len(found.weights)} tensors differ", box=SIMPLE, padding=0
    )
    for name in ("tensor", "differ", "largest", "beyond", "zeros", "support"):
        table.add_column(
            name, justify="left" if name == "tensor" else "right", no_wrap=name != "tensor", overflow="fold"
        )
    for row in changed[:_WORST]:
        support = (found.supports or {}).get(row.name.removesuffix(".weight"))
        numbers = (f"{row.different:,}", f"{row.largest:.1e}", f"{row.outside:,}", f"{row.zeros_moved:,}")
        table.add_row(
            row.name.removeprefix("model.").removesuffix(".weight"), *numbers, "" if support is None else f"{support:,}"
        )
    totals = (sum(getattr(row, key) for row in changed) for key in ("different", "outside", "zeros_moved"))
    different, outside, zeros = (f"{total:,}" for total in totals)
    supports = f"{sum(found.supports.values()):,}" if found.supports is not None else ""
    table.add_row("all", different, f"{changed[0].largest:.1e}", outside, zeros, supports)
    table.caption = "largest: absolute; beyond: the tolerance; zeros, support: positions in one run only"
    console.print(table)
