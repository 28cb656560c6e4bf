"""The packed format of a pruned model, which stores one bit for each position, and the values that are not zero.

A packed folder holds packed-00001-of-0000N.safetensors and packed.safetensors.index.json in place of model.safetensors;
docs/exports.md describes every byte. Tensors are written and read one at a time, each with a checksum, and come back
exactly. A zero is a value whose bits are all 0, or -0.0, which is written and read as 0.0.
"""

import hashlib
import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import TypedDict

from seft_dist.files.kinds import lenient
from seft_dist.files.reading import parse_json, read_json
from seft_dist.files.writing import write_text
from seft_dist.io.weight_files import files_of_index, write_safetensors
from seft_dist.io.weights import DTYPES, MAX_SHARD_BYTES, TensorInfo, Weights
from seft_dist.sparsity.bitmask import pack, unpack
from seft_dist.sparsity.casts import unsigned_zeros

FORMAT, VERSION = "seft_dist packed", 1
INDEX = "packed.safetensors.index.json"
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer type for the bits of a value, by the value's size in bytes."""
_REMEDY = "pack or download it again"


@lenient
class PackedEntry(TypedDict):
    """Description of one tensor in the header of a packed file."""

    shape: list[int]
    packed: bool
    sha256: str


@lenient
class PackedIndex(TypedDict):
    """Content of ``packed.safetensors.index.json``; ``weight_map`` is the file of each tensor."""

    format: str
    version: int
    weight_map: dict[str, str]


@dataclass(frozen=True)
class PackedSize:
    """Sizes of a packed model, in bytes of its tensors, without the headers of the files."""

    dense_bytes: int
    """Bytes of all tensors before packing."""
    packed_bytes: int
    """Bytes of all tensors as written."""
    sparse_weights: int
    """Number of weights in the tensors that packing makes smaller."""
    sparse_bytes: int
    """Bytes of these tensors, packed."""

    @property
    def bytes_a_weight(self) -> float:
        """Bytes for each weight of the tensors that packing makes smaller; 0 if there are none."""
        return self.sparse_bytes / self.sparse_weights if self.sparse_weights else 0.0


