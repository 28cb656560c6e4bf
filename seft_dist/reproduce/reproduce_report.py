"""Table of the repeated runs and their comparisons."""

from rich.box import SIMPLE
from rich.table import Table

from seft_dist.reproduce.reproduce import RunOutcome


def outcome_table(outcomes: list[RunOutcome]) -> Table:
    """Tabulate the runs, each with its result and the verdict of its comparison."""
    table = Table(title="Runs", box=SIMPLE, padding=0)
    for name in ("run", "seconds", "last loss", "final digest", "against", "verdict"):
        table.add_column(
            name, justify="right" if name in ("seconds", "last loss") else "left", no_wrap=name != "verdict"
        )
    for one in outcomes:
        verdict = one.verdict or (one.status if one.status != "done" else "")
        color = "green" if one.held else "red" if one.held is False or one.status in ("failed", "stopped") else ""
        table.add_row(
            one.name,
            "" if one.seconds is None else f"{one.seconds:.0f}",
            "" if one.loss is None else f"{one.loss:.6f}",
            one.digest or "",
            one.against or "",
            f"[{color}]{verdict}[/]" if color else verdict,
        )
    return table
