"""The delta file: the difference between a pruned and a repaired model. It can be applied and removed, bit for bit.

For each tensor NAME that differs, the file holds ascending positions in the flattened tensor, in three kinds:

    NAME.changed      NAME.changed_xor       not 0 before and after
    NAME.reactivated  NAME.reactivated_xor   0 before, not 0 after: it joined the mask
    NAME.pruned       NAME.pruned_xor        not 0 before, 0 after: it left the mask

The values are the bits before XOR the bits after, so the same operation applies and removes the delta. The header holds
fingerprints of both models, which tell whether the file fits a model. The format is described in docs/exports.md. Files
of version 1 are read too; they hold the values after, so they can only be applied.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from seft_dist.export.folders import check_path_is_new, new_folder, save_settings
from seft_dist.files.reading import parse_json
from seft_dist.files.writing import replacing
from seft_dist.io.source import Source
from seft_dist.io.weight_files import SafetensorError, safe_open, write_safetensors
from seft_dist.io.weights import WeightsWriter
from seft_dist.sparsity.casts import cast_weight, unsigned_zeros
from seft_dist.sparsity.partition import position_dtype

FORMAT = "seft_dist delta"
VERSION = 2
KINDS = ("changed", "reactivated", "pruned")
_BITS = {2: torch.int16, 4: torch.int32}
"""Integer type for the bits of a value, by the value's size in bytes."""
_DTYPES = {"torch.float32": torch.float32, "torch.bfloat16": torch.bfloat16, "torch.float16": torch.float16}


class DeltaWriter:
    """Collects the differences of a model, weight by weight, and writes the delta file. Used on one rank only."""

    def __init__(self, dtype: torch.dtype, base_name: str = "") -> None:
        """Args:
        dtype: Dtype of the repaired weights; pruned ones are cast to it before they are compared.
        base_name: Name of the pruned model, which is only shown to users.
        """
        self._metadata = {"format": f"{FORMAT} {VERSION}", "dtype": str(dtype), "base_name": base_name}
        self._tensors: dict[str, Tensor] = {}
        self._before, self._after = Fingerprint(), Fingerprint()
        self._names: list[str] = []

    def add(self, name: str, base: Tensor, repaired: Tensor) -> None:
        """Compare one weight, bit for bit, and keep the difference.

        Args:
            name: Name of the weight in the Hugging Face folder.
            base: The pruned weight, of any shape, in the dtype of the repaired one.
            repaired: The repaired weight, of the same shape and dtype.
        """
        assert base.shape == repaired.shape and base.dtype == repaired.dtype, name
        base, repaired = unsigned_zeros(base), unsigned_zeros(repaired)
        self._before.add(name, base)
        self._after.add(name, repaired)
        self._names.append(name)
        base, repaired = base.reshape(-1), repaired.reshape(-1)
        bits = _BITS[base.element_size()]
        xor = base.view(bits) ^ repaired.view(bits)
        positions = xor.nonzero().view(-1)
        before, after, xor = base[positions], repaired[positions], xor[positions]
        pruned = (before != 0) & (after == 0)
        reactivated = (before == 0) & (after != 0)
        for kind, chosen in zip(KINDS, (~(pruned | reactivated), reactivated, pruned), strict=True):
            if chosen.any():
                self._tensors[f"{name}.{kind}"] = positions[chosen].to(position_dtype(base.numel()))
                self._tensors[f"{name}.{kind}_xor"] = xor[chosen]

    def close(self, path: Path) -> None:
        """Write the file; one that exists is replaced."""
        fingerprints = {"base": self._before.hexdigest(), "repaired": self._after.hexdigest()}
        metadata = {**self._metadata, **fingerprints, "targets": json.dumps(self._names)}
        with replacing(path) as part:
            write_safetensors(part, self._tensors, metadata)


