"""Masks as bits: the functions of ``sparsity.bitmask`` and a few more, in C++ if there is a compiler, else in torch."""

import ctypes

import torch
from torch import Tensor

from seft_dist.kernels.arguments import expect
from seft_dist.kernels.build import library
from seft_dist.sparsity import bitmask
from seft_dist.sparsity.hashes import hash_of_set


def pack(mask: Tensor) -> Tensor:
    """Pack booleans into bits; as ``bitmask.pack``."""
    functions = library() if mask.is_cpu else None
    if functions is None:
        return bitmask.pack(mask)
    expect(mask.dtype == torch.bool and mask.dim() == 1, "booleans, one-dimensional")
    mask = mask.contiguous()
    bits = torch.empty(-(-mask.numel() // 8), dtype=torch.uint8)
    functions.pack_bools(mask.data_ptr(), mask.numel(), bits.data_ptr(), torch.get_num_threads())
    return bits


def unpack(bits: Tensor, numel: int) -> Tensor:
    """Unpack bits into booleans; as ``bitmask.unpack``."""
    functions = library() if bits.is_cpu else None
    if functions is None:
        return bitmask.unpack(bits, numel)
    _check(bits, numel)
    mask = torch.empty(numel, dtype=torch.bool)
    functions.unpack_bits(bits.data_ptr(), numel, mask.data_ptr(), torch.get_num_threads())
    return mask


def popcount(bits: Tensor) -> int:
    """Number of set bits; as ``bitmask.popcount``."""
    functions = library() if bits.is_cpu else None
    if functions is None:
        return bitmask.popcount(bits)
    _check(bits, 8 * bits.numel())
    count = ctypes.c_int64()
    functions.popcount_bits(bits.data_ptr(), bits.numel(), ctypes.byref(count))
    return count.value


def holds(bits: Tensor, offsets: Tensor) -> Tensor:
    """Return whether bits are set, bool [k].

    Args:
        bits: uint8, a packed mask.
        offsets: int64 [k], positions in the mask.
    """
    return (bits[offsets >> 3] >> (offsets & 7) & 1).bool()


def with_bits(bits: Tensor, numel: int, offsets: Tensor, value: bool) -> Tensor:
    """Copy a mask, with some bits set to a value.

    Args:
        bits: uint8 [ceil(numel / 8)].
        numel: Number of positions.
        offsets: int64 [k], positions below numel.
        value: Value of their bits in the copy.

    Returns:
        Like ``bits``.
    """
    functions = library() if bits.is_cpu else None
    if functions is None:
        mask = bitmask.unpack(bits, numel)
        mask[offsets] = value
        return bitmask.pack(mask)
    _check(bits, numel)
    bits, offsets = bits.clone(), offsets.contiguous()
    expect(offsets.dtype == torch.int64 and offsets.is_cpu, "offsets as int64 on the CPU")
    if offsets.numel():
        low, high = offsets.aminmax()
        expect(int(low) >= 0 and int(high) < numel, f"offsets from 0 to {numel - 1}, not {int(low)} to {int(high)}")
        functions.set_bits(bits.data_ptr(), offsets.data_ptr(), offsets.numel(), value)
    return bits


def hash_of_bits(bits: Tensor, numel: int, start: int) -> Tensor:
    """Hash the set positions as ``hash_of_set`` does, int64 [].

    Args:
        bits: uint8 [ceil(numel / 8)].
        numel: Number of positions.
        start: Position of the first bit.
    """
    functions = library() if bits.is_cpu else None
    if functions is None:
        return hash_of_set(bitmask.unpack(bits, numel).nonzero().view(-1) + start)
    _check(bits, numel)
    total = ctypes.c_int64()
    functions.hash_bits(bits.data_ptr(), numel, start, ctypes.byref(total), torch.get_num_threads())
    return torch.tensor(total.value)


def count_outside(bits: Tensor, dense: Tensor) -> int:
    """Count the values that are not 0 where no bit is set.

    Args:
        bits: uint8 [ceil(n / 8)].
        dense: [n], floating numbers.
    """
    functions = library() if dense.is_cpu and dense.element_size() in (2, 4) else None
    if functions is None:
        return int(torch.count_nonzero(dense.masked_fill(bitmask.unpack(bits, dense.numel()), 0)))
    _check(bits, dense.numel())
    dense, count = dense.contiguous(), ctypes.c_int64()
    function = functions.count_outside_16 if dense.element_size() == 2 else functions.count_outside_32
    numbers = (dense.numel(), dense.data_ptr(), ctypes.byref(count), torch.get_num_threads())
    function(bits.data_ptr(), *numbers)
    return count.value


def _check(bits: Tensor, numel: int) -> None:
    expect(bits.dtype == torch.uint8 and bits.is_contiguous() and bits.is_cpu, "bits as contiguous uint8 on the CPU")
    expect(bits.numel() == -(-numel // 8), f"bits of {numel} positions, not {bits.numel()} bytes")
