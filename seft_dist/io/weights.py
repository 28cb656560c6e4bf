"""Reading and writing of the safetensors files of a Hugging Face folder, a piece at a time; nothing is pickled.

Mixtures of experts are published with one tensor for each expert and projection, but transformers holds them fused
(E experts, hidden size H, intermediate size I):

    mlp.experts.0.gate_proj.weight  [I, H]  .
    mlp.experts.0.up_proj.weight    [I, H]   |  mlp.experts.gate_up_proj  [E, 2 I, H]
    mlp.experts.1.gate_proj.weight  [I, H]   |
    ...                                     '

So a fused weight is the concatenation of several stored tensors. It can be read under its fused name, and is written
under the names of the files that were read.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from seft_dist.files.writing import write_text
from seft_dist.io.renames import Pieces, renamed_tensors
from seft_dist.io.weight_files import INDEX, SINGLE, weight_files
from seft_dist.io.weight_files import write_safetensors as write_safetensors
from seft_dist.sparsity.casts import unsigned_zeros

MAX_SHARD_BYTES = 5_000_000_000
_MOST_TOUCHED = 64 << 20
"""Bytes that are read from files before they are unmapped and mapped again."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


# Names of an expert's projections, in the order in which they are fused; the second of each pair is Mixtral's
_GATE, _UP, _DOWN = ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")
_EXPERT = re.compile(r"^(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$")
_MIXTRAL = ".block_sparse_moe."
"""Name in Mixtral's files of the module that transformers calls ".mlp."."""


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of one tensor, from the header of its file, or of a tensor that is fused from several."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[str, ...] = ()
    """Stored tensors that a fused or renamed tensor consists of, in order; empty for any other."""

    @property
    def numel(self) -> int:
        """Number of values."""
        return prod(self.shape)