class Fingerprint:
    """A digest of weights, over their names, shapes, dtypes and bits."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, name: str, weight: Tensor) -> None:
        """Add one whole weight, on the CPU."""
        self._digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        self._digest.update(weight.contiguous().view(-1).view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        """Return the SHA-256 of everything that was added."""
        return self._digest.hexdigest()


@dataclass(frozen=True)
class Delta:
    """The content of a delta file, read and checked."""

    path: Path
    version: int
    dtype: torch.dtype
    """Dtype of the repaired weights."""
    base: str
    """Fingerprint of the pruned model's targets, in this dtype."""
    repaired: str
    """Fingerprint of the repaired model's targets; empty in version 1."""
    base_name: str
    """Name that the pruned model had where the file was made."""
    targets: list[str]
    """Tensors that were compared, including those without a difference."""
    tensors: dict[str, Tensor]
    """Tensors of the file by name."""

    def count(self, name: str, kind: str) -> int:
        """Number of entries of one kind in one tensor."""
        positions = self.tensors.get(f"{name}.{kind}")
        return 0 if positions is None else positions.numel()

    def change(self, name: str, weight: Tensor) -> None:
        """Turn a pruned weight into the repaired one or, with version 2, the repaired into the pruned one; in place.

        Args:
            name: Name of a target.
            weight: Contiguous weight of ``dtype``.

        Raises:
            ValueError: A position is outside the weight.
        """
        flat = weight.view(-1)
        bits = flat.view(_BITS[flat.element_size()])
        for kind in KINDS:
            positions = self.tensors.get(f"{name}.{kind}")
            if positions is None:
                continue
            if int(positions[0]) < 0 or int(positions[-1]) >= flat.numel():
                raise ValueError(
                    f"{self.path}: {name}.{kind} has a position outside the {flat.numel()} weights: not made for this "
                    "model, or damaged"
                )
            where = positions.long()
            if self.version > 1:
                bits[where] ^= self.tensors[f"{name}.{kind}_xor"]
            else:
                flat[where] = self.tensors[f"{name}.{kind}_values"] if kind != "pruned" else 0


def apply_delta(source: Source, delta: Path, output: Path) -> None:
    """Write the repaired model, made from the pruned one and a delta file, with the same bits as after training.

    Args:
        source: The pruned model.
        delta: The delta file that training wrote.
        output: Folder to create; it must not exist.

    Raises:
        ValueError: The file is not a delta file, is damaged, or was made from another pruned model. No files are left
            behind.
    """
    content = read_delta(delta)
    advice = "give the very model that training began with"
    _convert(source, content, output, content.base, content.repaired, "pruned", advice)


def remove_delta(source: Source, delta: Path, output: Path) -> None:
    """Write the pruned model, made from the repaired one and a delta file, with the same bits in the repaired dtype.

    Args:
        source: The repaired model.
        delta: The delta file that was applied.
        output: Folder to create; it must not exist.

    Raises:
        ValueError: The file is not a delta file, is of version 1, or does not belong to this repaired model. No files
            are left behind.
    """
    content = read_delta(delta)
    if content.version < 2:
        raise ValueError(f"{delta} is of version 1, which does not hold the pruned weights: it can only be applied")
    advice = "give the model that the file was applied to, unchanged"
    _convert(source, content, output, content.repaired, content.base, "repaired", advice)


