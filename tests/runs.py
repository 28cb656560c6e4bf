"""Tiny traced runs of `seft train`'s trainer, in forked ranks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from seft_dist.config import AdamConfig, DataConfig, ModelConfig, TrainConfig
from seft_dist.training.trainer import Finished, Stopped, train
from tests.models import moving
from tests.ranks import run_ranks

STEPS = 10


def run_config(inputs: Path, output: Path, **over: Any) -> TrainConfig:
    """A run on ``inputs/pruned`` and ``inputs/text.jsonl``, 12 sequences a step."""
    settings: dict[str, Any] = {
        "model": ModelConfig(path=str(inputs / "pruned")),
        "data": DataConfig(path=str(inputs / "text.jsonl"), seq_len=16),
        "output": str(output),
        "seft": moving(density=0.05, interval=3),
        "optim": AdamConfig(lr=1e-2),
        "steps": STEPS,
        "batch_size": 6,
        "global_batch": 12,
        "threads": 1,
        "trace": True,
    }
    return TrainConfig(**(settings | over))


def make_config(inputs: Path, output: Path, **over: Any) -> TrainConfig:
    """``run_config`` without a trace, all sequences of a step on one rank."""
    return run_config(inputs, output, **({"batch_size": 12, "global_batch": None, "trace": False} | over))


def ds_file(folder: Path, content: dict[str, Any]) -> str:
    """A ds_config."""
    path = folder / "ds.json"
    path.write_text(json.dumps({"steps_per_print": 1 << 30} | content))
    return str(path)


def train_to_end(config: TrainConfig) -> dict[str, Any]:
    """Train on the ranks that are there; what result.json holds."""
    outcome = train(config)
    assert isinstance(outcome, Finished), outcome
    return outcome.result


def train_until_stopped(config: TrainConfig) -> Stopped:
    """Train on the ranks that are there, with a signal on its way."""
    outcome = train(config)
    assert isinstance(outcome, Stopped), outcome
    return outcome


def run_train(
    config: TrainConfig, world_size: int = 1, before: Callable[[], None] | None = None, timeout: float = 120
) -> dict[str, Any]:
    """Train in forked ranks; rank 0's result.

    Args:
        config: The run.
        world_size: Number of ranks.
        before: Called first on each rank, e.g. to break something there.
        timeout: Seconds.
    """

    def on_rank(rank: int, world: int) -> dict[str, Any]:
        if before is not None:
            before()
        return train_to_end(config)

    return run_ranks(on_rank, world_size, timeout=timeout)[0]


def records(output: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def digests(output: Path) -> list[str]:
    """Digests of all evolutions of a run."""
    return [record["evolution"]["digest"] for record in records(output) if "evolution" in record]
