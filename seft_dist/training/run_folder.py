"""The folder of a run: who may write to it, and going on from its newest checkpoint.

config.yaml         the resolved configuration, written before step 1
metrics.jsonl       see training/metrics.py
checkpoints/        see io/checkpoint
diagnosis/          see training/diagnosis.py: only if an error stopped it
model/              the repaired model, a Hugging Face folder
delta.safetensors   what changed against the pruned model, see io/export.py
slurm/              what each attempt of a batch job ran, see slurm/common.sh: may be there before the run
result.json         written last: the run is finished
"""

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

from seft_dist.config import TrainConfig
from seft_dist.io import checkpoint
from seft_dist.io.data import BatchStream
from seft_dist.optim.optimizer import SeftOptimizer
from seft_dist.training.cli import to_dict, to_yaml
from seft_dist.training.distributed import Ranks, together

RESULT, CONFIG, MODEL, DELTA, CHECKPOINTS = "result.json", "config.yaml", "model", "delta.safetensors", "checkpoints"
SLURM = "slurm"


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
    others = [path.name for path in folder.iterdir() if path.name != SLURM] if folder.is_dir() else []
    if others and not (folder / CONFIG).exists():
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


def settle_batch(config: TrainConfig, world_size: int) -> TrainConfig:
    """Fill in the global batch: that of the run which goes on, else batch_size for each rank. Local.

    Args:
        config: The run.
        world_size: Number of ranks, maybe another one than when the run began.

    Returns:
        The configuration with a number for ``global_batch``.
    """
    if config.global_batch is not None:
        return config
    global_batch = config.batch_size * world_size
    for path in reversed(checkpoint.complete(Path(config.output) / CHECKPOINTS)):
        try:
            global_batch = checkpoint.read_manifest(path)["extra"]["order"]["global_batch"]
            break
        except ValueError:  # resume() says what is wrong with it
            continue
    return dataclasses.replace(config, global_batch=global_batch)


def extra_of(config: TrainConfig, data: BatchStream, state: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds beside the optimizer. Local.

    Args:
        config: The run.
        data: Its order is checked when the run goes on.
        state: What the caller wants back from ``resume``; JSON.
    """
    return {"state": state, "order": _order(config, data), "config": to_dict(config)}


def resume(config: TrainConfig, ranks: Ranks, seft: SeftOptimizer, data: BatchStream) -> dict[str, Any] | None:
    """Go on from the newest checkpoint that is whole, if there is one. **Collective.**

    A damaged checkpoint is named, put aside as ``damaged-*``, and the one before it is taken.

    Args:
        config: The run.
        ranks: This process.
        seft: A new optimizer; afterwards it is that of the checkpoint.
        data: The run's data.

    Returns:
        The state given to ``extra_of``; None for a new run.

    Raises:
        ValueError: The checkpoint does not fit the model or the method, the data would come in another order, or all
            checkpoints are damaged.
    """
    folder = Path(config.output) / CHECKPOINTS
    found = together(ranks, lambda: checkpoint.complete(folder))
    for path in reversed(found):
        try:
            extra = checkpoint.load(seft, path)
        except checkpoint.DamagedError as error:
            problem = str(error)
            together(ranks, lambda: _put_aside(path, problem) if ranks.is_main else None)  # noqa: B023
            continue
        _check_order(path, extra["order"], _order(config, data))
        return extra["state"]
    if found:
        raise ValueError(
            f"all {len(found)} checkpoints in {folder} are damaged: restore one from a backup, or remove the run's folder "
            "to begin anew"
        )
    return None


def _put_aside(path: Path, problem: str) -> None:
    aside = path.with_name(path.name.replace("step", "damaged"))
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    print(f"{problem}\nput aside as {aside}; going on from the checkpoint before it", file=sys.stderr, flush=True)


def _check_order(path: Path, then: dict[str, int], now: dict[str, int]) -> None:
    other = [f"{key} is {now[key]}, was {then.get(key)}" for key in now if now[key] != then.get(key)]
    if other:
        raise ValueError(
            f"{path} cannot go on with this data: {'; '.join(other)}. Sequences would be skipped or seen twice; use the "
            "same data, seed and global_batch as before (any number of ranks will do), or another output"
        )


def _order(config: TrainConfig, data: BatchStream) -> dict[str, int]:
    return {"seed": config.seed, "sequences": data.num_sequences, "global_batch": data.global_batch}
