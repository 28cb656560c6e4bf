"""The table of a sweep, from the files that its runs have left: what differs between them, how each ended, means over seeds.

SWEEP/tasks.tsv                which runs there should be: name, tab, options (written by slurm/sweep.sbatch; may be absent)
SWEEP/NAME/config.yaml, metrics.jsonl, result.json, eval.json, slurm/attempts.tsv     what each run wrote, as far as it came
SWEEP/sweep.csv, sweep.md, sweep.png                                                  what is written here
"""

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from seft_dist.config import SweepConfig
from seft_dist.files.reading import read_text
from seft_dist.files.writing import write_text
from seft_dist.results.run_files import how_measured, read_config, read_evaluations, read_lines, read_result, unlike

TASKS = "tasks.tsv"
SEEDS = ("seed", "seft.seed", "baseline.seed")
MEASURED = ("status", "step", "loss", "perplexity", "sparsity", "off target", "seconds", "restarts")
_WHERE = ("output", "backend", "deepspeed", "replicas", "offload", "packing", "threads", "timeout", "trackers")
"""Settings by which runs of one sweep may differ and still be averaged: they say where a run went, not what it did."""
_MEANS = ("loss", "perplexity", "sparsity", "seconds")
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
    made: dict[str, Any] = field(default_factory=dict)
    """What runs must have in common beside their settings for a mean over them: target sparsity, and the options in
    config.yaml."""
    evaluated: dict[str, Any] = field(default_factory=dict)
    """How the perplexity was measured."""

    @property
    def finished(self) -> bool:
        """True if the run has a result."""
        return bool(self.measured["status"] == "finished")


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
    """Read the runs of a sweep, finished or not.

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
    all_told = tasks.keys() >= set(names)
    return Sweep(folder, [_read_run(name, folder / name, tasks.get(name, {}), all_told) for name in names])


def _read_tasks(path: Path) -> dict[str, dict[str, str]]:
    tasks = {}
    for line in read_text(path).splitlines() if path.exists() else []:
        name, _, options = line.partition("\t")
        if not name.strip():
            continue
        words = options.replace("=", " ").split()
        tasks[name] = {key.lstrip("-"): value for key, value in zip(words[::2], words[1::2], strict=False)}
    return tasks


def _read_run(name: str, run: Path, options: dict[str, str], all_told: bool) -> SweepRun:
    """One run; its settings are those it was to get where tasks.tsv names all runs, or where it has not begun."""
    begun = (run / "config.yaml").exists()
    settings = _flat(read_config(run / "config.yaml")) if begun else {}
    made = {key: value for key, value in settings.items() if key not in (*_WHERE, *SEEDS)}
    measured: dict[str, Any] = {"status": _status(run)}
    lines = read_lines(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    if lines:
        measured |= {"step": lines[-1]["step"], "loss": lines[-1]["loss"], "seconds": lines[-1]["seconds"]}
    if (run / "result.json").exists():
        result = read_result(run / "result.json")
        measured |= {"step": result["steps"], "seconds": result["seconds"]}
        measured |= {"loss": result["loss"]} if result["loss"] is not None else {}  # method none has no step
        measured |= {"sparsity": result["sparsity"]["final"], "off target": result["sparsity"]["layers_off_target"]}
        if "target" in result["sparsity"]:
            made["target sparsity"] = f"{result['sparsity']['target']:.4%}"
    evaluated: dict[str, Any] = {}
    if (run / "eval.json").exists():
        found = read_evaluations(run / "eval.json")
        if "perplexity" in found["models"].get("repaired", {}):
            measured["perplexity"] = found["models"]["repaired"]["perplexity"]
            evaluated = how_measured(found, "repaired")
    attempts = _attempts(run)
    measured |= {"restarts": len(attempts) - 1} if attempts else {}
    return SweepRun(name, options if all_told or not begun else settings, measured, made, evaluated)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """All options of a run by their dotted names, but for its output."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif f"{prefix}{key}" != "output":
            flat[f"{prefix}{key}"] = str(value)
    return flat


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
    lines = read_text(path).splitlines() if path.exists() else []
    fields = [line.split("\t") for line in lines]
    return [(line[1], line[2], line[3]) for line in fields if len(line) >= 4]


