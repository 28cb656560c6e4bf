"""Tables for the terminal, made with rich."""

import re

from rich.table import Table

from seft_dist.sparsity.zeros import ZeroCount, total_sparsity


def sparsity_table(reports: dict[str, list[ZeroCount]], title: str) -> Table:
    """Tabulate zeros, with a row for each kind of linear (q_proj, ...) over all layers and a column for each model.

    Args:
        reports: Counts of zeros by the name of the model.
        title: Title of the table.
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
    """Group counts by the kind of linear, see ``kind_of``."""
    groups: dict[str, list[ZeroCount]] = {}
    for count in counts:
        groups.setdefault(kind_of(count.name), []).append(count)
    return groups


def kind_of(name: str) -> str:
    """Return a linear's role in its layer, e.g. "mlp.up_proj": the module's name behind the number of the layer."""
    return re.sub(r"^.*?\.\d+\.", "", name)


def _share(counts: list[ZeroCount]) -> str:
    if not counts:
        return "-"
    lowest, highest = min(c.sparsity for c in counts), max(c.sparsity for c in counts)
    text = f"{100 * total_sparsity(counts):.2f} %"
    return text if highest - lowest < 1e-3 else f"{text} ({100 * lowest:.2f} to {100 * highest:.2f})"
