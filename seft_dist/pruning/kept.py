"""An index of kept positions: which weights of a model stay, in a safetensors file made elsewhere.

For each target a tensor named as its weight ("model.layers.0.mlp.up_proj.weight"), or as its module, that is one of:
a mask (bool or uint8, of the weight's shape, not 0 where it stays), a bit mask (uint8 [ceil(n / 8)], bit j of byte i is
position 8 i + j), or positions (int32 or int64 [kept], counted in the flattened weight).
"""

from math import prod
from pathlib import Path

import torch
from torch import Tensor

from seft_dist.io.weight_files import SafetensorError, safe_open
from seft_dist.sparsity.bitmask import unpack


class KeptIndex:
    """The kept positions of each target, read one at a time."""

    def __init__(self, path: str, shapes: dict[str, tuple[int, ...]]) -> None:
        """Args:
        path: The file.
        shapes: Name of each target to its weight's shape, as it is stored.

        Raises:
            ValueError: It cannot be read, or it does not name exactly the targets.
        """
        self._path, self._shapes = Path(path).expanduser(), shapes
        if not self._path.is_file():
            raise ValueError(f"mask={path} is no file: needs a safetensors file with kept positions")
        try:
            self._file = safe_open(self._path, framework="pt")
            there = set(self._file.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"mask={path} is no safetensors file ({error}): save it with safetensors.torch") from error
        self._keys = {name: key for name in shapes for key in (name, f"{name}.weight") if key in there}
        missing, extra = sorted(shapes.keys() - self._keys.keys()), sorted(there - set(self._keys.values()))
        if missing or extra:
            what = f"lacks {missing[0]}.weight" if missing else f"names {extra[0]}, which is no target"
            raise ValueError(f"mask={path} {what}: it must name each target once; choose --targets to match it")

    def read(self, name: str) -> Tensor:
        """Which weights of a target stay: bool, of its shape.

        Raises:
            ValueError: The tensor is none of the three kinds, or positions are outside or repeated.
        """
        value: Tensor = self._file.get_tensor(self._keys[name])
        shape = self._shapes[name]
        numel = prod(shape)
        if value.dtype in (torch.bool, torch.uint8) and tuple(value.shape) == shape:
            return value != 0
        if value.dtype == torch.uint8 and tuple(value.shape) == (-(-numel // 8),):
            return unpack(value, numel).view(shape)
        if value.dtype not in (torch.int32, torch.int64) or value.dim() != 1:
            raise ValueError(
                f"{self._path}: {self._keys[name]} is {value.dtype} {tuple(value.shape)}; needs a mask of shape "
                f"{shape}, uint8 bits [{-(-numel // 8)}], or one-dimensional int32 or int64 positions"
            )
        if value.numel() and (int(value.min()) < 0 or int(value.max()) >= numel):
            raise ValueError(
                f"{self._path}: {self._keys[name]} has positions from {int(value.min())} to {int(value.max())}; the "
                f"weight has {numel}, counted from 0 in the flattened weight"
            )
        kept = torch.zeros(numel, dtype=torch.bool)
        kept[value.long()] = True
        if int(kept.sum()) != value.numel():
            raise ValueError(f"{self._path}: {self._keys[name]} has positions twice: needs each kept position once")
        return kept.view(shape)
