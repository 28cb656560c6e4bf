"""Weights in another type: zeros stay zeros, without a sign; what is not zero never becomes zero."""

import torch
from torch import Tensor

# By the number of bytes, the integer type with which the bits of a floating number can be read
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def unsigned_zeros(values: Tensor) -> Tensor:
    """Replace -0.0 by +0.0; every other bit stays, also in NaN.

    Products of weights and masks leave -0.0 behind. It compares equal to 0, but has bits: kernels for sparse weights
    and packed files would carry it along as a value.

    Args:
        values: Any shape, type and device.

    Returns:
        ``values`` itself if there is none, or if they are no floating numbers of 2, 4 or 8 bytes; else a copy.
    """
    return values.masked_fill(values == 0, 0.0) if has_negative_zeros(values) else values


def has_negative_zeros(values: Tensor) -> bool:
    """Return whether there is a -0.0, in one pass and without a copy.

    Args:
        values: Any shape, type and device.

    Returns:
        False, too, for other types than floating numbers of 2, 4 or 8 bytes.
    """
    bits = _BITS.get(values.element_size())
    if bits is None or not values.is_floating_point() or not values.numel():
        return False
    # -0.0 is the sign's bit alone: no other bits are a smaller integer
    return int(values.contiguous().view(bits).amin()) == torch.iinfo(bits).min


def cast_weight(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Cast weights so that no weight becomes 0: what is too small is kept at the type's smallest number, with its sign.

    A weight that became 0 would count as pruned. A plain cast to bfloat16 does this below 2^-134 (4.6e-41).

    Args:
        values: Any shape, type and device; integers and booleans are not cast.
        dtype: Floating type wanted.

    Returns:
        The weights in ``dtype``, and how many of them were too small.
    """
    if not values.is_floating_point() or values.dtype == dtype:
        return values, 0
    cast = values.to(dtype)
    lost = (cast == 0) & (values != 0)
    count = int(torch.count_nonzero(lost))
    if count:
        smallest = torch.ones((), dtype=_BITS[dtype.itemsize], device=cast.device).view(dtype)
        cast = torch.where(lost, torch.where(values < 0, -smallest, smallest), cast)
    return cast, count
