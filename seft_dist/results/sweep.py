"""The table of a sweep, from the files that its runs have left: what differs between them, how each ended, means over seeds.

SWEEP/tasks.tsv                which runs there should be: name, tab, options (written by slurm/sweep.sbatch; may be absent)
SWEEP/NAME/config.yaml, metrics.jsonl, result.json, eval.json, slurm/attempts.tsv     what each run wrote, as far as it came
SWEEP/sweep.csv, sweep.md, sweep.png                                                  what is written here
"""

import csv
import io
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from seft_dist.config import SweepConfig
from seft_dist.files.writing import write_text

TASKS = "tasks.tsv"
SEEDS = ("seed", "seft.seed")
MEASURED = ("status", "step", "loss", "perplexity", "sparsity", "off target", "seconds", "restarts")
_NUMBERS = {"loss": ".4f", "perplexity": ".3f", "sparsity": ".4%", "seconds": ".0f"}


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep, begun or not."""

    name: str
    settings: dict[str, str]
    """Options by which it may differ from the others, by their dotted names."""
    measured: dict[str, Any]
    """Of MEASURED, what is known; loss: training loss of the last record, in nats per token; perplexity: of the model
    "repaired" in eval.json; sparsity: share of zeros in the targets; off target: layers with another number of zeros than
    before."""

    @property
    def finished(self) -> bool:
        """True if the run has a result."""
        return self.measured["status"] == "finished"


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep, in the order of tasks.tsv, then by name."""

    folder: Path
    runs: list[SweepRun]

    @property
    def varied(self) -> list[str]:
        """The settings that are not the same in all runs; of two that always go together only the first."""
        names: list[str] = []
        columns: list[list[str]] = []
        for name in dict.fromkeys(name for run in self.runs for name in run.settings):
            column = [run.settings.get(name, "") for run in self.runs]
            if len(set(column)) > 1 and not (name in SEEDS and column in columns):
                names.append(name)
                columns.append(column)
        return names

    def groups(self) -> dict[tuple[str, ...], list[SweepRun]]:
        """Finished runs that differ in their seeds only, by the other varied settings."""
        others = [name for name in self.varied if name not in SEEDS]
        found: dict[tuple[str, ...], list[SweepRun]] = {}
        for run in self.runs:
            if run.finished:
                found.setdefault(tuple(run.settings.get(name, "") for name in others), []).append(run)
        return found


def read_sweep(config: SweepConfig) -> Sweep:
    """Read the runs of a sweep, finished or not. **Local.**

    Args:
        config: Where they are.

    Returns:
        The sweep.

    Raises:
        ValueError: There is no run in the folder, or a file of a run cannot be read.
    """
    folder = Path(config.folder)
    tasks = _read_tasks(folder / TASKS)
    begun = sorted(path.parent.name for path in folder.glob("*/config.yaml"))
    names = [*tasks, *(name for name in begun if name not in tasks)]
    if not names:
        raise ValueError(f"{folder} holds neither {TASKS} nor a run: needs the folder of slurm/sweep.sbatch (SWEEP)")
    runs = []
    for name in names:
        try:
            settings = tasks[name] if tasks.keys() >= set(names) else _settings(folder / name, tasks.get(name, {}))
            runs.append(SweepRun(name, settings, _measure(folder / name)))
        except (json.JSONDecodeError, yaml.YAMLError, KeyError) as error:
            raise ValueError(f"a file of the run {folder / name} cannot be read: {error!r}") from error
    return Sweep(folder, runs)


def _read_tasks(path: Path) -> dict[str, dict[str, str]]:
    tasks = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        name, _, options = line.partition("\t")
        words = options.replace("=", " ").split()
        tasks[name] = {key.lstrip("-"): value for key, value in zip(words[::2], words[1::2], strict=False)}
    return tasks


def _settings(run: Path, options: dict[str, str]) -> dict[str, str]:
    """All options of a run that has begun; else those it was to get."""
    path = run / "config.yaml"
    if not path.exists():
        return options
    flat: dict[str, str] = {}

    def walk(tree: dict[str, Any], prefix: str) -> None:
        for key, value in tree.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            elif prefix + key != "output":
                flat[prefix + key] = str(value)

    walk(yaml.safe_load(path.read_text(encoding="utf-8")), "")
    return flat


def _measure(run: Path) -> dict[str, Any]:
    measured: dict[str, Any] = {"status": _status(run)}
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    if lines and not lines[-1].endswith("}"):  # a line that is being written
        lines.pop()
    if lines:
        last = json.loads(lines[-1])
        measured |= {"step": last["step"], "loss": last["loss"], "seconds": last["seconds"]}
    if (run / "result.json").exists():
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
        measured |= {"step": result["steps"], "loss": result["loss"], "seconds": result["seconds"]}
        measured |= {"sparsity": result["sparsity"]["final"], "off target": result["sparsity"]["layers_off_target"]}
    if (run / "eval.json").exists():
        models = json.loads((run / "eval.json").read_text(encoding="utf-8"))["models"]
        measured |= {"perplexity": models["repaired"]["perplexity"]} if "repaired" in models else {}
    attempts = _attempts(run)
    return measured | ({"restarts": len(attempts) - 1} if attempts else {})


def _status(run: Path) -> str:
    if (run / "result.json").exists():
        return "finished"
    ends = _attempts(run)
    if not run.is_dir():
        return "missing"
    if len(ends) < len(list((run / "slurm").glob("*/job.txt"))) or not ends:
        return "running or lost"  # an attempt whose node went down has written no end
    _, how, code = ends[-1]
    return f"{how} ({code})" if how in ("failed", "refused") else how


