"""What came out of a run: summary.json, a table and figures, from the files that train.py and evaluate.py left.

runs/x/config.yaml     the configuration          runs/x/metrics.jsonl    one line for each logged step
runs/x/result.json     the run in few numbers     runs/x/eval.json        perplexity of dense, pruned and repaired model
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from seft_dist.files.writing import write_json

MODELS = ("dense", "pruned", "repaired")
# Order of summary.json; what is neither model nor perplexity is copied from result.json.
_KEYS = (
    *("model", "backend", "world_size", "density", "steps", "perplexity"),
    *("sparsity", "evolutions", "reactivated", "seconds"),
)


@dataclass(frozen=True)
class Run:
    """A finished and evaluated run, as read from its folder."""

    folder: Path
    config: dict[str, Any]
    """The resolved TrainConfig."""
    result: dict[str, Any]
    """The trainer's numbers."""
    steps: list[dict[str, Any]]
    """The lines of metrics.jsonl, by step."""
    models: dict[str, dict[str, Any]]
    """What was measured of each model in MODELS: path, perplexity, sparsity (share of zeros) ..."""

    @property
    def name(self) -> str:
        """The model's name: that of the dense one's folder."""
        return Path(self.models["dense"]["path"]).name

    @property
    def perplexity(self) -> dict[str, float]:
        """Of each model in MODELS."""
        return {name: self.models[name]["perplexity"] for name in MODELS}

    @property
    def evolutions(self) -> list[dict[str, Any]]:
        """The evolutions' records, each with its step."""
        return [{"step": line["step"], **line["evolution"]} for line in self.steps if "evolution" in line]


def read_run(folder: Path) -> Run:
    """Read the files of a run. **Local.**

    Args:
        folder: ``output`` of launch/train.py, with eval.json of launch/evaluate.py in it.

    Returns:
        The run.

    Raises:
        ValueError: A file or a number in it is missing; says which command makes it.
    """
    train, evaluate = (
        "finish the run with launch/train.py",
        f"run launch/evaluate.py with --output {folder / 'eval.json'}",
    )
    config = yaml.safe_load(_read(folder / "config.yaml", train))
    result = json.loads(_read(folder / "result.json", train))
    lines = [json.loads(line) for line in _read(folder / "metrics.jsonl", train).splitlines()]
    models = json.loads(_read(folder / "eval.json", evaluate)).get("models", {})
    missing = [key for key in _KEYS if key not in ("model", "perplexity") and key not in result]
    if missing or not lines:
        raise ValueError(f"{folder} is not a whole run, it has no {', '.join(missing or ['steps'])}: {train}")
    missing = [name for name in MODELS if "perplexity" not in models.get(name, {})]
    if missing:
        raise ValueError(
            f"{folder / 'eval.json'} has no perplexity of {', '.join(missing)}: {evaluate} and these names"
        )
    return Run(folder=folder, config=config, result=result, steps=lines, models=models)


def _read(path: Path, remedy: str) -> str:
    if not path.is_file():
        raise ValueError(f"{path} is missing: {remedy}")
    return path.read_text(encoding="utf-8")


def write_summary(run: Run) -> Path:
    """Write summary.json into the run's folder, whole or not at all. **Local.**

    Args:
        run: The run.

    Returns:
        The file.
    """
    values = {**run.result, "model": run.name, "perplexity": run.perplexity}
    path = run.folder / "summary.json"
    write_json(path, {key: values[key] for key in _KEYS})
    return path


def print_tables(run: Run, console: Console) -> None:
    """Print perplexities, the run and its evolutions. **Local.**

    Args:
        run: The run.
        console: Where to print.
    """
    result, sparsity = run.result, run.result["sparsity"]
    table = Table(title=f"{run.name}: held-out text")
    table.add_column("model")
    table.add_column("perplexity", justify="right")
    table.add_column("of the pruned one", justify="right")
    table.add_column("zero weights in targets", justify="right")
    for name, value in run.perplexity.items():
        zeros = f"{run.models[name]['sparsity']:.4%}"
        table.add_row(name, f"{value:.2f}", f"{value / run.perplexity['pruned']:.0%}", zeros)
    console.print(table)

    seft = run.config["seft"]
    console.print(
        f"{result['steps']} steps on {result['world_size']} x {result['backend']} in {result['seconds']:.0f} s, "
        f"{run.steps[-1]['tokens']:,} tokens; deltas on {result['density']:.2%} of the weights, adapt {seft['adapt']}, "
        f"reactivation {seft['reactivation']}; layers with another number of zeros than before: "
        f"{sparsity['layers_off_target']}"
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


def _table_of_phases(found: list[dict[str, dict[str, float]]]) -> Table:
    """What the parts of an evolution cost, the steps of its window included."""
    table = Table(title="Parts of an evolution, mean (MB sent: by one rank)", box=SIMPLE, padding=0)
    for name in ("part", "seconds", "MB sent"):
        table.add_column(name, justify="left" if name == "part" else "right", no_wrap=True)
    for name in found[0]:
        seconds, sent = (sum(phases[name][key] for phases in found) / len(found) for key in ("seconds", "bytes_sent"))
        table.add_row(name, f"{seconds:.3f}", f"{sent / 1e6:.3f}")
    return table
