"""Sum up a run: summary.json, tables, and figures in its folder.

seft report runs/quickstart
"""

from pathlib import Path

from seft_dist.session.cli import call, run


def report(folder: Path, figures: bool = True) -> None:
    """Sum up a run: summary.json, tables, and figures in its folder.

    Args:
        folder: Folder of a finished run of seft train, with eval.json of seft evaluate in it.
        figures: False: no figures (they need matplotlib).
    """
    from rich.console import Console

    from seft_dist.results.figures import write_run_figures
    from seft_dist.results.report import print_tables, read_run, write_summary

    finished = read_run(folder)
    paths = write_run_figures(finished, folder / "figures") if figures else []
    summary = write_summary(finished)
    console = Console()
    print_tables(finished, console)
    console.print("Written:", ", ".join(str(path) for path in [*paths, summary]), soft_wrap=True)


def main() -> None:
    """Report as the command line says."""
    run(lambda: call(report, __doc__))