def _attempts(run: Path) -> list[tuple[str, str, str]]:
    """Restart, way and exit code of each attempt that wrote down its end (slurm/common.sh)."""
    path = run / "slurm" / "attempts.tsv"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    fields = [line.split("\t") for line in lines]
    return [(line[1], line[2], line[3]) for line in fields if len(line) >= 4]


def print_sweep(sweep: Sweep, console: Console) -> None:
    """Print the table of runs, the means over seeds, and what is missing. **Local.**

    Args:
        sweep: The runs.
        console: Where to print.
    """
    for title, head, rows in _tables(sweep):
        table = Table(title=title, box=SIMPLE, padding=(0, 1))
        for name in head:
            table.add_column(name, justify="left" if name in ("run", "status") else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(_progress(sweep))


def write_sweep(sweep: Sweep, config: SweepConfig) -> list[Path]:
    """Write sweep.csv (whole numbers, a line a run), sweep.md (as printed) and sweep.png. **Local.**

    Args:
        sweep: The runs.
        config: Whether to draw.

    Returns:
        The files.

    Raises:
        ValueError: matplotlib is wanted and not installed.
    """
    paths = [sweep.folder / "sweep.csv", sweep.folder / "sweep.md"]
    varied = sweep.varied
    lines = io.StringIO(newline="")
    writer = csv.writer(lines)
    writer.writerow(["run", *varied, *MEASURED])
    for run in sweep.runs:
        settings = [run.settings.get(name, "") for name in varied]
        writer.writerow([run.name, *settings, *(run.measured.get(name, "") for name in MEASURED)])
    write_text(paths[0], lines.getvalue())
    parts = []
    for title, head, rows in _tables(sweep):
        cells = [head, ["---"] * len(head), *rows]
        parts.append(f"## {title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in cells))
    parts.append(_progress(sweep))
    write_text(paths[1], "\n\n".join(parts) + "\n")
    if config.figure and any(run.finished for run in sweep.runs):
        paths.append(_draw(sweep))
    return paths


def _progress(sweep: Sweep) -> str:
    rest = [f"{run.name}: {run.measured['status']}" for run in sweep.runs if not run.finished]
    return f"{len(sweep.runs) - len(rest)} of {len(sweep.runs)} runs are finished. " + "; ".join(rest)


def _tables(sweep: Sweep) -> Iterable[tuple[str, list[str], list[list[str]]]]:
    """Title, head and rows of each table, as text."""
    varied, runs = sweep.varied, sweep.runs
    shown = [name for name in MEASURED if any(name in run.measured for run in runs)]
    rows = [
        [run.name, *(run.settings.get(n, "") for n in varied), *(_text(n, run.measured.get(n)) for n in shown)]
        for run in runs
    ]
    yield f"Sweep {sweep.folder.name}", ["run", *varied, *shown], rows

    groups = sweep.groups()
    if not any(len(group) > 1 for group in groups.values()):
        return
    numbers = [name for name in ("loss", "perplexity", "sparsity", "seconds") if name in shown]
    rows = [
        [*key, str(len(group)), *(_spread(name, _values(group, name)) for name in numbers)]
        for key, group in groups.items()
    ]
    yield "Means over seeds, with standard deviations", [*(n for n in varied if n not in SEEDS), "runs", *numbers], rows


def _values(runs: Sequence[SweepRun], name: str) -> list[float]:
    return [run.measured[name] for run in runs if name in run.measured]


def _spread(name: str, values: list[float]) -> str:
    if not values:
        return ""
    mean = _text(name, statistics.mean(values))
    return f"{mean} +- {_text(name, statistics.stdev(values))}" if len(values) > 1 else mean


def _text(name: str, value: Any) -> str:
    return "" if value is None else format(value, _NUMBERS[name]) if name in _NUMBERS else str(value)


def _draw(sweep: Sweep) -> Path:
    """Perplexity, or else loss, over the varied setting with most values (density if it varies); a line for the others."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("the figure needs matplotlib: pip install 'seft_dist[plots]', or --figure false") from error
    matplotlib.use("Agg")  # files only, no display
    import matplotlib.pyplot as plt

    others = [name for name in sweep.varied if name not in SEEDS]
    groups = sweep.groups()
    axis = max(
        range(len(others)), key=lambda i: (others[i] == "seft.density", len({key[i] for key in groups})), default=None
    )
    measure = "perplexity" if all(_values(group, "perplexity") for group in groups.values()) else "loss"
    lines: dict[str, list[tuple[str, list[float]]]] = {}
    for key, group in groups.items():
        label = ", ".join(f"{others[i]} {value}" for i, value in enumerate(key) if i != axis)
        lines.setdefault(label, []).append(("all" if axis is None else key[axis], _values(group, measure)))
    figure, axes = plt.subplots(figsize=(7.0, 4.0), layout="constrained")
    for label, points in lines.items():
        means = [statistics.mean(values) for _, values in points]
        deviations = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in points]
        axes.errorbar([x for x, _ in points], means, yerr=deviations, marker="o", capsize=3, label=label or None)
    axes.set(title=f"Sweep {sweep.folder.name}", xlabel="" if axis is None else others[axis], ylabel=measure)
    axes.grid(axis="y", color="#E6E6E6")
    if any(lines):
        axes.legend(frameon=False)
    path = sweep.folder / "sweep.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
