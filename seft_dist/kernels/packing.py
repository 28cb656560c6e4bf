"""Sparse weights as a bitmask and the values at its set bits, in position order.

bits     1 0 0 1 1 0 ...      of ``sparsity.bitmask``: one bit a position
dense    a 0 0 b c 0 ...
values   a     b c   ...      where the bit is set, also where the value is 0
"""

import ctypes

import torch
from torch import Tensor

from seft_dist.kernels.arguments import expect
from seft_dist.kernels.build import library, triton_kernels
from seft_dist.sparsity.bitmask import unpack


def encode(dense: Tensor, bits: Tensor) -> Tensor:
    """Select the values at the set bits.

    Args:
        dense: [n], any dtype.
        bits: uint8 [ceil(n / 8)], unused ones 0.

    Returns:
        [set bits], same dtype.
    """
    _check(bits, dense)
    if dense.is_cuda and dense.numel() and (kernels := triton_kernels(dense.device)) is not None:  # never run on a GPU
        encoded: Tensor = kernels.encode(dense.contiguous(), bits.contiguous())
        return encoded
    functions = library() if dense.is_cpu and dense.element_size() in (2, 4) else None
    if functions is None:
        return dense[unpack(bits, dense.numel())]
    dense, bits, count = dense.contiguous(), bits.contiguous(), ctypes.c_int64()
    functions.popcount_bits(bits.data_ptr(), bits.numel(), ctypes.byref(count))
    values = dense.new_empty(count.value)
    function = functions.encode_16 if dense.element_size() == 2 else functions.encode_32
    numbers = (values.data_ptr(), values.numel(), torch.get_num_threads())
    if function(bits.data_ptr(), dense.numel(), dense.data_ptr(), *numbers):
        raise AssertionError("bits changed while they were read")
    return values


def decode(bits: Tensor, values: Tensor, out: Tensor) -> Tensor:
    """Write values where bits are set and 0 elsewhere, the inverse of ``encode``.

    Args:
        bits: uint8 [ceil(n / 8)], unused ones 0.
        values: [set bits], in position order.
        out: [n], of the type of ``values``; may be a slice that begins anywhere in a larger tensor.

    Returns:
        ``out``.
    """
    _check(bits, out)
    expect(values.dtype == out.dtype and values.device == out.device, "values as the dense ones")
    expect(values.dim() == 1, "values, one-dimensional")
    if out.is_cuda and out.numel() and out.stride(0) == 1 and (kernels := triton_kernels(out.device)) is not None:
        decoded: Tensor = kernels.decode(bits.contiguous(), values.contiguous(), out)  # never run on a GPU
        return decoded
    functions = library() if out.is_cpu and out.element_size() in (2, 4) and out.stride(0) == 1 else None
    if functions is None:
        mask = unpack(bits, out.numel())
        expect(
            out.is_cuda or int(mask.numpy().sum()) == values.numel(), f"as many values as bits, not {values.numel()}"
        )
        return out.zero_().masked_scatter_(mask, values)
    bits, values = bits.contiguous(), values.contiguous()
    function = functions.decode_16 if out.element_size() == 2 else functions.decode_32
    numbers = (values.data_ptr(), values.numel(), out.data_ptr(), torch.get_num_threads())
    if function(bits.data_ptr(), out.numel(), *numbers):
        raise ValueError(f"{values.numel()} packed values for another number of bits: the file or message is damaged")
    return out


def _check(bits: Tensor, dense: Tensor) -> None:
    expect(dense.dim() == 1 and bits.dtype == torch.uint8 and bits.dim() == 1, "bits as uint8, one-dimensional")
    expect(bits.device == dense.device, "bits where the values are")
    numel = dense.numel()
    expect(bits.numel() == -(-numel // 8), f"bits of {numel} positions, not {bits.numel()} bytes")
    if bits.is_cpu and numel % 8:
        expect(int(bits[-1:].numpy()[0]) >> numel % 8 == 0, "no bit behind the last position")