class PackedWriter:
    """Writes tensors, given one at a time, as the files of a packed folder. Used on one rank only."""

    def __init__(self, folder: Path, max_bytes: int = MAX_SHARD_BYTES) -> None:
        """Args:
        folder: An existing folder for the files.
        max_bytes: Size beyond which a file does not grow: the next tensor begins a new one.
        """
        self._folder, self._max_bytes = folder, max_bytes
        self._tensors: dict[str, Tensor] = {}
        self._entries: dict[str, dict[str, Any]] = {}
        self._bytes = 0
        self._files: list[list[str]] = []
        self._keys: set[str] = set()
        self._dense = self._packed = self._sparse_weights = self._sparse_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor, packed if that is smaller.

        The tensor is not copied: it must not change until ``close``.

        Args:
            name: Key of the tensor.
            tensor: The whole tensor, on the CPU, of any dtype and shape.

        Raises:
            ValueError: The file has a tensor of this name already.
        """
        tensor = unsigned_zeros(tensor.detach().contiguous())
        parts = _encode(tensor)
        size = sum(part.numel() * part.element_size() for part in parts.values())
        if self._tensors and self._bytes + size > self._max_bytes:
            self._flush()
        keys = {name + ending: part for ending, part in parts.items()}
        if taken := self._keys & keys.keys():
            raise ValueError(f"{min(taken)} would be in the file twice: a model with such names cannot be packed")
        self._keys |= keys.keys()
        self._tensors |= keys
        digest = _digest(name, tuple(tensor.shape), tensor.dtype, parts)
        self._entries[name] = {"shape": list(tensor.shape), "packed": "" not in parts, "sha256": digest}
        self._bytes += size
        self._packed += size
        self._dense += tensor.numel() * tensor.element_size()
        if "" not in parts:
            self._sparse_weights += tensor.numel()
            self._sparse_bytes += size

    def close(self) -> PackedSize:
        """Write the remaining tensors and the index, and rename the files to their final names."""
        self._flush()
        weight_map = {}
        for i, names in enumerate(self._files):
            file = f"packed-{i + 1:05d}-of-{len(self._files):05d}.safetensors"
            self._part(i).rename(self._folder / file)
            weight_map.update(dict.fromkeys(names, file))
        size = PackedSize(self._dense, self._packed, self._sparse_weights, self._sparse_bytes)
        metadata = {"dense_size": size.dense_bytes, "total_size": size.packed_bytes}
        index = {"format": FORMAT, "version": VERSION, "metadata": metadata}
        text = json.dumps(index | {"weight_map": dict(sorted(weight_map.items()))}, indent=2)
        write_text(self._folder / INDEX, text + "\n")
        return size

    def _part(self, i: int) -> Path:
        return self._folder / f"part-{i}.safetensors"

    def _flush(self) -> None:
        metadata = {"format": FORMAT, "version": str(VERSION), "tensors": json.dumps(self._entries)}
        write_safetensors(self._part(len(self._files)), self._tensors, metadata)
        self._files.append(list(self._entries))
        self._tensors, self._entries, self._bytes = {}, {}, 0


class PackedFiles(Weights):
    """The tensors of a packed folder, with the interface of a plain one. Every tensor that is read is checked."""

    def __init__(self, folder: Path) -> None:
        """Open the files and read their headers.

        Args:
            folder: Folder written by ``PackedWriter``.

        Raises:
            ValueError: A file is missing, truncated, of a newer version or of another format.
        """
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self._handles: dict[Path, Any] = {}
        self._touched = 0
        self._entries: dict[str, PackedEntry] = {}
        expected = _read_index(folder)
        for file in sorted(set(expected.values())):
            self._open(folder / file)
        actual = {name: info.file.name for name, info in self.tensors.items()}
        if actual != expected:
            name = min(actual.items() ^ expected.items())[0]
            raise ValueError(f"{folder}: {INDEX} and the files do not agree about {name}; {_REMEDY}")

    def _read(self, name: str, info: TensorInfo, start: int, stop: int) -> Tensor:
        # The position of a value depends on all bits before it, and the checksum covers all: the tensor is read whole
        handle, entry = self._mapped(info.file, info.numel * info.dtype.itemsize), self._entries[name]
        endings = (".mask", ".values") if entry["packed"] else ("",)
        parts: dict[str, Tensor] = {ending: handle.get_tensor(name + ending) for ending in endings}
        if _digest(name, info.shape, info.dtype, parts) != entry["sha256"]:
            raise ValueError(f"{info.file}: {name} is damaged (its checksum is another); {_REMEDY}")
        if not entry["packed"]:
            return parts[""].reshape(-1)[start:stop]
        return _decode(parts[".mask"], parts[".values"], info.numel)[start:stop]

    def _open(self, file: Path) -> None:
        """Open one packed file, and enter its tensors once their names, types and lengths fit."""
        try:
            handle = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is not a whole safetensors file ({error}); {_REMEDY}") from error
        metadata = handle.metadata() or {}
        _check_version(metadata.get("format"), metadata.get("version"), file)
        entries = parse_json(metadata.get("tensors", ""), dict[str, PackedEntry], f"{file}: its list of tensors")
        try:
            left = set(handle.keys())
            for name, entry in entries.items():
                if name in self.tensors:
                    raise ValueError(f"{name} is in {self.tensors[name].file} and in {file}; {_REMEDY}")
                self.tensors[name] = _info(handle, file, name, entry)
                left -= {name + ending for ending in ((".mask", ".values") if entry["packed"] else ("",))}
        except SafetensorError as error:
            raise ValueError(f"{file} has a header that cannot be understood ({error!r}); {_REMEDY}") from error
        if left:
            raise ValueError(f"{file} holds {min(left)}, which its header does not mention; {_REMEDY}")
        self._entries |= entries


def open_weights(folder: Path) -> Weights:
    """Open a folder's weights, plain or packed.

    Raises:
        ValueError: There are none, or they cannot be read.
    """
    return PackedFiles(folder) if (folder / INDEX).is_file() else Weights(folder)


def _encode(tensor: Tensor) -> dict[str, Tensor]:
    """Encode a tensor as mask and values, or leave it as it is where that is not larger.

    Values are compared and stored as integers, so that every bit pattern comes back, those of NaN included.

    Returns:
        The tensors to store, by the ending of their names: ".mask" and ".values", or "" for the tensor itself.
    """
    if tensor.element_size() not in _BITS:
        return {"": tensor}
    bits = tensor.reshape(-1).view(_BITS[tensor.element_size()])
    mask = bits != 0
    count = int(torch.count_nonzero(mask))
    if -(-tensor.numel() // 8) + count * tensor.element_size() >= tensor.numel() * tensor.element_size():
        return {"": tensor}
    return {".mask": pack(mask), ".values": bits.masked_select(mask).view(tensor.dtype)}


def _decode(packed: Tensor, values: Tensor, numel: int) -> Tensor:
    bits = _BITS[values.element_size()]
    flat = torch.zeros(numel, dtype=values.dtype)
    flat.view(bits).masked_scatter_(unpack(packed, numel), values.view(bits))
    return flat


def _digest(name: str, shape: tuple[int, ...], dtype: torch.dtype, parts: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(f"{name} {list(shape)} {dtype}\n".encode())
    for part in parts.values():
        digest.update(part.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _info(handle: Any, file: Path, name: str, entry: PackedEntry) -> TensorInfo:
    """Describe one tensor by the header, after a check that the stored parts have the shapes that it needs."""
    shape = tuple(entry["shape"])
    numel = prod(shape)
    if not entry["packed"]:
        piece = handle.get_slice(name)
        fits = tuple(piece.get_shape()) == shape
    else:
        piece, mask = handle.get_slice(f"{name}.values"), handle.get_slice(f"{name}.mask")
        fits = mask.get_dtype() == "U8" and list(mask.get_shape()) == [-(-numel // 8)] and len(piece.get_shape()) == 1
    if not fits or min(shape, default=0) < 0 or piece.get_dtype() not in DTYPES:
        raise ValueError(f"{file}: what is stored of {name} cannot be a tensor of shape {list(shape)}; {_REMEDY}")
    return TensorInfo(file, shape, DTYPES[piece.get_dtype()])


def _read_index(folder: Path) -> dict[str, str]:
    try:
        index = read_json(folder / INDEX, PackedIndex)
    except ValueError as error:
        raise ValueError(f"{error}; {_REMEDY}") from error
    _check_version(index["format"], index["version"], folder / INDEX)
    files_of_index(folder, INDEX, index["weight_map"])
    return index["weight_map"]


def _check_version(form: Any, version: Any, file: Path) -> None:
    if form != FORMAT or not str(version).isdecimal():
        raise ValueError(f"{file} has format {form!r}, version {version!r}; needs {FORMAT!r}: {_REMEDY}")
    if int(version) > VERSION:
        raise ValueError(f"{file} has version {version} of its format, this program reads up to {VERSION}: update it")
