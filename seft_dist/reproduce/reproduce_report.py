"""The runs of a check as a table."""

from rich.box import SIMPLE
from rich.table import Table

from seft_dist.reproduce.reproduce import Outcome


def outcome_table(outcomes: list[Outcome]) -> Table:
    """One row for each run: its result, and what came of comparing it."""
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
