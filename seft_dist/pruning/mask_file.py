"""Reading of a user's own masks: a safetensors file that says which weights of a model are kept.

The file has one tensor for each target, under the name of its weight ("model.layers.0.mlp.up_proj.weight") or of its
module. The tensor is one of: a mask (bool or uint8, of the weight's shape, not 0 where a weight is kept), a bit mask
(uint8 [ceil(n / 8)], where bit j of byte i is position 8 i + j), or the kept positions (int32 or int64 [kept], in the
flattened weight).
"""

from math import prod
from pathlib import Path

import torch
from torch import Tensor

from seft_dist.io.weight_files import SafetensorError, safe_open
from seft_dist.sparsity.bitmask import unpack


class MaskFile:
    """The masks of all targets, read one at a time."""

    def __init__(self, path: str, shapes: dict[str, tuple[int, ...]]) -> None:
        """Args:
        path: The file.
        shapes: Shape of each target's weight as it is stored, by the target's name.

        Raises:
            ValueError: The file cannot be read, or it does not name exactly the targets.
        """
        self._path, self._shapes = Path(path).expanduser(), shapes
        if not self._path.is_file():
            raise ValueError(f"mask={path} is no file: needs a safetensors file with kept positions")
        try:
            self._file = safe_open(self._path, framework="pt")
            stored = set(self._file.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"mask={path} is no safetensors file ({error}): save it with safetensors.torch") from error
        self._keys = {name: key for name in shapes for key in (name, f"{name}.weight") if key in stored}
        missing, extra = sorted(shapes.keys() - self._keys.keys()), sorted(stored - set(self._keys.values()))
        if missing or extra:
            problem = f"lacks {missing[0]}.weight" if missing else f"names {extra[0]}, which is no target"
            raise ValueError(f"mask={path} {problem}: it must name each target once; choose --targets to match it")

    def read(self, name: str) -> Tensor:
        """Read the mask of a target.

        Args:
            name: Name of the target.

        Returns:
            True where a weight is kept, bool, in the stored shape of the weight.

        Raises:
            ValueError: The tensor is none of the three kinds, or a position is outside the weight or repeated.
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
