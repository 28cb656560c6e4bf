"""The folder of a run: its files, a check before it is written to, and resuming from its newest checkpoint.

config.yaml         the resolved configuration, written before step 1
manifest.json       see training/manifest.py
trace.jsonl         see training/trace.py: only with --trace true
trackers.json       see training/trackers.py
metrics.jsonl       see training/metrics.py
topology.jsonl      see training/topology.py: only if masks or supports can move
checkpoints/        see io/checkpoint
diagnosis/          see training/diagnosis.py: only if an error stopped it
model/              the repaired model, a Hugging Face folder
delta.safetensors   the difference to the pruned model, see export/delta.py: only of SEFT
adapter/            of method lora: what was trained, as PEFT reads it
merged/             of method lora_merged, while it is pruned again
damaged-*           what could not be read when the run went on
run.lock            see training/writer_lock.py: while a process writes here
slurm/              what each attempt of a batch job ran, see slurm/common.sh: may be there before the run
layers.json         counts of every target after the last step, see training/topology.py
result.json         written last: the run is finished
"""

import contextlib
import dataclasses
import datetime
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from typing_extensions import NotRequired, TypedDict

from seft_dist.baselines.lora import ADAPTER
from seft_dist.baselines.repruning import MERGED
from seft_dist.config import TrainConfig
from seft_dist.config.pattern import AUTO
from seft_dist.data.batches import BatchStream
from seft_dist.data.chat_template import uses_date
from seft_dist.files.kinds import Within, check_kind
from seft_dist.files.writing import PART, put_aside, write_text
from seft_dist.io import checkpoint
from seft_dist.io.library_types import PreTrainedTokenizerBase
from seft_dist.results.run_files import has_result
from seft_dist.session.agreement import broadcast_object, on_all_ranks
from seft_dist.session.cli import to_dict, to_yaml
from seft_dist.session.distributed import Ranks
from seft_dist.training import manifest, metrics, topology, trace, trackers
from seft_dist.training.method import Method
from seft_dist.training.progress import print_line
from seft_dist.training.writer_lock import LOCK

RESULT, CONFIG, MODEL, DELTA, CHECKPOINTS = "result.json", "config.yaml", "model", "delta.safetensors", "checkpoints"
SLURM = "slurm"
_ROUNDING = 1e-9
"""Part of a step by which a product of floats may miss a whole number of steps."""
_FOLDERS = (SLURM, CHECKPOINTS, MODEL, ADAPTER, MERGED)
_FILES = (RESULT, CONFIG, DELTA, metrics.FILE, trace.FILE, manifest.FILE, trackers.FILE, topology.FILE, topology.LAYERS)


def is_finished(folder: Path) -> bool:
    """Return whether a folder holds a run's result; an empty or damaged file is none."""
    return has_result(folder / RESULT)


def check_run_folder(config: TrainConfig) -> None:
    """Refuse a folder that this run must not write to. On rank 0.

    Raises:
        ValueError: It holds a finished run, or something else, or a file where the run needs a folder.
    """
    folder = Path(config.output)
    if is_finished(folder):
        raise ValueError(f"{folder} holds a finished run: choose another output, or remove the folder")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output={folder} is a file: needs a folder")
    if not (folder / CONFIG).exists():
        others = [path.name for path in folder.iterdir() if not _left_by_a_start(path)] if folder.is_dir() else []
        if others:
            raise ValueError(
                f"{folder} is not empty and holds no run: choose another output (found {', '.join(sorted(others)[:3])})"
            )
    # Found now, since only the end of the run would run into it.
    for name in (*_FOLDERS, *_FILES):
        path = folder / name
        wrong = path.exists() and path.is_dir() != (name in _FOLDERS)
        if wrong or (name == MODEL and path.is_symlink()):
            present = "a link" if path.is_symlink() else "a folder" if path.is_dir() else "a file"
            needed = "a folder" if name in _FOLDERS else "a file"
            raise ValueError(f"{path} is {present}: the run writes {needed} there; remove it, or choose another output")


def _left_by_a_start(path: Path) -> bool:
    """Return whether a path may exist before config.yaml: a batch script's record, or a killed start's file."""
    if path.name == CHECKPOINTS:
        return path.is_dir() and not any(path.iterdir())
    return path.name in (SLURM, LOCK, CONFIG + PART)


