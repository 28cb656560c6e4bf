"""Tables of a sweep, from the files of its runs: the varied settings, the result of each run, and means over seeds.

SWEEP/tasks.tsv        the runs of the sweep: name, tab, options (written by slurm/sweep.sbatch; may be absent)
SWEEP/NAME/            config.yaml, metrics.jsonl, result.json, eval.json and slurm/attempts.tsv of each run, if written
SWEEP/sweep.csv, sweep.md, sweep.png      the files written here
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
from seft_dist.config.training import OPTIONS_WITHOUT_EFFECT
from seft_dist.files.reading import read_text
from seft_dist.files.writing import write_text
from seft_dist.results.run_files import (
    flatten_options,
    has_result,
    list_differences,
    markdown_table,
    measurement_of,
    read_evaluations,
    read_lines,
    read_result,
    read_run_config,
)

TASKS = "tasks.tsv"
SEEDS = ("seed", "seft.seed", "baseline.seed")
MEASURED = ("status", "step", "loss", "perplexity", "sparsity", "off target", "seconds", "restarts")
_WITHOUT_EFFECT = (
    *OPTIONS_WITHOUT_EFFECT,
    *("backend", "deepspeed", "replicas", "offload", "packing", "threads"),
)
"""Settings in which runs may differ and still be averaged: they choose where and how a run is executed."""
_MEANS = ("loss", "perplexity", "sparsity", "seconds")
_NUMBERS = {"loss": ".4f", "perplexity": ".3f", "sparsity": ".4%", "seconds": ".0f"}


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep, started or not."""

    name: str
    settings: dict[str, str]
    """Options in which the run may differ from the others, by their dotted names."""
    measured: dict[str, Any]
    """Known values of MEASURED by name.

    loss: training loss of the last record, in nats per token; perplexity: that of the model "repaired" in eval.json;
    sparsity: share of zeros in the targets; off target: number of layers whose number of zeros has changed.
    """
    made: dict[str, Any] = field(default_factory=dict)
    """Target sparsity, and the options in config.yaml: runs must agree in these to be averaged."""
    evaluated: dict[str, Any] = field(default_factory=dict)
    """Conditions under which the perplexity was measured."""

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
        """The settings that differ between runs; of several seeds that always change together only the first."""
        names: list[str] = []
        columns: list[list[str]] = []
        for name in dict.fromkeys(name for run in self.runs for name in run.settings):
            column = [run.settings.get(name, "") for run in self.runs]
            if len(set(column)) > 1 and not (name in SEEDS and column in columns):
                names.append(name)
                columns.append(column)
        return names

    def groups(self) -> dict[tuple[str, ...], list[SweepRun]]:
        """Group the finished runs that differ only in their seeds, by the values of the other varied settings."""
        others = [name for name in self.varied if name not in SEEDS]
        grouped: dict[tuple[str, ...], list[SweepRun]] = {}
        for run in self.runs:
            if run.finished:
                grouped.setdefault(tuple(run.settings.get(name, "") for name in others), []).append(run)
        return grouped


def read_sweep(config: SweepConfig) -> Sweep:
    """Read the runs of a sweep, finished or not.

    Args:
        config: The sweep, with its folder.

    Raises:
        ValueError: There is no run in the folder, or a file of a run cannot be read.
    """
    folder = Path(config.folder)
    tasks = _read_tasks(folder / TASKS)
    begun = sorted(path.parent.name for path in folder.glob("*/config.yaml"))
    names = [*tasks, *(name for name in begun if name not in tasks)]
    if not names:
        raise ValueError(f"{folder} holds neither {TASKS} nor a run: needs the folder of slurm/sweep.sbatch (SWEEP)")
    all_listed = tasks.keys() >= set(names)
    return Sweep(folder, [_read_run(name, folder / name, tasks.get(name, {}), all_listed) for name in names])


def _read_tasks(path: Path) -> dict[str, dict[str, str]]:
    tasks = {}
    for line in read_text(path).splitlines() if path.exists() else []:
        name, _, options = line.partition("\t")
        if not name.strip():
            continue
        words = options.replace("=", " ").split()
        tasks[name] = {key.lstrip("-"): value for key, value in zip(words[::2], words[1::2], strict=False)}
    return tasks


