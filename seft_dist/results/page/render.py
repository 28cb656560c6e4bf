"""One HTML file about runs: sections filled from their records, put into the template, written whole."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from seft_dist.files.writing import write_text
from seft_dist.results.page import tables
from seft_dist.results.page.cost_plots import cost_table, phases_figure, speed_figure
from seft_dist.results.page.findings import findings_of, missing_of
from seft_dist.results.page.layer_plots import (
    MOST_MAPS,
    deltas_figure,
    evolutions_figure,
    heat_maps,
    overlap_figure,
    sparsity_figure,
)
from seft_dist.results.page.plots import key_of, perplexity_figure, training_figures
from seft_dist.results.page.record import RunRecord
from seft_dist.results.page.story import state_of, story_of, tiles_of
from seft_dist.results.page.svg import Figure, Table, printable

PAGE = "report.html"
_MARK = '<meta name="generator" content="seft_dist report">'


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading."""

    name: str
    """Id of the section in the page."""
    title: str
    intro: str
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    absent: str = ""
    """Text instead, if there is neither a figure nor a table."""

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to show."""
        return not self.figures and not any(table.rows for table in self.tables)


@dataclass(frozen=True)
class Details:
    """Configuration and manifest of one run."""

    label: str
    configuration: str
    command: str
    attempts: Table
    versions: Table


def check_output(path: Path) -> None:
    """Refuse to write the page over something else.

    Raises:
        ValueError: The path is a folder, its folder does not exist, or it holds a file that is no such page.
    """
    if path.is_dir():
        raise ValueError(f"output={path} is a folder: needs the name of a file, such as {path / PAGE}")
    if not path.parent.is_dir():
        raise ValueError(f"output={path}: {path.parent} does not exist; make it, or choose another folder")
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise ValueError(f"output={path} exists and is no page of this program: choose another name, or remove it")


def write_page(runs: Sequence[RunRecord], path: Path, *, draws: bool = True) -> None:
    """Write the page.

    Args:
        runs: The runs, in the order of the legend.
        path: The file; an earlier page is replaced.
        draws: False: tables only, for which matplotlib is not needed.

    Raises:
        ValueError: The file is something else, or matplotlib is not installed.
    """
    check_output(path)
    write_text(path, render(runs, draws=draws))


def render(runs: Sequence[RunRecord], *, draws: bool = True) -> str:
    """Make the page's HTML.

    Args:
        runs: The runs, in the order of the legend.
        draws: False: tables only.
    """
    environment = Environment(
        loader=PackageLoader("seft_dist.results.page", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["printable"] = printable
    assert environment.loader is not None
    style = environment.loader.get_source(environment, "page.css")[0]
    names = [run.label for run in runs]
    content = {
        "mark": Markup(_MARK),
        "style": Markup(style),
        "title": f"{names[0]}: SEFT report" if len(runs) == 1 else f"{len(runs)} runs: SEFT report",
        "runs": runs,
        "keys": [key_of(i, run.label) for i, run in enumerate(runs)],
        "states": [state_of(run) for run in runs],
        "stories": [story_of(run) for run in runs],
        "tiles": tiles_of(runs[0]) if len(runs) == 1 else [],
        "overview": tables.overview(runs) if len(runs) > 1 else None,
        "differences": tables.differences(runs) if len(runs) > 1 else None,
        "findings": findings_of(runs),
        "sections": sections_of(runs, draws),
        "details": [_details(run) for run in runs],
        "missing": [(run.label, missing_of(run)) for run in runs],
    }
    return environment.get_template("page.html.j2").render(content)


def sections_of(runs: Sequence[RunRecord], draws: bool) -> list[Section]:
    """Make the sections that have figures, in the page's order."""
    unrecorded = "no run has recorded it" if len(runs) > 1 else "the run has not recorded it"
    maps = list(heat_maps(runs, draws))
    intro = (
        "Shares since the run began. A position counts each time it moves. "
        if any(run.layers.source == "topology.jsonl" for run in runs)
        else "What the movements add up to: positions that are 0 in only one of the pruned and the repaired model. "
    )
    if sum(bool(run.layers.moves) for run in runs) > MOST_MAPS:
        intro += f"Maps of the first {MOST_MAPS} runs; the page of a single run has its own. "
    sections = [
        Section(
            "training", "How it trained", "", list(training_figures(runs, draws)), absent=f"No loss: {unrecorded}."
        ),
        Section(
            "perplexity",
            "Quality",
            "Perplexity of whole models on text that seft evaluate was given; lower is better.",
            _some([perplexity_figure(runs, draws)]),
            [tables.tasks(runs)],
            absent="No run has been evaluated: there is no eval.json with a perplexity or a task.",
        ),
        Section(
            "sparsity",
            "Zeros by layer",
            "Shares of zeros in the trained weights of each decoder layer; SEFT keeps the number of each target.",
            _some([sparsity_figure(runs, draws)]),
            absent=f"No numbers by layer: {unrecorded}.",
        ),
        Section(
            "topology",
            "Where the topology moved",
            intro if maps else "",
            _some([overlap_figure(runs, draws), evolutions_figure(runs, draws), *maps]),
            absent="Nothing moved, or it was not recorded.",
        ),
        Section(
            "deltas",
            "Sizes of the deltas",
            "",
            _some([deltas_figure(runs, draws)]),
            absent="No checkpoint with deltas is there.",
        ),
        Section(
            "cost",
            "Time, memory and bytes",
            "",
            _some([speed_figure(runs, draws), phases_figure(runs, draws)]),
            [cost_table(runs)],
            absent=f"No costs: {unrecorded}.",
        ),
    ]
    return sections if len(runs) > 1 else [_drop_run_column(section) for section in sections]


def _drop_run_column(section: Section) -> Section:
    """Leave the column of the run out of the tables of a page about one run."""

    def without(table: Table) -> Table:
        is_named = table.head[0] == "run"
        return replace(table, head=table.head[1:], rows=[row[1:] for row in table.rows]) if is_named else table

    figures = [replace(figure, table=without(figure.table)) if figure.table else figure for figure in section.figures]
    return replace(section, figures=figures, tables=[without(table) for table in section.tables])


def _some(figures: Iterable[Figure | None]) -> list[Figure]:
    return [figure for figure in figures if figure is not None]


def _details(run: RunRecord) -> Details:
    settings, command = tables.configuration(run), tables.command_of(run)
    return Details(run.label, settings, command, tables.attempts(run), tables.versions(run))