def open_run_folder(config: TrainConfig) -> None:
    """Save the configuration in the run's folder, and remove what a killed attempt has left. On rank 0.

    Raises:
        ValueError: It cannot be written.
    """
    folder = Path(config.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / CONFIG, to_yaml(config))  # first, since this file marks the folder as a run's
        (folder / CHECKPOINTS).mkdir(exist_ok=True)
        if (folder / RESULT).exists():
            print_line(
                f"{folder / RESULT} cannot be read: it is now {put_aside(folder / RESULT).name}, and the run goes on"
            )
    except OSError as error:
        raise ValueError(f"output={folder} cannot be written: {error}") from error
    checkpoint.tidy(folder / CHECKPOINTS, config.keep)
    for name in (MODEL, ADAPTER, MERGED):  # left by an attempt that was stopped while it exported
        shutil.rmtree(folder / name, ignore_errors=True)


def fill_in_global_batch(config: TrainConfig, world_size: int) -> TrainConfig:
    """Fill in the global batch: that of the run that is resumed, else batch_size for each rank.

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
            global_batch = _check_extra(path, checkpoint.read_manifest(path)["extra"])["origin"]["global_batch"]
            break
        except ValueError:  # resume() reports what is wrong with it
            continue
    return dataclasses.replace(config, global_batch=global_batch)


def fill_in_date(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, ranks: Ranks) -> TrainConfig:
    """Fill in the day that a chat template sees as today, for training and evaluations, if it uses it. Collective.

    It is that of the run that is resumed, else this day; so a run has the same tokens on every day.

    Args:
        config: The run.
        tokenizer: The model's.
        ranks: This process.

    Returns:
        The configuration with a day for ``data.date`` and ``eval.data.date``, or as it was if the template does not
        write the date.
    """
    if not uses_date(tokenizer):
        return config
    # Rank 0 decides: two ranks may start before and after midnight.
    day = config.data.date or broadcast_object(ranks, _day_of(config) if ranks.is_main else "")
    text = config.eval.data
    if text is not None and text.date is None:
        config = dataclasses.replace(
            config, eval=dataclasses.replace(config.eval, data=dataclasses.replace(text, date=day))
        )
    return dataclasses.replace(config, data=dataclasses.replace(config.data, date=day))


def fill_in_steps(config: TrainConfig, data: BatchStream) -> TrainConfig:
    """Turn epochs into optimizer steps. The last one may take sequences of the next pass over the data.

    Args:
        config: The run.
        data: Its batches.

    Returns:
        The configuration with a number for ``steps``, and no ``epochs``.

    Raises:
        ValueError: That many steps do not fit the method's schedule.
    """
    if config.epochs is None:
        return dataclasses.replace(config, steps=config.total_steps)
    steps = max(1, math.ceil(config.epochs * data.num_sequences / data.global_batch - _ROUNDING))
    return dataclasses.replace(config, steps=steps, epochs=None)


def _day_of(config: TrainConfig) -> str:
    for earlier in _earlier_configs(config):
        day = earlier.get("data", {}).get("date")
        if isinstance(day, str):
            return day
    return datetime.date.today().isoformat()


def fill_in_pattern(config: TrainConfig) -> TrainConfig:
    """Let a run that is resumed go on as it began, if it does not say whether the model has an N:M pattern.

    Args:
        config: The run.
    """
    if config.seft.pattern != AUTO:
        return config
    for earlier in _earlier_configs(config):
        pattern = earlier.get("seft", {}).get("pattern", AUTO)
        if pattern is None or isinstance(pattern, str):
            return dataclasses.replace(config, seft=dataclasses.replace(config.seft, pattern=pattern))
    return config


def _earlier_configs(config: TrainConfig) -> Iterator[dict[str, Any]]:
    """Yield the configurations of a run's checkpoints, the newest first."""
    for path in reversed(checkpoint.complete(Path(config.output) / CHECKPOINTS)):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # resume() reports what is wrong with it
            content = checkpoint.read_manifest(path)["extra"]["config"]
            if isinstance(content, dict) and all(isinstance(content.get(key), dict) for key in ("data", "seft")):
                yield content


@dataclass(frozen=True, kw_only=True)
class RunOrigin:
    """Fingerprints of a run's model and data: with others, its steps would be those of another run."""

    model: str
    """Fingerprint that ``model_fingerprint`` gives."""
    data: str
    """Fingerprint that ``data_fingerprint`` gives."""
    sequences: int
    global_batch: int
    seed: int
    """Seed of the data order."""
    teacher: str | None = None
    """Fingerprint of the teacher's weights; None: there is none."""
    parent: str | None = None
    """Fingerprint of the model from which pruned weights come back; None: there is none."""


