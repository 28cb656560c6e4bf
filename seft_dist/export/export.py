"""From a model to files: a plain Hugging Face folder, or the packed one, a weight at a time; and back.

Everything is written to a temporary place that is renamed when it is complete.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from seft_dist.config import DType, ModelConfig
from seft_dist.export.delta import DeltaWriter, apply_delta, name_of
from seft_dist.export.folders import new_folder, save_settings
from seft_dist.io.library_types import PreTrainedModel
from seft_dist.io.models import load_model, named_state
from seft_dist.io.packed import PackedSize, PackedWeights, PackedWriter
from seft_dist.io.source import Source, open_source
from seft_dist.io.weights import MAX_SHARD_BYTES, WeightsWriter
from seft_dist.sparsity.casts import cast_weight, unsigned_zeros

log = logging.getLogger(__name__)

__all__ = ["DeltaWriter", "apply_delta", "export_model", "load_packed", "pack_model", "write_model"]

Finish = Callable[[Path], None]


def export_model(
    model: PreTrainedModel,
    full: Callable[[Tensor], Tensor],
    output: Path,
    source: Source,
    *,
    writes: bool,
    tokenizer: Path | None = None,
    delta: Path | None = None,
    targets: list[str] | None = None,
    finish: Finish | None = None,
) -> None:
    """Write a model, sharded or not, as a Hugging Face folder, gathering one weight at a time. Collective.

    Args:
        model: The model, without wrappers.
        full: Gives the whole value of a parameter on every rank (``seft.backend.full``).
        output: Folder to make; it must not exist.
        source: The pruned model that training started from.
        writes: True on the one rank that writes.
        tokenizer: Folder whose tokenizer files are copied; None: the source's.
        delta: Also write this delta file against the source.
        targets: Names of the targets, which may have changed; all other weights are copied from the source's files. None:
            every weight comes from the model.
        finish: Adds to the folder what else belongs in it, before it takes its name; called on the rank that writes.
    """
    state = named_state(model)
    names = {known for name in targets or () for known in (name, f"{name}.weight")}
    # All else is as it was in the files, and is copied from there, bit for bit
    asked = {name for name in state if targets is None or name in names or source.weights.find(name) is None}
    if not writes:
        for name in state:
            if name in asked:
                full(state[name])
        return
    changes = DeltaWriter(source.dtype, name_of(source)) if delta is not None else None
    with new_folder(output) as folder:
        writer, seen = WeightsWriter(folder), Written()
        for name, value in state.items():
            if name not in asked:
                for stored in source.weights.stored_names(name):
                    writer.add(stored, seen.add(stored, *source.written(stored, source.dtype)))
                continue
            for stored, part in source.weights.split(name, unsigned_zeros(full(value).cpu())):
                writer.add(stored, seen.add(stored, part))
                if changes is not None and name in names:
                    base, _ = cast_weight(source.weights.read(stored), part.dtype)
                    changes.add(stored, base.view(part.shape), part)
        seen.report(output)
        writer.close()
        save_settings(folder, source, source.dtype, tokenizer)
        if finish is not None:
            finish(folder)
    if changes is not None and delta is not None:
        changes.close(delta)


def write_model(
    source: Source,
    output: Path,
    dtype: torch.dtype | None = None,
    max_bytes: int = MAX_SHARD_BYTES,
    finish: Finish | None = None,
) -> None:
    """Write a model on disk, plain or packed, as a plain Hugging Face folder, zeros stored.

    Args:
        source: The model.
        output: Folder to make; it must not exist.
        dtype: Type of its floating weights; None: as they are.
        max_bytes: Start a new file before one would grow beyond this.
        finish: Adds to the folder what else belongs in it, before it takes its name.

    Raises:
        ValueError: The folder exists, or a weight is damaged; nothing is left behind.
    """
    with new_folder(output) as folder:
        writer = WeightsWriter(folder, max_bytes)
        _copy(source, writer, dtype, output)
        writer.close()
        save_settings(folder, source, dtype)
        if finish is not None:
            finish(folder)


def pack_model(
    source: Source,
    output: Path,
    dtype: torch.dtype | None = None,
    max_bytes: int = MAX_SHARD_BYTES,
    finish: Finish | None = None,
) -> PackedSize:
    """Write a model on disk as a packed folder (io/packed.py).

    Args:
        source: The model.
        output: Folder to make; it must not exist.
        dtype: Type of its floating weights; None: as they are, every bit.
        max_bytes: Start a new file before one would grow beyond this.
        finish: Adds to the folder what else belongs in it, before it takes its name.

    Returns:
        The sizes.

    Raises:
        ValueError: The folder exists, or a weight is damaged; nothing is left behind.
    """
    with new_folder(output) as folder:
        writer = PackedWriter(folder, max_bytes)
        _copy(source, writer, dtype, output)
        size = writer.close()
        save_settings(folder, source, dtype)
        if finish is not None:
            finish(folder)
    return size


def load_packed(folder: Path, dtype: DType = "auto", device: torch.device | None = None) -> PreTrainedModel:
    """Load a packed folder into a transformers model, a tensor at a time.

    Memory: the model and the largest tensor once more.

    Args:
        folder: From ``pack_model``.
        dtype: Type of the weights; "auto": as stored.
        device: Where the model is; None: CPU.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: Not a packed folder, or a damaged one.
    """
    source = open_source(ModelConfig(path=str(folder), dtype=dtype))
    if not isinstance(source.weights, PackedWeights):
        raise ValueError(f"{folder} is not packed: load it with transformers, or pack it with launch/export.py pack")
    cache = source.config.use_cache
    model = load_model(source, device=device).eval()
    model.config.use_cache = cache
    return model


def _copy(source: Source, writer: WeightsWriter | PackedWriter, dtype: torch.dtype | None, output: Path) -> None:
    seen = Written()
    for name in source.weights.tensors:
        writer.add(name, seen.add(name, *source.written(name, dtype)))
    seen.report(output)


class Written:
    """Counts, in the weights that were written, that a user is warned of."""

    def __init__(self) -> None:
        self._small = self._matrices = 0
        self._empty: list[str] = []

    def add(self, name: str, tensor: Tensor, small: int = 0) -> Tensor:
        """Look at one tensor, of which so many weights were too small for its type; returns it."""
        self._small += small
        if tensor.dim() > 1 and tensor.is_floating_point():
            self._matrices += 1
            if not bool(tensor.any()):
                self._empty.append(name)
        return tensor

    def report(self, output: Path) -> None:
        """Log warnings."""
        if self._small:
            log.warning(
                "%s: %d weights are too small for the type asked for; they are kept at its smallest number, not at 0",
                output,
                self._small,
            )
        if self._empty:
            log.warning(
                "%s: %d of %d matrices are all 0, %s first: the model was pruned away, or its weights were never filled",
                output,
                len(self._empty),
                self._matrices,
                self._empty[0],
            )
