"""The weights of a Hugging Face folder: safetensors files, read and written a piece at a time; nothing pickled."""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MAX_SHARD_BYTES = 5_000_000_000
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {
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


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of values."""
        return prod(self.shape)


class Weights:
    """The tensors of a folder's safetensors files, of which only the headers are read until ``read``."""

    def __init__(self, folder: Path) -> None:
        """Open the files and read their headers. Local.

        Args:
            folder: Holds model.safetensors, or several files and model.safetensors.index.json.

        Raises:
            ValueError: There is no such file, one is missing or broken, or it holds a type of number unknown here.
        """
        self.folder = folder
        self._handles: dict[Path, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for file in _weight_files(folder):
            try:
                handle = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{file} is not a whole safetensors file ({error}): write or download it again"
                ) from error
            self._handles[file] = handle
            for name in handle.keys():  # noqa: SIM118  # not a dict
                piece = handle.get_slice(name)
                if piece.get_dtype() not in _DTYPES:
                    raise ValueError(
                        f"{file}: {name} is of type {piece.get_dtype()}; needs plain weights, not quantized ones"
                    )
                self.tensors[name] = TensorInfo(file, tuple(piece.get_shape()), _DTYPES[piece.get_dtype()])

    @property
    def dtype(self) -> torch.dtype:
        """The floating type in which most of the values are stored."""
        counts: dict[torch.dtype, int] = {}
        for info in self.tensors.values():
            if info.dtype.is_floating_point:
                counts[info.dtype] = counts.get(info.dtype, 0) + info.numel
        return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read positions start <= i < stop of a flattened tensor; only their rows are touched on disk. Local.

        Args:
            name: Key of the tensor.
            start: First position.
            stop: Position behind the last; None: the end.

        Returns:
            [stop - start], in the file's dtype, on the CPU.
        """
        info = self.tensors[name]
        stop = info.numel if stop is None else stop
        if stop <= start:
            return torch.empty(0, dtype=info.dtype)
        handle = self._handles[info.file]
        if not info.shape:
            return handle.get_tensor(name).view(1)
        width = prod(info.shape[1:])
        first = start // width
        rows = handle.get_slice(name)[first : -(-stop // width)]
        return rows.reshape(-1)[start - first * width : stop - first * width]


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if (folder / _INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise ValueError(f"{folder / _INDEX} is no safetensors index ({error!r}): write the model again") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder} lacks {', '.join(missing)}, which its {_INDEX} names: download the rest")
        return [folder / name for name in names]
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        raise ValueError(
            f"{folder} has its weights only as pickled files ({pickled[0]}), which can run code when loaded: convert "
            "it where you trust it, with AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise ValueError(
        f"{folder} has neither {_SINGLE} nor {_INDEX}: needs a Hugging Face folder with safetensors weights"
    )


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write one file, readable to those who may read its folder (safetensors itself lets only the owner). Local."""
    save_file(tensors, path, metadata=metadata)
    path.chmod(path.parent.stat().st_mode & 0o666)


class WeightsWriter:
    """Writes tensors, given one at a time, as the safetensors files of a Hugging Face folder. Local, on one rank."""

    def __init__(self, folder: Path, max_bytes: int = MAX_SHARD_BYTES) -> None:
        """Args:
        folder: Exists; gets the files.
        max_bytes: Start a new file before one would grow beyond this.
        """
        self._folder = folder
        self._max_bytes = max_bytes
        self._tensors: dict[str, Tensor] = {}
        self._bytes = 0
        self._total = 0
        self._files: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor; it must not change before the file that holds it is full.

        Args:
            name: Key of the tensor.
            tensor: Its whole value, on any device.
        """
        size = tensor.numel() * tensor.element_size()
        if self._tensors and self._bytes + size > self._max_bytes:
            self._flush()
        self._tensors[name] = tensor.detach().cpu().contiguous()
        self._bytes += size
        self._total += size

    def close(self) -> None:
        """Write what is left and give the files their final names."""
        self._flush()
        count = len(self._files)
        weight_map = {}
        for i, names in enumerate(self._files):
            file = _SINGLE if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            self._part(i).rename(self._folder / file)
            weight_map.update(dict.fromkeys(names, file))
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
            (self._folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _part(self, i: int) -> Path:
        return self._folder / f"part-{i}.safetensors"

    def _flush(self) -> None:
        write_safetensors(self._part(len(self._files)), self._tensors, {"format": "pt"})
        self._files.append(list(self._tensors))
        self._tensors, self._bytes = {}, 0