def no_means(runs: Sequence[SweepRun]) -> dict[str, list[str]]:
    """Which numbers of runs cannot be averaged, and what differs between them.

    Args:
        runs: Finished, and alike in all settings but their seeds.

    Returns:
        "loss", "perplexity", "sparsity" to what differs; empty where means may be made of all.
    """
    made = unlike({run.name: run.made for run in runs})
    how = unlike({run.name: run.evaluated for run in runs if "perplexity" in run.measured})
    found = {"loss": made, "sparsity": made, "perplexity": [*made, *how]}
    return {name: reasons for name, reasons in found.items() if reasons}


def warnings_of(sweep: Sweep) -> list[str]:
    """Say which means are not made, and which numbers of the table cannot be compared."""
    texts = []
    for key, group in sweep.groups().items():
        for name, reasons in no_means(group).items() if len(group) > 1 else ():
            label = f" of {', '.join(key)}" if key else ""
            texts.append(f"No mean of {name}{label}: {'; '.join(reasons)}")
    apart = unlike({run.name: run.evaluated for run in sweep.runs if "perplexity" in run.measured})
    if apart:
        texts.append(f"These perplexities cannot be compared: {'; '.join(apart)}")
    return texts


def print_sweep(sweep: Sweep, console: Console) -> None:
    """Print the table of runs, the means over seeds, and what is missing.

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
    for text in warnings_of(sweep):
        console.print(f"Warning: {text}", style="yellow", markup=False, soft_wrap=True)
    console.print(_progress(sweep), markup=False)


def write_sweep(sweep: Sweep, config: SweepConfig) -> list[Path]:
    """Write sweep.csv (whole numbers, a line a run), sweep.md (as printed) and sweep.png.

    Args:
        sweep: The runs.
        config: Whether to draw.

    Returns:
        The files.

    Raises:
        ValueError: matplotlib is wanted and not installed.
    """
    varied = sweep.varied
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["run", *varied, *MEASURED])
    for run in sweep.runs:
        settings = [run.settings.get(name, "") for name in varied]
        writer.writerow([run.name, *settings, *(run.measured.get(name, "") for name in MEASURED)])
    parts = []
    for title, head, rows in _tables(sweep):
        lines = [head, ["---"] * len(head), *rows]
        parts.append(f"## {title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))
    parts += [*(f"**Warning**: {warning}" for warning in warnings_of(sweep)), _progress(sweep)]
    paths = [sweep.folder / "sweep.csv", sweep.folder / "sweep.md"]
    write_text(paths[0], text.getvalue())
    write_text(paths[1], "\n\n".join(parts) + "\n")
    if config.figure and any(run.finished for run in sweep.runs):
        from seft_dist.results.sweep_figure import draw

        paths.append(draw(sweep))
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
    numbers = [name for name in _MEANS if name in shown]
    rows = [[*key, str(len(group)), *(_spread(name, group) for name in numbers)] for key, group in groups.items()]
    yield "Means over seeds, with standard deviations", [*(n for n in varied if n not in SEEDS), "runs", *numbers], rows


def values_of(runs: Sequence[SweepRun], name: str) -> list[float]:
    """A number of each run that has it."""
    return [run.measured[name] for run in runs if name in run.measured]


def _spread(name: str, group: Sequence[SweepRun]) -> str:
    values = values_of(group, name)
    if not values:
        return ""
    if len(values) > 1 and name in no_means(group):
        return "unlike"
    mean = _text(name, statistics.mean(values))
    return f"{mean} +- {_text(name, statistics.stdev(values))}" if len(values) > 1 else mean


def _text(name: str, value: Any) -> str:
    return "" if value is None else format(value, _NUMBERS[name]) if name in _NUMBERS else str(value)
