"""Tables for people (rich)."""

import re

from rich.table import Table

from seft_dist.sparsity.zeros import ZeroCount, total_sparsity


def sparsity_table(reports: dict[str, list[ZeroCount]], title: str) -> Table:
    """One row for each kind of linear over all layers (q_proj, ...), one column for each model.

    Args:
        reports: Name of a model to its counts.
        title: Of the table.
    """
    table = Table(title=title)
    table.add_column("linear")
    table.add_column("weights", justify="right")
    for model in reports:
        table.add_column(f"zeros {model}" if len(reports) > 1 else "zeros", justify="right")
    groups = {model: _by_kind(counts) for model, counts in reports.items()}
    for kind in {kind: None for group in groups.values() for kind in group}:
        members = [group.get(kind, []) for group in groups.values()]
        numel = max(sum(count.numel for count in member) for member in members)
        table.add_row(
            f"{kind} ({max(len(m) for m in members)} x)", f"{numel:,}", *(_share(member) for member in members)
        )
    table.add_section()
    numel = max(sum(count.numel for count in counts) for counts in reports.values())
    table.add_row("all", f"{numel:,}", *(_share(counts) for counts in reports.values()))
    return table


def _by_kind(counts: list[ZeroCount]) -> dict[str, list[ZeroCount]]:
    """Linears of one role together: what is left of a name when the layer's number and all before it go."""
    groups: dict[str, list[ZeroCount]] = {}
    for count in counts:
        groups.setdefault(kind_of(count.name), []).append(count)
    return groups


def kind_of(name: str) -> str:
    """Role of a linear in its layer, e.g. "mlp.up_proj": a module's name without the layer's number and all before."""
    return re.sub(r"^.*?\.\d+\.", "", name)


def _share(counts: list[ZeroCount]) -> str:
    if not counts:
        return "-"
    lowest, highest = min(c.sparsity for c in counts), max(c.sparsity for c in counts)
    text = f"{100 * total_sparsity(counts):.2f} %"
    return text if highest - lowest < 1e-3 else f"{text} ({100 * lowest:.2f} to {100 * highest:.2f})"
