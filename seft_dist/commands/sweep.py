"""Show the runs of a sweep in one table: settings, loss, perplexity, sparsity, time, and which are missing or failed.

    seft sweep --folder runs/sweep1

The folder also gets the table as sweep.md and sweep.csv, and a figure, sweep.png.
"""

from seft_dist.config import SweepConfig
from seft_dist.session.cli import parse, run


def main() -> None:
    """Print and write the tables as the command line says."""
    run(_sweep)


def _sweep() -> None:
    config = parse(SweepConfig, description=__doc__)

    from rich.console import Console

    from seft_dist.results.sweep import print_sweep, read_sweep, write_sweep

    sweep = read_sweep(config)
    console = Console()
    print_sweep(sweep, console)
    console.print("Written:", ", ".join(str(path) for path in write_sweep(sweep, config)), soft_wrap=True)
