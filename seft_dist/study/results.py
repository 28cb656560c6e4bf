"""The results of a study, as results.json holds them: a row a method, what each method has searched, and every run.

It holds all that tables and figures show but the learning curves, so they can be shown again anywhere. This file and
the tables import no torch, so that --show is quick.
"""

from pathlib import Path
from typing import Any

from typing_extensions import NotRequired, TypedDict

from seft_dist.files.kinds import lenient
from seft_dist.files.reading import read_json
from seft_dist.files.writing import write_json
from seft_dist.study.statistics import Difference, Spread

RESULTS = "results.json"
FORMAT = "seft_dist study results 1"
FEW_WORDS = 8
"""Texts with fewer words (headings, blank lines) may be in several parts."""


class TextPart(TypedDict):
    """Facts about one part of the data; an entry of study.json."""

    options: dict[str, Any]
    """The part's DataConfig, without what does not change its records."""
    stamp: list[list[Any]]
    """Path, size and time of its files, by which it is known again without being read."""
    digest: str
    """Hash of its records."""
    kind: str
    records: int
    words: int
    repeated: list[int]
    """Paragraphs of it that the training part has, too, and all its paragraphs. Both 0 for other kinds than text."""
    short_repeated: NotRequired[int]
    """Records of fewer than FEW_WORDS words that the training part has, too; earlier versions did not count them."""


class Start(TypedDict):
    """One start of seft study."""

    when: str
    command: str
    host: str
    cpu: str
    device: str
    versions: dict[str, str | None]
    code: dict[str, Any]


class Failure(TypedDict):
    """failed-KIND.json."""

    task: str
    when: float
    """Seconds since 1970."""
    code: int
    log: str


class RunRow(TypedDict):
    """One run that is measured on the test part, or a base."""

    method: str
    seed: int | None
    status: str
    """finished, diverged (a loss, gradient or perplexity was not finite), failed or missing."""
    folder: str
    """Folder of its cell, inside the study's folder."""
    test: float | None
    """Perplexity."""
    forgetting: float | None
    tasks: dict[str, float]
    """Task and metric to its value."""
    trainable: int | None
    zeros: float | None
    """Share of the targets' weights, in the model that is measured."""
    off_target: int | None
    """Layers with another number of zeros than their base."""
    peak_memory_bytes: int | None
    seconds: float | None
    """Seconds of training."""
    steps: int | None
    tokens: int | None


class Row(TypedDict):
    """One method."""

    method: str
    base: str
    setting: str
    """The setting that was chosen."""
    runs: int
    """Finished ones."""
    wanted: int
    diverged: int
    test: Spread | None
    versus: Difference | None
    """Test perplexity beside the reference's; None for the reference."""
    forgetting: Spread | None
    tasks: dict[str, Spread]
    trainable: float | None
    zeros: float | None
    off_target: int | None
    peak_memory_bytes: float | None
    seconds_per_step: Spread | None
    seconds: Spread | None
    tokens: float | None
    steps: float | None


class Tried(TypedDict):
    """One setting of a search."""

    setting: str
    validation: float | None
    """Perplexity; None: not known, see status."""
    status: str


class Search(TypedDict):
    """The search of one method."""

    method: str
    options: dict[str, str]
    """Its own options, without the grid."""
    grid: dict[str, list[str]]
    tried: list[Tried]
    """Empty: there was nothing to choose."""
    chosen: str | None
    edges: list[str]
    """Chosen values that are the smallest or largest of their grid."""


@lenient
class Results(TypedDict):
    """results.json."""

    format: str
    written: str
    name: str
    tokens: int
    seeds: list[int]
    search_seed: int
    reference: str
    unequal_grids: bool
    done: int
    """Tasks that are done, of total."""
    total: int
    failures: list[Failure]
    warnings: list[str]
    made_with: dict[str, Any]
    """Environment of one of the runs: code, versions, processor, device, threads, processes at a time."""
    rows: list[Row]
    searches: list[Search]
    runs: list[RunRow]
    parts: dict[str, TextPart]
    starts: list[Start]


def write_results(results: Results, folder: Path) -> Path:
    """Write results.json."""
    write_json(folder / RESULTS, results)
    return folder / RESULTS


def read_results(folder: Path) -> Results:
    """Read results.json.

    Args:
        folder: Folder of the study.

    Raises:
        ValueError: There is none, or it is damaged or of another version.
    """
    try:
        results = read_json(folder / RESULTS, Results)
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no {RESULTS}: needs the folder of seft study (output) with results") from error
    if results["format"] != FORMAT:
        raise ValueError(f"{folder / RESULTS} has format {results['format']!r}, this program reads {FORMAT!r}")
    return results
