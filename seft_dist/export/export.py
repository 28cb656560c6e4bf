"""Export of a model as a plain or packed Hugging Face folder, one weight at a time, and loading of a packed one.

Every folder is written under a temporary name and renamed when it is complete.
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
from seft_dist.io.packed import PackedFiles, PackedSize, PackedWriter
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
        full: Function that returns the whole value of a parameter on every rank (``seft.backend.full``); it may be
            collective.
        output: Folder to create; it must not exist.
        source: The pruned model that training started from.
        writes: True on the one rank that writes.
        tokenizer: Folder whose tokenizer files are copied; None: the source's.
        delta: Path of a delta file against the source, which is written too; None: no such file.
        targets: Names of the targets, which may have changed; all other weights are copied from the source's files.
            None: every weight comes from the model.
        finish: Function that adds further files to the folder before it gets its final name; called on the rank that
            writes.
    """
    state = named_state(model)
    names = {known for name in targets or () for known in (name, f"{name}.weight")}
    # Only these are gathered. All other weights are still those of the files, and are copied from there, bit for bit.
    gathered = {name for name in state if targets is None or name in names or source.weights.find(name) is None}
    if not writes:  # takes part in the collectives, in the same order as the rank that writes
        for name in state:
            if name in gathered:
                full(state[name])
        return
    changes = DeltaWriter(source.dtype, name_of(source)) if delta is not None else None
    with new_folder(output) as folder:
        writer, checks = WeightsWriter(folder), ExportChecks()
        for name, value in state.items():
            if name not in gathered:
                for stored in source.weights.stored_names(name):
                    writer.add(stored, checks.add(stored, *source.read_for_export(stored, source.dtype)))
                continue
            for stored, part in source.weights.split(name, unsigned_zeros(full(value).cpu())):
                writer.add(stored, checks.add(stored, part))
                if changes is not None and name in names:
                    base, _ = cast_weight(source.weights.read(stored), part.dtype)
                    changes.add(stored, base.view(part.shape), part)
        checks.report(output)
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
    """Write a model on disk, plain or packed, as a plain Hugging Face folder, in which zeros are stored.

    Args:
        source: The model.
        output: Folder to create; it must not exist.
        dtype: Dtype of its floating-point weights; None: as stored.
        max_bytes: Size beyond which a file does not grow: the next tensor begins a new one.
        finish: Function that adds further files to the folder before it gets its final name.

    Raises:
        ValueError: The folder exists, or a weight is damaged. No files are left behind.
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
        output: Folder to create; it must not exist.
        dtype: Dtype of its floating-point weights; None: as stored, bit for bit.
        max_bytes: Size beyond which a file does not grow: the next tensor begins a new one.
        finish: Function that adds further files to the folder before it gets its final name.

    Returns:
        Sizes before and after packing.

    Raises:
        ValueError: The folder exists, or a weight is damaged. No files are left behind.
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
    """Load a packed folder into a transformers model, one tensor at a time.

    The peak memory is that of the model and its largest tensor.

    Args:
        folder: Folder written by ``pack_model``.
        dtype: Dtype of the weights; "auto": as stored.
        device: Device of the model; None: the CPU.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: The folder is not packed, or is damaged.
    """
    source = open_source(ModelConfig(path=str(folder), dtype=dtype))
    if not isinstance(source.weights, PackedFiles):
        raise ValueError(f"{folder} is not packed: load it with transformers, or pack it with seft export pack")
    cache = source.config.use_cache
    model = load_model(source, device=device).eval()
    model.config.use_cache = cache
    return model


def _copy(source: Source, writer: WeightsWriter | PackedWriter, dtype: torch.dtype | None, output: Path) -> None:
    checks = ExportChecks()
    for name in source.weights.tensors:
        writer.add(name, checks.add(name, *source.read_for_export(name, dtype)))
    checks.report(output)


class ExportChecks:
    """Inspects the tensors of an export while they are written, and warns about those that look wrong."""

    def __init__(self) -> None:
        self._num_lifted = self._num_matrices = 0
        self._all_zero: list[str] = []

    def add(self, name: str, tensor: Tensor, num_lifted: int = 0) -> Tensor:
        """Inspect one tensor.

        Args:
            name: Name of the tensor.
            tensor: The tensor as it is written.
            num_lifted: Number of its weights that were too small for the dtype, and were set to its smallest number.

        Returns:
            The tensor itself.
        """
        self._num_lifted += num_lifted
        if tensor.dim() > 1 and tensor.is_floating_point():
            self._num_matrices += 1
            if not bool(tensor.any()):
                self._all_zero.append(name)
        return tensor

    def report(self, output: Path) -> None:
        """Log the warnings.

        Args:
            output: The exported folder, for the messages.
        """
        if self._num_lifted:
            log.warning(
                "%s: %d weights are too small for the type asked for; they are kept at its smallest number, not at 0",
                output,
                self._num_lifted,
            )
        if self._all_zero:
            log.warning(
                "%s: %d of %d matrices are all 0, %s first: the model was pruned away, or its weights were never "
                "filled",
                output,
                len(self._all_zero),
                self._num_matrices,
                self._all_zero[0],
            )
