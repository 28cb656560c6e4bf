"""Sparse weights as a bitmask and the values at its set bits, in position order.

bits     1 0 0 1 1 0 ...      of ``sparsity.bitmask``: one bit a position
dense    a 0 0 b c 0 ...
values   a     b c   ...      where the bit is set, also where the value is 0
"""

from torch import Tensor

from seft_dist.sparsity.bitmask import unpack


def encode(dense: Tensor, bits: Tensor) -> Tensor:
    """The values at the set bits. Local.

    Args:
        dense: [n], of any type, contiguous.
        bits: uint8 [ceil(n / 8)], unused ones 0.

    Returns:
        [set bits], of the same type.
    """
    assert dense.dim() == 1 and bits.numel() == -(-dense.numel() // 8)
    return dense[unpack(bits, dense.numel())]


def decode(bits: Tensor, values: Tensor, out: Tensor) -> Tensor:
    """Write values where bits are set and 0 elsewhere, the inverse of ``encode``. Local.

    Args:
        bits: uint8 [ceil(n / 8)], unused ones 0.
        values: [set bits], in position order.
        out: [n], of the type of ``values``, contiguous; may be a slice that begins anywhere in a larger tensor.

    Returns:
        ``out``.
    """
    assert out.dim() == 1 and bits.numel() == -(-out.numel() // 8) and values.dtype == out.dtype
    return out.zero_().masked_scatter_(unpack(bits, out.numel()), values)