def _read_run(name: str, run: Path, options: dict[str, str], all_listed: bool) -> SweepRun:
    """Read one run.

    Args:
        name: Name of the run.
        run: Its folder, which may not exist yet.
        options: Options of the run in tasks.tsv; empty if it is not listed there.
        all_listed: tasks.tsv lists all runs. Then settings are the few options listed there; otherwise they are taken
            from config.yaml, so that all runs have the same entries.
    """
    begun = (run / "config.yaml").exists()
    settings = flatten_options(read_run_config(run / "config.yaml")) if begun else {}
    made = {key: value for key, value in settings.items() if key not in (*_WITHOUT_EFFECT, *SEEDS)}
    measured: dict[str, Any] = {"status": _status(run)}
    lines = read_lines(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    if lines:
        measured |= {"step": lines[-1]["step"], "loss": lines[-1]["loss"], "seconds": lines[-1]["seconds"]}
    if has_result(run / "result.json"):
        result = read_result(run / "result.json")
        measured |= {"step": result["steps"], "seconds": result["seconds"]}
        measured |= {"loss": result["loss"]} if result["loss"] is not None else {}  # method none has no step
        measured |= {"sparsity": result["sparsity"]["final"], "off target": result["sparsity"]["layers_off_target"]}
        if "target" in result["sparsity"]:
            made["target sparsity"] = f"{result['sparsity']['target']:.4%}"
    evaluated: dict[str, Any] = {}
    if (run / "eval.json").exists():
        evaluations = read_evaluations(run / "eval.json")
        if "perplexity" in evaluations["models"].get("repaired", {}):
            measured["perplexity"] = evaluations["models"]["repaired"]["perplexity"]
            evaluated = measurement_of(evaluations, "repaired")
    attempts = _ended_attempts(run)
    measured |= {"restarts": len(attempts) - 1} if attempts else {}
    return SweepRun(name, options if all_listed or not begun else settings, measured, made, evaluated)


def _status(run: Path) -> str:
    if has_result(run / "result.json"):
        return "finished"
    ended = _ended_attempts(run)
    if not run.is_dir():
        return "missing"
    # An attempt that is running, or whose node went down, has a job.txt but has not recorded its end
    if len(ended) < len(list((run / "slurm").glob("*/job.txt"))) or not ended:
        return "running or lost"
    _, end, code = ended[-1]
    return f"{end} ({code})" if end in ("failed", "refused") else end


def _ended_attempts(run: Path) -> list[tuple[str, str, str]]:
    """Number of restarts, kind of end and exit code of each attempt that recorded its end (slurm/common.sh)."""
    path = run / "slurm" / "attempts.tsv"
    lines = read_text(path).splitlines() if path.exists() else []
    fields = [line.split("\t") for line in lines]
    return [(line[1], line[2], line[3]) for line in fields if len(line) >= 4]


def not_averageable(runs: Sequence[SweepRun]) -> dict[str, list[str]]:
    """Find the numbers of some runs that must not be averaged.

    Args:
        runs: Finished runs with the same settings except their seeds.

    Returns:
        The reasons, by the name of the number ("loss", "perplexity", "sparsity"); empty if all may be averaged.
    """
    made = list_differences({run.name: run.made for run in runs})
    evaluated = list_differences({run.name: run.evaluated for run in runs if "perplexity" in run.measured})
    reasons_of = {"loss": made, "sparsity": made, "perplexity": [*made, *evaluated]}
    return {name: reasons for name, reasons in reasons_of.items() if reasons}


def warnings_of(sweep: Sweep) -> list[str]:
    """Return warnings about means that are not computed, and about perplexities that are not comparable."""
    texts = []
    for key, group in sweep.groups().items():
        for name, reasons in not_averageable(group).items() if len(group) > 1 else ():
            label = f" of {', '.join(key)}" if key else ""
            texts.append(f"No mean of {name}{label}: {'; '.join(reasons)}")
    differences = list_differences({run.name: run.evaluated for run in sweep.runs if "perplexity" in run.measured})
    if differences:
        texts.append(f"These perplexities cannot be compared: {'; '.join(differences)}")
    return texts


def print_sweep(sweep: Sweep, console: Console) -> None:
    """Print the table of runs, the means over seeds, warnings, and the runs that are not finished."""
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
    """Write sweep.csv (a line for each run, numbers not rounded), sweep.md (the printed tables) and sweep.png.

    Args:
        sweep: The runs.
        config: The sweep; it may switch the figure off.

    Returns:
        The paths of the files.

    Raises:
        ValueError: A figure is to be drawn and matplotlib is not installed.
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
        parts.append(f"## {title}\n\n{markdown_table(head, rows)}")
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
    """Yield title, header and rows of each table, as text."""
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


def measured_values(runs: Sequence[SweepRun], name: str) -> list[float]:
    """Return the values of one number in MEASURED, of those runs that have it."""
    return [run.measured[name] for run in runs if name in run.measured]


def _spread(name: str, group: Sequence[SweepRun]) -> str:
    values = measured_values(group, name)
    if not values:
        return ""
    if len(values) > 1 and name in not_averageable(group):
        return "unlike"
    mean = _text(name, statistics.mean(values))
    return f"{mean} +- {_text(name, statistics.stdev(values))}" if len(values) > 1 else mean


def _text(name: str, value: Any) -> str:
    return "" if value is None else format(value, _NUMBERS[name]) if name in _NUMBERS else str(value)