def checkpoint_extra(config: TrainConfig, origin: RunOrigin, state: dict[str, Any]) -> dict[str, Any]:
    """Make the part of a checkpoint that is not the optimizer's.

    Args:
        config: The run.
        origin: Fingerprints to compare when the run is resumed.
        state: State of the caller that ``resume`` is to return; JSON.
    """
    return {"state": state, "origin": dataclasses.asdict(origin), "config": to_dict(config)}


def resume(config: TrainConfig, ranks: Ranks, method: Method, origin: RunOrigin) -> dict[str, Any] | None:
    """Resume from the newest checkpoint that is whole, if there is one. Collective.

    A damaged checkpoint is named, put aside as ``damaged-*``, and the one before it is taken.

    Args:
        config: The run.
        ranks: This process.
        method: A new method; it takes over the state of the checkpoint.
        origin: Fingerprints of its model and data.

    Returns:
        The state given to ``checkpoint_extra``; None for a new run.

    Raises:
        ValueError: The checkpoint does not fit the model or the method, the data would come in another order, more
            steps are done than there are to be, or all checkpoints are damaged.
    """
    folder = Path(config.output) / CHECKPOINTS
    checkpoints = on_all_ranks(ranks, lambda: checkpoint.complete(folder))
    for path in reversed(checkpoints):
        try:
            extra = _check_extra(path, method.load(path))
        except checkpoint.DamagedError as error:
            problem = str(error)
            on_all_ranks(ranks, lambda: _put_aside(path, problem) if ranks.is_main else None)  # noqa: B023
            continue
        _check_origin(path, dict(extra["origin"]), dataclasses.asdict(origin))
        if method.num_steps > config.total_steps:
            raise ValueError(
                f"{path} has done {method.num_steps} steps, more than steps={config.total_steps}: raise steps, or "
                "choose another output"
            )
        return extra["state"]
    on_all_ranks(ranks, lambda: _check_new(folder))
    return None


def _check_new(folder: Path) -> None:
    """Refuse to begin anew where all checkpoints are damaged, also at a later attempt."""
    damaged = sorted(path.name for path in folder.glob("damaged-*"))
    if damaged:
        raise ValueError(
            f"all checkpoints in {folder} are damaged ({', '.join(damaged)}): restore one from a backup as step-*, or "
            "remove the run's folder to begin anew"
        )


def _put_aside(path: Path, problem: str) -> None:
    print_line(f"{problem}\nput aside as {put_aside(path)}; going on from the checkpoint before it")


class _RunOrigin(TypedDict):
    model: str
    data: str
    sequences: int
    global_batch: Annotated[int, Within(1)]
    seed: int
    teacher: NotRequired[str | None]  # checkpoints of earlier versions had no teacher,
    parent: NotRequired[str | None]  # and no parent


class _Extra(TypedDict):
    origin: _RunOrigin
    state: dict[str, Any]


def _check_extra(path: Path, extra: dict[str, Any]) -> _Extra:
    """Check the part of a checkpoint that ``checkpoint_extra`` made."""
    if "origin" not in extra:
        raise ValueError(
            f"{path} does not say from which model and data it was made: seft train goes on only from checkpoints "
            "of its own, of this version; choose another output"
        )
    return check_kind(extra, _Extra, f"extra of {path}")


def _check_origin(path: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    if then["model"] != now["model"]:
        raise ValueError(
            f"{path} was made from another base model: its targets are those of this one, but other weights or "
            "settings in config.json differ; load the pruned model it began with, or choose another output"
        )
    for kind, option in (("teacher", "teacher.path"), ("parent", "parent")):
        if then.get(kind) != now[kind]:
            raise ValueError(
                f"{path} was made with {_describe(kind, then.get(kind))}, this run has {_describe(kind, now[kind])}: "
                f"use {option} as before, or choose another output"
            )
    data = [key for key in now if key not in ("model", "teacher", "parent")]
    other = [f"{key} is {now[key]}, was {then[key]}" for key in data if now[key] != then[key]]
    if other:
        raise ValueError(
            f"{path} cannot go on with this data: {'; '.join(other)}. Sequences would be skipped or seen twice; use "
            "the same data, seed and global_batch as before (any number of ranks will do), or another output"
        )


def _describe(kind: str, fingerprint: str | None) -> str:
    return f"no {kind}" if fingerprint is None else f"a {kind} of fingerprint {fingerprint}"
