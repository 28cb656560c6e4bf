"""Sum up a run: summary.json, tables, and figures in its folder.

python launch/report.py runs/quickstart
"""

from pathlib import Path

from jsonargparse import auto_cli

from seft_dist.session.cli import run


def report(folder: Path, figures: bool = True) -> None:
    """Sum up a run: summary.json, tables, and figures in its folder.

    Args:
        folder: Folder of a finished run of launch/train.py, with eval.json of launch/evaluate.py in it.
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


if __name__ == "__main__":
    run(lambda: auto_cli(report))
