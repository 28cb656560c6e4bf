"""The diagnosis of a run that an error has stopped: one file for each rank that saw the error."""

import math
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from seft_dist.data.batches import Batch
from seft_dist.files.writing import write_json
from seft_dist.io.checkpoint import latest
from seft_dist.session.distributed import Ranks
from seft_dist.training.method import Method
from seft_dist.training.run_folder import CHECKPOINTS

FOLDER = "diagnosis"
_FIRST_TOKENS = 64


def write_diagnosis(
    error: BaseException,
    output: Path,
    ranks: Ranks,
    method: Method,
    samples: list[list[int]],
    micro_batches: list[Batch],
) -> Path | None:
    """Write what is known on this rank about an error in the training loop. No rank waits for others: they may be gone.

    Args:
        error: The error that stops the run.
        output: The run's folder.
        ranks: This process.
        method: The method, as the error left it.
        samples: Numbers of this rank's sequences in the step, for each micro-batch.
        micro_batches: The micro-batches themselves; empty if the error came before they were read.

    Returns:
        The file, ``diagnosis/step-<steps done>-rank-<rank>.json``; None if it could not be written.
    """
    newest = latest(output / CHECKPOINTS)
    content: dict[str, Any] = {
        "error": f"{type(error).__name__}: {error}",
        "traceback": traceback.format_exception(error),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "steps_done": method.num_steps,
        "newest_checkpoint": str(newest) if newest else None,
        "sequences_of_the_step": samples,
        "first_tokens": [batch["input_ids"][:, :_FIRST_TOKENS].tolist() for batch in micro_batches],
        "layers": _layers(method),
    }
    path = output / FOLDER / f"step-{method.num_steps:08d}-rank-{ranks.rank:05d}.json"
    try:
        path.parent.mkdir(exist_ok=True)
        write_json(path, content)
    except OSError:
        return None  # a full disk must not hide the error itself
    goes_on = f"the same command goes on from {newest}" if newest else "no checkpoint was written yet"
    print(f"rank {ranks.rank}: stopped after step {method.num_steps}: {path}; {goes_on}", file=sys.stderr, flush=True)
    return path


def _layers(method: Method) -> list[dict[str, Any]]:
    """Summarise this rank's part of everything trained: values that are too large or not finite show here."""
    rows = []
    for name, state in method.states():
        row: dict[str, Any] = {"name": name, "own_values": len(state["values"])}
        for key, column in state.items():
            largest = float(column.abs().max()) if len(column) else 0.0
            row[f"largest_{key}"] = largest if math.isfinite(largest) else str(largest)
            row[f"not_finite_{key}"] = int(column.isfinite().logical_not().sum())
        rows.append(row)
    return rows
