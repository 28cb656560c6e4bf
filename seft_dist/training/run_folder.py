"""The folder of a run: who may write to it, and going on from its newest checkpoint.

config.yaml         the resolved configuration, written before step 1
metrics.jsonl       see training/metrics.py
checkpoints/        see io/checkpoint.py
model/              the repaired model, a Hugging Face folder
delta.safetensors   what changed against the pruned model, see io/export.py
result.json         written last: the run is finished
"""

import shutil
from pathlib import Path
from typing import Any

from seft_dist.config import TrainConfig
from seft_dist.io import checkpoint
from seft_dist.io.data import BatchStream
from seft_dist.optim.optimizer import SeftOptimizer
from seft_dist.training.cli import to_yaml

RESULT, CONFIG, MODEL, DELTA, CHECKPOINTS = "result.json", "config.yaml", "model", "delta.safetensors", "checkpoints"


def check_run_folder(config: TrainConfig) -> None:
    """Refuse a folder that this run must not write to. Local, on rank 0.

    Raises:
        ValueError: It holds a finished run, or something else.
    """
    folder = Path(config.output)
    if (folder / RESULT).exists():
        raise ValueError(f"{folder} holds a finished run: choose another output, or remove the folder")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output={folder} is a file: needs a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG).exists():
        raise ValueError(f"{folder} is not empty and holds no run: choose another output")


def open_run_folder(config: TrainConfig) -> None:
    """Make the run's folder and save the configuration in it. Local, on rank 0.

    Raises:
        ValueError: It cannot be written.
    """
    folder = Path(config.output)
    try:
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(to_yaml(config))
    except OSError as error:
        raise ValueError(f"output={folder} cannot be written: {error}") from error
    shutil.rmtree(folder / MODEL, ignore_errors=True)  # of an attempt that was stopped while it exported


def save_checkpoint(config: TrainConfig, seft: SeftOptimizer, data: BatchStream, state: dict[str, Any]) -> None:
    """Write a checkpoint between two steps. **Collective.**

    Args:
        config: The run.
        seft: What is saved.
        data: Its order is checked when the run goes on.
        state: What the caller wants back from ``resume``; JSON.
    """
    extra = {"state": state, "order": _order(config, data)}
    checkpoint.save(seft, Path(config.output) / CHECKPOINTS, extra)


def resume(config: TrainConfig, seft: SeftOptimizer, data: BatchStream) -> dict[str, Any] | None:
    """Go on from the newest checkpoint, if there is one. **Collective.**

    Args:
        config: The run.
        seft: A new optimizer; afterwards it is that of the checkpoint.
        data: The run's data.

    Returns:
        The state given to ``save_checkpoint``; None for a new run.

    Raises:
        ValueError: The checkpoint does not fit the model or the method, or the data would come in another order.
    """
    newest = checkpoint.latest(Path(config.output) / CHECKPOINTS)
    if newest is None:
        return None
    extra = checkpoint.load(seft, newest)
    now = _order(config, data)
    other = [f"{key} is {now[key]}, was {extra['order'][key]}" for key in now if now[key] != extra["order"][key]]
    if other:
        raise ValueError(
            f"{newest} cannot go on with this data: {'; '.join(other)}. Sequences would be skipped or seen twice; use the "
            "same data, and batch_size x accumulate x ranks as before"
        )
    return extra["state"]


def _order(config: TrainConfig, data: BatchStream) -> dict[str, int]:
    return {"seed": config.seed, "sequences": data.num_sequences, "sequences a step": data.global_batch}
