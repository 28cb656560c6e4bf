"""Studies for tests: a base, texts, and a stand-in for the processes, which leaves the files that they would."""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from seft_dist.config import StudyConfig
from seft_dist.session.signals import StopRequest
from seft_dist.study.results import Results, read_results
from seft_dist.study.runner import Process
from seft_dist.study.state import PRUNE, TRAIN, Task
from seft_dist.study.study import run_study

BEST = {"a": 0.002, "b": 0.004}
"""Learning rate that is best for each method."""


class Ended:
    """A process that has ended."""

    def __init__(self, code: int) -> None:
        self._code = code

    def poll(self) -> int | None:
        return self._code

    def terminate(self) -> None:
        """Has ended."""

    def kill(self) -> None:
        """Has ended."""


class Fake:
    """Stands in for the commands, and remembers what it was asked for."""

    def __init__(self, code: Callable[[Task], int] = lambda task: 0) -> None:
        """Args:
        code: Exit status of a task; only with 0 it leaves its files.
        """
        self.labels: list[str] = []
        self.commands: list[list[str]] = []
        self._code = code

    def __call__(self, task: Task, command: list[str], log: Path, lock: int) -> Process:
        self.labels.append(task.label)
        self.commands.append(command)
        code = self._code(task)
        if code == 0:
            self._leave(task)
        return Ended(code)

    def _leave(self, task: Task) -> None:
        if task.kind == PRUNE:
            assert task.base is not None
            model_files(task.base.model)
        elif task.kind == TRAIN:
            write_run(task)
        else:
            policy = {"data": "x", "tokens_hash": task.kind, "seq_len": 16}
            model: dict[str, Any] = {"perplexity": perplexity(task), "sparsity": 0.6, "policy": policy}
            model |= (
                {"tasks": {"quiz": {"acc,none": 0.5, "acc_stderr,none": 0.1, "samples": 9}}}
                if task.kind == "test"
                else {}
            )
            task.done.write_text(json.dumps({"models": {"model": model}}))


def perplexity(task: Task) -> float:
    """Compute the perplexity of a fake model: a parabola over the learning rate with seed noise; bases are worse."""
    assert task.cell is not None
    part = {"validation": 0.0, "test": 1.0, "forgetting": 100.0}[task.kind]
    if task.cell.config is None:
        return 50.0 + part
    lr, seed = task.cell.config.optim.lr, task.cell.config.seed
    method = "b" if task.cell.config.seft.reactivation == 0 else "a"
    return (
        20.0
        + part
        + abs(math.log2(lr / BEST[method]))
        + (0.5 if method == "b" else 0.0)
        + 0.1 * seed * (1 + (method == "b"))
    )


def write_run(task: Task) -> None:
    """Write the files that `seft train` leaves."""
    assert task.cell is not None and task.cell.config is not None
    run, config = task.folder / "run", task.cell.config
    model_files(run / "model")
    (run / "checkpoints").mkdir(exist_ok=True)
    tokens = (config.global_batch or 0) * config.data.seq_len
    numbers = range(1, config.total_steps + 1)
    lines = [{"step": i, "loss": 5 - i / 9, "seconds": i / 2, "tokens": i * tokens} for i in numbers]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result: dict[str, Any] = {
        "steps": config.total_steps,
        "loss": 3.0,
        "seconds": config.total_steps / 2,
        "tokens": config.total_steps * tokens,
    }
    result |= {
        "sparsity": {"target": 0.6, "final": 0.6, "layers_off_target": 0},
        "trainable": 77,
        "peak_memory_bytes": 5 << 20,
    }
    (run / "result.json").write_text(json.dumps(result))


def model_files(folder: Path) -> None:
    """A folder that passes for a model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")


def text(path: Path, start: int, records: int = 3) -> str:
    """A file of records of ten words each, different ones for different starts."""
    lines = [json.dumps({"text": " ".join(f"word{start + i}x{j}" for j in range(10))}) for i in range(records)]
    path.write_text("\n".join(lines))
    return str(path)


def study_config(folder: Path, **over: Any) -> StudyConfig:
    """Two methods with three learning rates each, a base as it is, two seeds; 32 tokens a step, 5 steps."""
    if not (folder / "base").exists():
        model_files(folder / "base")
        for i, name in enumerate(("train", "validation", "test", "forgetting")):
            text(folder / f"{name}.jsonl", 100 * i)
    parts = ("train", "validation", "test", "forgetting")
    grid = {"optim.lr": [1e-3, 2e-3, 4e-3], "seft.interval": 2}
    settings: dict[str, Any] = {
        "output": str(folder / "study"),
        "bases": {"base": {"path": str(folder / "base")}},
        "data": {name: str(folder / f"{name}.jsonl") for name in parts},
        "methods": {"a": grid | {"seft": {"reactivation": 1}}, "b": grid, "none": {"method": "none"}},
        "train": {"data.seq_len": 16, "batch_size": 2},
        "tokens": 5 * 32 + 31,
        "seeds": (0, 1),
        "threads": 1,
        "figures": False,
    }
    return StudyConfig(**(settings | over))


def run(config: StudyConfig, fake: Fake, request: StopRequest | None = None) -> tuple[int, Results, str]:
    """Run a study with a fake; its exit status, results, and what it printed."""
    out = io.StringIO()
    console = Console(file=out, width=200)
    status = run_study(config, Path("launch"), request or StopRequest(), console, fake)
    return status, read_results(Path(config.output)), out.getvalue()


def cells(config: StudyConfig, pattern: str = "*") -> list[Path]:
    """Folders of cells, by a pattern of their names."""
    return sorted((Path(config.output) / "cells").glob(pattern))