def make_delta(base: Source, repaired: Source, output: Path, names: Sequence[str] | None = None) -> None:
    """Write the delta file between two models on disk.

    Args:
        base: The pruned model.
        repaired: The repaired model, whose dtype is used for both.
        output: The file to create; it must not exist.
        names: Tensors that may differ; None: all.

    Raises:
        ValueError: The models do not have the same tensors, or other tensors differ too; no file is written.
    """
    before, after = base.weights.tensors, repaired.weights.tensors
    check_path_is_new(output)
    for name in sorted(before.keys() | after.keys()):
        shapes = [tensors[name].shape if name in tensors else None for tensors in (before, after)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{name} has shape {shapes[0]} in {base.folder} and {shapes[1]} in {repaired.folder} (None: it is not "
                "there): needs two versions of one model"
            )
    output.parent.mkdir(parents=True, exist_ok=True)
    writer = DeltaWriter(repaired.dtype, name_of(base))
    for name in after:
        pair = [source.read_for_export(name, repaired.dtype)[0] for source in (base, repaired)]
        if all(tensor.dtype == repaired.dtype for tensor in pair) and (names is None or name in names):
            writer.add(name, pair[0], pair[1])
        elif pair[0].dtype != pair[1].dtype or not torch.equal(
            *(p.contiguous().view(-1).view(torch.uint8) for p in pair)
        ):
            raise ValueError(f"{name} differs between {base.folder} and {repaired.folder} too: a delta cannot hold it")
    writer.close(output)


def read_delta(path: Path) -> Delta:
    """Read a delta file, and check everything in it that can be checked without a model.

    Raises:
        ValueError: The file is not a delta file, is of a newer version, or its tensors do not fit together.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file: needs delta.safetensors of a run")
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as a delta file ({error}); needs delta.safetensors of a run"
        ) from error
    version = _version(metadata.get("format"), path)
    try:
        dtype = _DTYPES[metadata["dtype"]]
        targets = parse_json(metadata["targets"], list[str], "targets")
        fingerprints = (metadata["base"], metadata["repaired"] if version > 1 else "")
        if len(set(targets)) != len(targets):
            raise ValueError("targets names a tensor twice")
        _check_tensors(version, dtype, targets, tensors)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}; make or download it again") from error
    return Delta(path, version, dtype, *fingerprints, metadata.get("base_name", ""), targets, tensors)


def delta_table(delta: Delta) -> Table:
    """Tabulate the numbers of entries in a delta file, one row for each tensor."""
    table = Table(
        title=f"{delta.path.name}: version {delta.version}, {delta.dtype} on {delta.base_name or 'a model not named'}"
    )
    table.add_column("tensor")
    for column in ("entries", *KINDS):
        table.add_column(column, justify="right")
    total = [0] * (len(KINDS) + 1)
    for name in delta.targets:
        counts = [delta.count(name, kind) for kind in KINDS]
        counts.insert(0, sum(counts))
        total = [one + other for one, other in zip(total, counts, strict=True)]
        table.add_row(name, *(f"{count:,}" for count in counts))
    table.add_section()
    table.add_row(f"all ({len(delta.targets)})", *(f"{count:,}" for count in total))
    table.caption = (
        f"base {delta.base}\nrepaired {delta.repaired or 'not recorded'}\n{delta.path.stat().st_size:,} bytes"
    )
    return table


def name_of(source: Source) -> str:
    """Return the name of a model: its hub name, or the last part of its path."""
    hub = re.search(r"models--([^/]+)--([^/]+)/snapshots/[^/]+$", str(source.folder.absolute()))
    return f"{hub[1]}/{hub[2]}" if hub else source.folder.absolute().name


def _version(form: str | None, path: Path) -> int:
    match = re.fullmatch(rf"{FORMAT} (\d+)", form or "")
    if match is None:
        raise ValueError(f"{path} has format {form!r}; needs '{FORMAT} {VERSION}', as seft train writes it")
    if not 1 <= int(match[1]) <= VERSION:
        raise ValueError(f"{path} has format {form!r}, this program reads up to version {VERSION}: update it")
    return int(match[1])


def _check_tensors(version: int, dtype: torch.dtype, targets: list[str], tensors: dict[str, Tensor]) -> None:
    """Refuse tensors that no delta file of this version holds: names, types, lengths, order of positions."""
    value_type = dtype if version == 1 else _BITS[dtype.itemsize]
    ending = "_values" if version == 1 else "_xor"
    left = set(tensors)
    for name in targets:
        for kind in KINDS:
            positions = tensors.get(f"{name}.{kind}")
            if positions is None:
                continue
            left.discard(f"{name}.{kind}")
            if positions.dtype not in (torch.int32, torch.int64) or positions.dim() != 1 or not positions.numel():
                raise ValueError(f"{name}.{kind} is no list of positions")
            if bool((positions[1:] <= positions[:-1]).any()):
                raise ValueError(f"the positions of {name}.{kind} are not ascending")
            if version == 1 and kind == "pruned":
                continue
            values = tensors.get(f"{name}.{kind}{ending}")
            left.discard(f"{name}.{kind}{ending}")
            if values is None or values.dtype != value_type or values.shape != positions.shape:
                raise ValueError(f"{name}.{kind}{ending} does not fit {name}.{kind}")
    if left:
        raise ValueError(f"it holds {min(left)}, which is none of its targets'")


def _convert(source: Source, delta: Delta, output: Path, start: str, end: str, kind: str, advice: str) -> None:
    """Write a model with the changes of a delta file.

    Args:
        source: The model to change.
        delta: The changes.
        output: Folder to create; it must not exist.
        start: Fingerprint that the source's targets must have.
        end: Fingerprint that the changed targets must have; empty: unknown.
        kind: Description of the source for error messages, "pruned" or "repaired".
        advice: Remedy for a source that does not fit, for error messages.
    """
    absent = [name for name in delta.targets if name not in source.weights.tensors]
    if absent:
        raise ValueError(
            f"{delta.path} changes {absent[0]}, which {source.folder} does not have: it was made from "
            f"{delta.base_name or 'another model'}"
        )
    before, after, targets = Fingerprint(), Fingerprint(), set(delta.targets)
    with new_folder(output) as folder:
        writer = WeightsWriter(folder)
        for name in delta.targets + sorted(source.weights.tensors.keys() - targets):
            if name not in targets:
                writer.add(name, source.read_for_export(name, delta.dtype)[0])
            else:
                weight = source.weights.read(name).view(source.weights.tensors[name].shape)
                weight, _ = cast_weight(weight, delta.dtype)
                before.add(name, weight)
                weight = weight.clone()  # the tensor may be the memory-mapped file itself
                delta.change(name, weight)
                after.add(name, weight)
                writer.add(name, weight)
        if before.hexdigest() != start:
            raise ValueError(
                f"{delta.path} belongs to another {kind} model than {source.folder}: its weights are not those the "
                f"file was made with (base: {delta.base_name or 'not named'}); {advice}"
            )
        if end and after.hexdigest() != end:
            raise ValueError(f"{delta.path} is damaged: it does not lead to the weights it was made from")
        writer.close()
        save_settings(folder, source, delta.dtype)
