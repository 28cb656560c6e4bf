"""Summary of a finished run (summary.json, tables), from the files that seft train and seft evaluate wrote.

runs/x/config.yaml     the configuration          runs/x/metrics.jsonl    one line for each logged step
runs/x/result.json     totals of the run          runs/x/eval.json        perplexity of dense, pruned and repaired model
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from typing_extensions import NotRequired, TypedDict

from seft_dist.config.baselines import VARIANTS
from seft_dist.files.kinds import check_kind, lenient
from seft_dist.files.reading import read_json
from seft_dist.files.writing import write_json
from seft_dist.results.run_files import (
    Count,
    MetricsLine,
    RunResult,
    list_differences,
    measurement_of,
    read_evaluations,
    read_lines,
    read_run_config,
)

T = TypeVar("T")

MODELS = ("dense", "pruned", "repaired")
_KEYS = (
    "model",
    "backend",
    "world_size",
    "density",
    "steps",
    "perplexity",
    "sparsity",
    "evolutions",
    "reactivated",
    "seconds",
)
"""Keys of summary.json, in order; all but "model" and "perplexity" are copied from result.json."""
_OPTIONAL_KEYS = ("validation",)
"""Keys that are copied if result.json has them."""


@lenient
class _Cost(TypedDict):
    seconds: float
    bytes_sent: float


@lenient
class _EvolutionLine(TypedDict):
    dropped: Count
    grown: Count
    reactivated: Count
    pruned: Count
    replaced: float
    seconds: float
    bytes_sent: float
    phases: dict[str, _Cost]


@lenient
class _StepLine(MetricsLine):
    tokens: Count
    evolution: NotRequired[_EvolutionLine]


@lenient
class _CompleteResult(RunResult):
    world_size: Count
    backend: str
    density: float


@lenient
class _MeasuredModel(TypedDict):
    path: str
    perplexity: float
    sparsity: float


@lenient
class _SeftSettings(TypedDict):
    adapt: str
    reactivation: float


@lenient
class _Config(TypedDict):
    seft: _SeftSettings


@dataclass(frozen=True)
class FinishedRun:
    """A finished and evaluated run, as read from its folder."""

    folder: Path
    config: dict[str, Any]
    """The resolved TrainConfig."""
    result: dict[str, Any]
    """Content of result.json."""
    steps: list[dict[str, Any]]
    """Lines of metrics.jsonl, by step."""
    models: dict[str, dict[str, Any]]
    """Entries of eval.json for each model in MODELS: path, perplexity, sparsity (share of zeros) ..."""
    not_comparable: list[str]
    """Differences because of which the perplexities cannot be compared, such as other dtypes, windows or texts."""

    @property
    def name(self) -> str:
        """Name of the model: that of the dense model's folder."""
        return Path(self.models["dense"]["path"]).name

    @property
    def perplexity(self) -> dict[str, float]:
        """Perplexity of each model in MODELS."""
        return {name: self.models[name]["perplexity"] for name in MODELS}

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Loss and perplexity of the evaluations during training, each with its step."""
        return [{"step": line["step"], **line["validation"]} for line in self.steps if "validation" in line]

    @property
    def evolutions(self) -> list[dict[str, Any]]:
        """Records of the evolutions, each with its step."""
        return [{"step": line["step"], **line["evolution"]} for line in self.steps if "evolution" in line]


def read_run(folder: Path) -> FinishedRun:
    """Read and check the files of a run.

    Args:
        folder: ``output`` of seft train, with eval.json of seft evaluate in it.

    Raises:
        ValueError: A file or an entry is missing; the message names the command that writes it.
    """
    train = "finish the run with seft train"
    evaluate = f"run seft evaluate with --output {folder / 'eval.json'}"
    config = _read(read_run_config, folder / "config.yaml", train)
    result = _read(lambda path: read_json(path, dict[str, Any]), folder / "result.json", train)
    lines = _read(lambda path: read_lines(path, _StepLine), folder / "metrics.jsonl", train)
    evaluations = _read(read_evaluations, folder / "eval.json", evaluate)
    models = evaluations["models"]
    missing = [key for key in _KEYS if key not in ("model", "perplexity") and key not in result]
    if missing or not lines:
        raise ValueError(f"{folder} is not a whole run, it has no {', '.join(missing or ['steps'])}: {train}")
    check_kind(result, _CompleteResult, str(folder / "result.json"))
    check_kind(config, _Config, str(folder / "config.yaml"))
    missing = [name for name in MODELS if "perplexity" not in models.get(name, {})]
    if missing:
        raise ValueError(
            f"{folder / 'eval.json'} has no perplexity of {', '.join(missing)}: {evaluate} and these names"
        )
    for name in MODELS:
        check_kind(models[name], _MeasuredModel, f"{folder / 'eval.json'}, model {name}")
    not_comparable = list_differences({name: measurement_of(evaluations, name) for name in MODELS})
    return FinishedRun(
        folder=folder,
        config=config,
        result=result,
        steps=lines,
        models={name: dict(models[name]) for name in models},
        not_comparable=not_comparable,
    )


def _read(read: Callable[[Path], T], path: Path, remedy: str) -> T:
    try:
        return read(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{error}; if it cannot be repaired: {remedy}") from error


def write_summary(run: FinishedRun) -> Path:
    """Write summary.json into the run's folder.

    Returns:
        The path of the file.
    """
    values = {**run.result, "model": run.name, "perplexity": run.perplexity}
    path = run.folder / "summary.json"
    write_json(path, {key: values[key] for key in (*_KEYS, *_OPTIONAL_KEYS) if key in values or key in _KEYS})
    return path


def print_tables(run: FinishedRun, console: Console) -> None:
    """Print the perplexities, a summary of the run, and its evolutions."""
    result, sparsity = run.result, run.result["sparsity"]
    table = Table(title=f"{run.name}: held-out text")
    table.add_column("model")
    table.add_column("perplexity", justify="right")
    table.add_column("of the pruned one", justify="right")
    table.add_column("zero weights in targets", justify="right")
    for name, value in run.perplexity.items():
        zeros = f"{run.models[name]['sparsity']:.4%}"
        share = f"{value / run.perplexity['pruned']:.0%}" if run.perplexity["pruned"] else "-"
        table.add_row(name, f"{value:.2f}", share, zeros)
    console.print(table)
    if run.not_comparable:
        text = f"Warning: these perplexities cannot be compared: {'; '.join(run.not_comparable)}"
        console.print(text, style="yellow", markup=False, soft_wrap=True)

    seft, method = run.config["seft"], result.get("method", "seft")
    trained = (
        f"deltas on {result['density']:.2%} of the weights, adapt {seft['adapt']}, reactivation {seft['reactivation']}"
    )
    if method not in VARIANTS:
        trained = f"method {method}, {result['trainable']:,} trainable parameters"
    console.print(
        f"{result['steps']} steps on {result['world_size']} x {result['backend']} in {result['seconds']:.0f} s, "
        f"{run.steps[-1]['tokens']:,} tokens; {trained}; layers with another number of zeros than before: "
        f"{sparsity['layers_off_target']}"
    )
    if "validation" in result:
        best, last = result["validation"]["best"], result["validation"]["last"]
        ended = "; the run ended early" if result["validation"]["stopped_early"] else ""
        console.print(
            f"validation loss {best['loss']:.4f} (perplexity {best['perplexity']:.2f}) at step {best['step']}, the "
            f"best; {last['loss']:.4f} at step {last['step']}, the last{ended}"
        )
        if exported := result["validation"].get("exported"):
            console.print(
                f"as exported, pruned again: {exported['loss']:.4f} (perplexity {exported['perplexity']:.2f})"
            )
    if not run.evolutions:
        return
    table = Table(title="Evolutions (MB sent: by one rank)", box=SIMPLE, padding=0)
    for name in ("step", "dropped", "grown", "reactivated", "pruned", "replaced", "seconds", "MB sent"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in run.evolutions:
        counts = [f"{line[name]:,}" for name in ("dropped", "grown", "reactivated", "pruned")]
        sent = f"{line['bytes_sent'] / 1e6:.2f}"
        table.add_row(str(line["step"]), *counts, f"{line['replaced']:.1%}", f"{line['seconds']:.2f}", sent)
    console.print(table)
    console.print(_table_of_phases([line["phases"] for line in run.evolutions]))


def _table_of_phases(evolutions: list[dict[str, dict[str, float]]]) -> Table:
    """Tabulate the mean cost of the parts of an evolution, including the steps of its window.

    Args:
        evolutions: Costs of each evolution, by the name of the part.
    """
    table = Table(title="Parts of an evolution, mean (MB sent: by one rank)", box=SIMPLE, padding=0)
    for name in ("part", "seconds", "MB sent"):
        table.add_column(name, justify="left" if name == "part" else "right", no_wrap=True)
    for name in evolutions[0]:
        costs = [phases[name] for phases in evolutions if name in phases]
        seconds, sent = (sum(cost[key] for cost in costs) / len(evolutions) for key in ("seconds", "bytes_sent"))
        table.add_row(name, f"{seconds:.3f}", f"{sent / 1e6:.3f}")
    return table