class Weights:
    """The tensors of a folder's safetensors files. Opening reads the headers only; ``read`` reads values."""

    def __init__(self, folder: Path) -> None:
        """Open the files and read their headers.

        Args:
            folder: Folder with model.safetensors, or with several files and model.safetensors.index.json.

        Raises:
            ValueError: There are no such files, one is missing or damaged, or it has a dtype that is not supported.
        """
        self.folder = folder
        self._handles: dict[Path, Any] = {}
        self._touched = 0
        self.tensors: dict[str, TensorInfo] = {}
        for file in weight_files(folder):
            try:
                handle = self._mapped(file)
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{file} is not a whole safetensors file ({error}): write or download it again"
                ) from error
            for name in handle.keys():  # noqa: SIM118  # not a dict
                piece = handle.get_slice(name)
                if piece.get_dtype() not in DTYPES:
                    raise ValueError(
                        f"{file}: {name} is of type {piece.get_dtype()}; needs plain weights, not quantized ones"
                    )
                if name in self.tensors:
                    raise ValueError(f"{name} is in {self.tensors[name].file} and in {file}: write the model again")
                self.tensors[name] = TensorInfo(file, tuple(piece.get_shape()), DTYPES[piece.get_dtype()])
        if not self.tensors:
            raise ValueError(f"{folder} has weight files without a tensor in them: write or download the model again")

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point dtype in which most of the values are stored."""
        counts: dict[torch.dtype, int] = {}
        for info in self.tensors.values():
            if info.dtype.is_floating_point:
                counts[info.dtype] = counts.get(info.dtype, 0) + info.numel
        return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)

    @cached_property
    def fused(self) -> dict[str, TensorInfo]:
        """Weights that the files hold in pieces or under another name, by the name that transformers gives them."""
        return _fuse(self.tensors) | _renamed_infos(renamed_tensors(self.folder, self.tensors), self.tensors)

    def find(self, name: str) -> str | None:
        """Return the name under which a model's weight can be read; None if the files do not hold it.

        Files of a base model without its head, such as GPT-2's, lack the prefix ("transformer.").
        """
        for known in (name, name.replace(".mlp.", _MIXTRAL), name.partition(".")[2]):
            if known in self.tensors or known in self.fused:
                return known
        return None

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of a stored or fused tensor."""
        return self.tensors[name] if name in self.tensors else self.fused[name]

    def stored_names(self, name: str) -> tuple[str, ...]:
        """Return the names of the stored tensors that hold a model's weight, in order. The files must hold it."""
        known = self.find(name)
        assert known is not None, name
        return (known,) if known in self.tensors else self.fused[known].pieces

    def split(self, name: str, whole: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Split a model's weight into the tensors that the files store.

        Args:
            name: Name of the weight in the model.
            whole: The weight.

        Yields:
            Names in the files (the model's name, if they do not hold the weight), and views of ``whole``.
        """
        known = self.find(name) or name
        pieces = self.fused[known].pieces if known in self.fused else ()
        if not pieces:
            yield known, whole
        flat, start = whole.reshape(-1), 0
        for piece in pieces:
            info = self.tensors[piece]
            yield piece, flat[start : start + info.numel].view(info.shape)
            start += info.numel

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read positions start <= i < stop of a flattened tensor; only the rows that hold them are read from disk.

        Zeros are returned without a sign: -0.0, which products of weights and masks leave behind, is read as 0.0.

        Args:
            name: Name of a stored or fused tensor.
            start: First position.
            stop: Position behind the last; None: the end.

        Returns:
            [stop - start], in the file's dtype, on the CPU.

        Raises:
            ValueError: The bytes of a packed file are not those that were written.
        """
        if name in self.fused:
            return self._read_fused(name, start, stop)
        info = self.tensors[name]
        stop = info.numel if stop is None else stop
        if stop <= start:
            return torch.empty(0, dtype=info.dtype)
        return unsigned_zeros(self._read(name, info, start, stop))

    def _read(self, name: str, info: TensorInfo, start: int, stop: int) -> Tensor:
        handle = self._mapped(info.file, (stop - start) * info.dtype.itemsize)
        if not info.shape:
            scalar: Tensor = handle.get_tensor(name)
            return scalar.view(1)
        width = prod(info.shape[1:])
        first = start // width
        rows: Tensor = handle.get_slice(name)[first : -(-stop // width)]
        return rows.reshape(-1)[start - first * width : stop - first * width]

    def release(self) -> None:
        """Unmap the files: pages that were read count as memory of this process. ``read`` maps them again."""
        self._handles, self._touched = {}, 0

    def _mapped(self, file: Path, size: int = 0) -> Any:
        """Return the open file, from which ``size`` bytes are about to be read."""
        if self._touched + size > _MOST_TOUCHED:
            self.release()
        self._touched += size
        if file not in self._handles:
            self._handles[file] = safe_open(file, framework="pt")
        return self._handles[file]

    def _read_fused(self, name: str, start: int, stop: int | None) -> Tensor:
        info, offset, parts = self.fused[name], 0, []
        stop = info.numel if stop is None else stop
        for piece in info.pieces:
            numel = self.tensors[piece].numel
            if start < offset + numel and stop > offset:
                parts.append(self.read(piece, max(start - offset, 0), min(stop - offset, numel)))
            offset += numel
        return torch.cat(parts) if parts else torch.empty(0, dtype=info.dtype)


def _fuse(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Describe the fused weights that the tensors of single experts make up.

    Weights that lack an expert, or whose experts differ in shape or dtype, are left out: they count as missing later.
    """
    layers: dict[str, dict[tuple[int, str], str]] = {}
    for name in tensors:
        match = _EXPERT.match(name)
        if match:
            layers.setdefault(match[1], {})[int(match[2]), match[3]] = name
    fused = {}
    for experts, names in layers.items():
        count = 1 + max(number for number, _ in names)
        if count > len(names):  # some are missing; checked first, since the largest number may be of any size
            continue
        for key, kinds in (("gate_up_proj", (_GATE, _UP)), ("up_proj", (_UP,)), ("down_proj", (_DOWN,))):
            wanted = [
                next((names[i, kind] for kind in kind_names if (i, kind) in names), "")
                for i in range(count)
                for kind_names in kinds
            ]
            infos = [tensors.get(name) for name in wanted]
            first = infos[0]
            if first is None or len(first.shape) != 2:
                continue
            if any(info is None or (info.shape, info.dtype) != (first.shape, first.dtype) for info in infos):
                continue
            shape = (count, first.shape[0] * len(kinds), first.shape[1])
            name = f"{experts}.{key}".replace(_MIXTRAL, ".mlp.")
            fused[name] = TensorInfo(first.file, shape, first.dtype, tuple(wanted))
    return fused


def _renamed_infos(pieces: Pieces, tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Describe the tensors that transformers renames or concatenates, except those whose pieces do not fit."""
    renamed = {}
    for name, (stored, experts) in pieces.items():
        infos = [tensors[piece] for piece in stored]
        first = infos[0]
        if any((info.shape[1:], info.dtype) != (first.shape[1:], first.dtype) for info in infos):
            continue
        rows = sum(info.shape[0] for info in infos) if first.shape else 0
        if experts and (not first.shape or rows % experts):
            continue
        shape = (experts, rows // experts, *first.shape[1:]) if experts else (rows, *first.shape[1:])
        renamed[name] = TensorInfo(first.file, shape if first.shape else (), first.dtype, stored)
    return renamed


class WeightsWriter:
    """Writes tensors, given one at a time, as the safetensors files of a Hugging Face folder. Used on one rank only."""

    def __init__(self, folder: Path, max_bytes: int = MAX_SHARD_BYTES) -> None:
        """Args:
        folder: An existing folder for the files.
        max_bytes: Size beyond which a file does not grow: the next tensor begins a new one.
        """
        self._folder = folder
        self._max_bytes = max_bytes
        self._tensors: dict[str, Tensor] = {}
        self._bytes = 0
        self._total = 0
        self._files: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor. A contiguous tensor on the CPU is not copied: it must not change until ``close``.

        Args:
            name: Key of the tensor.
            tensor: The whole tensor, on any device.
        """
        size = tensor.numel() * tensor.element_size()
        if self._tensors and self._bytes + size > self._max_bytes:
            self._flush()
        self._tensors[name] = unsigned_zeros(tensor.detach().cpu().contiguous())
        self._bytes += size
        self._total += size

    def close(self) -> None:
        """Write the remaining tensors, and rename the files to their final names."""
        self._flush()
        count = len(self._files)
        weight_map = {}
        for i, names in enumerate(self._files):
            file = SINGLE if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            self._part(i).rename(self._folder / file)
            weight_map.update(dict.fromkeys(names, file))
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
            write_text(self._folder / INDEX, json.dumps(index, indent=2) + "\n")

    def _part(self, i: int) -> Path:
        return self._folder / f"part-{i}.safetensors"

    def _flush(self) -> None:
        write_safetensors(self._part(len(self._files)), self._tensors, {"format": "pt"})
        self._files.append(list(self._tensors))
        self._tensors, self._bytes = {}, 0
