"""Checkpoints of comparison methods: folders as io/checkpoint writes them, with other tensors.

    NAME.values, .exp_avg, .exp_avg_sq    fp32 [n], of a trained parameter's part that the rank held
    NAME.start                            int64 [1], flat position of its first value in the whole parameter

Parameters that every rank holds whole are in the first rank's file only. ``method`` in checkpoint.json says which
method it is, by ``name``, and what it was set to. Any number of ranks can go on.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seft_dist.baselines.trained import MOMENTS, ParameterPart
from seft_dist.io.checkpoint import BackgroundSaver, DamagedError, describe_targets, open_checkpoint
from seft_dist.io.checkpoint.files import io_on_all_ranks, rank_file
from seft_dist.io.checkpoint.schema import CheckpointManifest
from seft_dist.io.weight_files import SafetensorError, safe_open

if TYPE_CHECKING:
    from seft_dist.baselines.baseline import Baseline

_KEYS = ("values", *MOMENTS)


class BaselineSaver(BackgroundSaver):
    """Writes the trainable parameters of a comparison method."""

    def __init__(self, method: "Baseline", folder: Path, keep: int) -> None:
        """Args:
        method: Attached when the first save begins.
        folder: Holds the checkpoints of a run.
        keep: Number of checkpoints to keep.
        """
        super().__init__(method, folder, keep)
        self._method = method

    def content(self) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
        method, tensors = self._method, {}
        for part in method.trained.parts:
            if part.is_sharded or method.backend.owners.rank == 0:
                tensors[f"{part.name}.start"] = torch.tensor([part.start])
                for key, value in method.trained.state(part).items():
                    tensors[f"{part.name}.{key}"] = value.detach().to("cpu", copy=True)
        targets = describe_targets(method.backend, method.active_counts, method.fingerprints)
        return {"method": settings_of(method), "window_steps": None, "targets": targets}, tensors


def settings_of(method: "Baseline") -> dict[str, Any]:
    """Collect the settings that a resumed run must share with the run before."""
    return {"name": method.name} | {key: getattr(method.config.baseline, key) for key in method.config_fields}


def load(method: "Baseline", checkpoint: Path) -> dict[str, Any]:
    """Go on from a checkpoint. Collective.

    Args:
        method: A new method without a step done, on the model that the run began with.
        checkpoint: Folder that a ``BaselineSaver`` has written.

    Returns:
        The ``extra`` that the caller gave when the checkpoint was saved.

    Raises:
        DamagedError: A file is missing, cut or altered; nothing was changed.
        ValueError: It is of another model, method or format.
    """
    method.attach()
    backend = method.backend
    manifest = open_checkpoint(
        checkpoint, backend, method.fingerprints, lambda manifest: _check_method(method, manifest, checkpoint)
    )
    states: list[dict[str, Tensor]] = []

    def read() -> None:
        try:
            files = [
                safe_open(checkpoint / rank_file(rank, manifest["world_size"]), framework="pt")
                for rank in range(manifest["world_size"])
            ]
            states.extend(_assemble(part, files) for part in method.trained.parts)
        except (ValueError, SafetensorError) as error:
            raise DamagedError(f"{checkpoint} is damaged: {error}; use an older checkpoint") from error

    io_on_all_ranks(backend, read)
    with backend.writing():
        for part, state in zip(method.trained.parts, states, strict=True):
            method.trained.restore(part, state, manifest["num_steps"])
        method.trained.publish()
    method.num_steps = manifest["num_steps"]
    return manifest["extra"]


def _check_method(method: "Baseline", manifest: CheckpointManifest, checkpoint: Path) -> None:
    ours, theirs = json.loads(json.dumps(settings_of(method))), manifest["method"]
    if "name" not in theirs:
        theirs = {"name": "seft"}
    changed = [f"{key} is {ours[key]}, was {theirs.get(key)}" for key in ours if ours[key] != theirs.get(key)]
    if changed:
        raise ValueError(
            f"{checkpoint} was made with another method: {'; '.join(changed)}; use the same settings, or another output"
        )


def _assemble(part: ParameterPart, files: list[Any]) -> dict[str, Tensor]:
    """Put a part's values and moments together from the files of the ranks that wrote them."""
    length = part.values.numel()
    whole = {key: torch.full((length,), torch.nan) for key in _KEYS}
    for file in files:
        names = set(file.keys())
        if f"{part.name}.start" not in names:
            continue
        start = int(file.get_tensor(f"{part.name}.start"))
        for key, values in whole.items():
            if f"{part.name}.{key}" not in names:
                raise ValueError(f"{part.name}.{key} is missing; needs it")
            given = file.get_tensor(f"{part.name}.{key}")
            if given.dtype != torch.float32 or given.dim() != 1 or start < 0 or start + len(given) > part.numel:
                raise ValueError(
                    f"{part.name}.{key} is {given.dtype} {list(given.shape)} from {start} on; needs fp32 values of the "
                    f"{part.numel} that there are"
                )
            begin, end = max(start, part.start), min(start + len(given), part.start + length)
            if begin < end:
                values[begin - part.start : end - part.start] = given[begin - start : end - start]
    for key, values in whole.items():
        if not values.isfinite().all() or (key == "exp_avg_sq" and bool((values < 0).any())):
            raise ValueError(f"{part.name}.{key} is not whole: values are missing, not finite, or squares below 0")
    return whole
