"""Write a page with figures that shows what one run or several did, finished or still going on.

    seft report runs/quickstart                   # writes runs/quickstart/report.html
    seft report runs/a runs/b --output ab.html    # several runs in the same drawings, and what differs

The page is one HTML file that needs no network: open it in any browser, send it, print it. It shows losses,
learning rate, perplexities, zeros by layer, where masks and deltas moved, sizes of the deltas, time, memory, bytes,
configuration and warnings, as far as the folders contain them, and names what is missing. The runs need not have been
evaluated.

For a single run that is finished and evaluated (eval.json of seft evaluate, with models dense, pruned and repaired) the
command also prints tables and writes summary.json, and figures/ with loss, evolutions and perplexity as .png and .svg.
docs/report.md explains how to read them.
"""

from pathlib import Path

from seft_dist.session.cli import Parser, run
from seft_dist.session.extras import require


def main() -> None:
    """Write the page as the command line says."""
    run(_report)


def _report() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder that seft train wrote (its --output)")
    parser.add_argument(
        "--output", help="file for the page; without it RUN/report.html, and ./report.html for several runs"
    )
    parser.add_argument(
        "--figures", type=bool, default=True, help="false: tables only, for which matplotlib is not needed"
    )
    args = parser.parse_args()
    report([Path(folder) for folder in args.runs], Path(args.output) if args.output else None, args.figures)


def report(folders: list[Path], output: Path | None, figures: bool) -> None:
    """Write the page, and for one finished and evaluated run summary.json, tables and figures.

    Args:
        folders: Folders of runs.
        output: File for the page; None: report.html in the run's folder or, for several runs, in the current folder.
        figures: False: no figures.
    """
    require("jinja2", "the page")
    from rich.console import Console

    from seft_dist.results.page.record import read_records
    from seft_dist.results.page.render import PAGE, write_page

    records = read_records(folders)
    page = output or (folders[0] / PAGE if len(folders) == 1 else Path(PAGE))
    write_page(records, page, draws=figures)
    paths = [page]
    if len(folders) == 1:
        paths += _sum_up(folders[0], figures, is_whole=records[0].is_finished and records[0].evaluations is not None)
    Console().print("Written:", ", ".join(map(str, paths)), soft_wrap=True, markup=False, highlight=False)


def _sum_up(folder: Path, figures: bool, is_whole: bool) -> list[Path]:
    """Print the tables of a run and write its summary, if it has all that these need.

    Args:
        folder: Folder of the run.
        figures: False: no figures.
        is_whole: The run has a result and an evaluation.
    """
    from rich.console import Console

    from seft_dist.results.figures import write_run_figures
    from seft_dist.results.report import print_tables, read_run, write_summary

    console = Console()
    try:
        finished = read_run(folder)
    except ValueError as error:
        if is_whole:
            console.print(f"No summary.json: {error}", markup=False, highlight=False, soft_wrap=True)
        return []
    paths = write_run_figures(finished, folder / "figures") if figures else []
    print_tables(finished, console)
    return [*paths, write_summary(finished)]
