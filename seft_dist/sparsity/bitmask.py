"""A mask of n positions in ceil(n / 8) bytes; bit j of byte i is position 8 i + j."""

import torch
from torch import Tensor

_WEIGHTS = (1, 2, 4, 8, 16, 32, 64, 128)


def pack(mask: Tensor) -> Tensor:
    """Pack booleans into bits.

    Args:
        mask: bool [n].

    Returns:
        uint8 [ceil(n / 8)]; unused bits of the last byte are 0.
    """
    assert mask.dtype == torch.bool and mask.dim() == 1
    padded = torch.nn.functional.pad(mask, (0, -mask.numel() % 8)).view(-1, 8).to(torch.uint8)
    packed = torch.zeros(padded.shape[0], dtype=torch.uint8, device=mask.device)
    for bit, weight in enumerate(_WEIGHTS):
        packed |= padded[:, bit] * weight
    return packed


def unpack(packed: Tensor, numel: int) -> Tensor:
    """Unpack bits into booleans, the inverse of ``pack``.

    Args:
        packed: uint8 [ceil(numel / 8)].
        numel: Number of positions.

    Returns:
        bool [numel].
    """
    assert packed.dtype == torch.uint8 and packed.numel() == -(-numel // 8)
    weights = torch.tensor(_WEIGHTS, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(1) & weights).ne(0).view(-1)[:numel]


def popcount(packed: Tensor) -> int:
    """Number of set bits. Waits for the device.

    Args:
        packed: uint8, any length.
    """
    table = torch.tensor([bin(byte).count("1") for byte in range(256)], device=packed.device)
    return int((torch.bincount(packed.to(torch.int64), minlength=256) * table).sum())
