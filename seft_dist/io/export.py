"""From the trained model to files: a plain Hugging Face folder, and the small delta file that turns the pruned into it.

A delta file holds, for each target weight that changed (positions count in the flattened weight):

    NAME.changed      NAME.changed_values       was and is not 0
    NAME.reactivated  NAME.reactivated_values   was 0, is not: joined the mask
    NAME.pruned                                 was not 0, is: left the mask

Both are written one weight at a time, to a temporary place that is renamed when it is complete.
"""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from seft_dist.io.models import TOKENIZER_FILES, Source, named_state
from seft_dist.io.weights import Weights, WeightsWriter, write_safetensors

FORMAT = "seft_dist delta 1"
_INT_OF_SIZE = {2: torch.int16, 4: torch.int32}


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
) -> None:
    """Write a model, sharded or not, as a Hugging Face folder, gathering one weight at a time. **Collective.**

    Args:
        model: The model, without wrappers.
        full: Gives the whole value of a parameter on every rank (``seft.backend.full``).
        output: Folder to make; it must not exist.
        source: The pruned model that training started from.
        writes: True on the one rank that writes.
        tokenizer: Folder whose tokenizer files are copied; None: the source's.
        delta: Also write this delta file against the source.
        targets: Module names of the weights that training may have changed; needed for a delta file.
    """
    state = named_state(model)
    if not writes:
        for value in state.values():
            full(value)
        return
    names = {f"{name}.weight" for name in targets or ()}
    changes = DeltaWriter(source.dtype) if delta is not None else None
    with _new_folder(output) as folder:
        writer = WeightsWriter(folder)
        for name, value in state.items():
            whole = full(value).cpu()
            writer.add(name, whole)
            if changes is not None and name in names:
                changes.add(name, source.weights.read(name).to(source.dtype).view(whole.shape), whole)
        writer.close()
        _save_settings(folder, source, source.dtype, tokenizer or source.folder)
    if changes is not None and delta is not None:
        changes.close(delta)


class DeltaWriter:
    """Collects what changed, weight by weight, into one delta file. Local, on one rank."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Args:
        dtype: Type of the repaired weights; the pruned ones are cast to it before anything is compared.
        """
        self._metadata = {"format": FORMAT, "dtype": str(dtype)}
        self._tensors: dict[str, Tensor] = {}
        self._print = _Fingerprint()
        self._names: list[str] = []

    def add(self, name: str, base: Tensor, repaired: Tensor) -> None:
        """Compare one weight, bit for bit.

        Args:
            name: Its key in the Hugging Face folder.
            base: The pruned weight, any shape, in the repaired weight's dtype.
            repaired: The repaired weight, same shape and dtype.
        """
        assert base.shape == repaired.shape and base.dtype == repaired.dtype, name
        self._print.add(name, base)
        self._names.append(name)
        base, repaired = base.reshape(-1), repaired.reshape(-1)
        bits = _INT_OF_SIZE[base.element_size()]
        positions = (base.view(bits) != repaired.view(bits)).nonzero().view(-1)
        before, after = base[positions], repaired[positions]
        # A zero that only changes its sign stays "changed": the bits must come back, the mask did not move.
        pruned = (before != 0) & (after.view(bits) == 0)
        reactivated = (before == 0) & (after != 0)
        changed = ~(pruned | reactivated)
        small = torch.int32 if base.numel() < 2**31 else torch.int64
        for kind, chosen in (("changed", changed), ("reactivated", reactivated), ("pruned", pruned)):
            if chosen.any():
                self._tensors[f"{name}.{kind}"] = positions[chosen].to(small)
                if kind != "pruned":
                    self._tensors[f"{name}.{kind}_values"] = after[chosen]

    def close(self, path: Path) -> None:
        """Write the file; one that exists is replaced."""
        metadata = {**self._metadata, "base": self._print.hexdigest(), "targets": json.dumps(self._names)}
        part = path.with_name(path.name + ".part")
        write_safetensors(part, self._tensors, metadata)
        part.rename(path)


def apply_delta(source: Source, delta: Path, output: Path) -> None:
    """Make the repaired model from the pruned one and a delta file, bit for bit as it was trained. Local.

    Args:
        source: The pruned model.
        delta: File that training wrote.
        output: Folder to make; it must not exist.

    Raises:
        ValueError: Not a delta file, or one of another pruned model; nothing is left behind.
    """
    metadata, tensors = _read_delta(delta)
    targets: list[str] = json.loads(metadata["targets"])
    dtype = getattr(torch, metadata["dtype"].removeprefix("torch."))
    fingerprint = _Fingerprint()
    with _new_folder(output) as folder:
        _check_targets(source.weights, targets, delta)
        writer = WeightsWriter(folder)
        order = targets + sorted(source.weights.tensors.keys() - set(targets))
        for name in order:
            weight = _cast(source.weights, name, dtype)
            if name in targets:
                fingerprint.add(name, weight)
                _apply(weight, name, tensors)
            writer.add(name, weight)
        if fingerprint.hexdigest() != metadata["base"]:
            raise ValueError(
                f"{delta} belongs to another pruned model than {source.folder}: its target weights are not those that "
                "training started from; give the very folder that was model.path of the training"
            )
        writer.close()
        _save_settings(folder, source, dtype, source.folder)


class _Fingerprint:
    """A digest of weights by name, shape, type and bits."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, name: str, weight: Tensor) -> None:
        self._digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        self._digest.update(weight.contiguous().view(-1).view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _cast(weights: Weights, name: str, dtype: torch.dtype) -> Tensor:
    weight = weights.read(name).view(weights.tensors[name].shape)
    return weight.to(dtype) if weight.is_floating_point() else weight


def _apply(weight: Tensor, name: str, tensors: dict[str, Tensor]) -> None:
    flat = weight.view(-1)
    for kind in ("changed", "reactivated"):
        if f"{name}.{kind}" in tensors:
            flat[tensors[f"{name}.{kind}"].long()] = tensors[f"{name}.{kind}_values"]
    if f"{name}.pruned" in tensors:
        flat[tensors[f"{name}.pruned"].long()] = 0


def _read_delta(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as a delta file ({error}); needs delta.safetensors of a run"
        ) from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {metadata.get('format')!r}; needs {FORMAT!r}, as launch/train.py writes it"
        )
    return metadata, tensors


def _check_targets(weights: Weights, targets: list[str], delta: Path) -> None:
    absent = [name for name in targets if name not in weights.tensors]
    if absent:
        raise ValueError(
            f"{delta} changes {absent[0]}, which {weights.folder} does not have: give the model it was made from"
        )


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling that takes the final name at the end, or vanishes on an error."""
    if path.exists():
        raise ValueError(f"{path} exists already: choose another folder, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.with_name(path.name + ".part")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    folder.rename(path)


def _save_settings(folder: Path, source: Source, dtype: torch.dtype, tokenizer: Path) -> None:
    """Training changes weights only: everything else is as it was."""
    config = copy.deepcopy(source.config)
    config.dtype = dtype
    config.save_pretrained(folder)
    for origin, names in ((source.folder, ("generation_config.json",)), (tokenizer, TOKENIZER_FILES)):
        for name in names:
            if (origin / name).is_file():
                shutil.copyfile(origin / name, folder / name)
