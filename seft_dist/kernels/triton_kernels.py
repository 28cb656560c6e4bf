"""The kernels for CUDA, in Triton. Never run on a GPU: tested through Triton's interpreter, so for results, not for speed.

Import this module only where Triton is installed; with TRITON_INTERPRET=1 set before, the kernels run on CPU tensors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ENTRIES, _TOKENS = 32, 64
"""Entries and tokens that a program of the sampled gradient takes at a time."""
_POSITIONS = 1024
"""Positions of a program that packs or unpacks."""


@triton.jit
def _sampled(grad, x, rows, cols, out, numel, tokens, entries: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    k = tl.program_id(0) * entries + tl.arange(0, entries)
    inside = k < numel
    row = tl.load(rows + k, mask=inside, other=0).to(tl.int64)
    col = tl.load(cols + k, mask=inside, other=0).to(tl.int64)
    total = tl.zeros([entries], dtype=tl.float32)
    for first in range(0, tokens, block):
        t = first + tl.arange(0, block)
        valid = inside[:, None] & (t < tokens)[None, :]
        left = tl.load(grad + row[:, None] * tokens + t[None, :], mask=valid, other=0.0).to(tl.float32)
        right = tl.load(x + col[:, None] * tokens + t[None, :], mask=valid, other=0.0).to(tl.float32)
        total += tl.sum(left * right, axis=1)
    before = tl.load(out + k, mask=inside, other=0.0)
    tl.store(out + k, before + total, mask=inside)


@triton.jit
def _count(bits, counts, numel, block: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    byte = tl.load(bits + i // 8, mask=i < numel, other=0).to(tl.int32)
    tl.store(counts + tl.program_id(0), tl.sum(byte >> (i % 8).to(tl.int32) & 1))


@triton.jit
def _decode(bits, ends, values, count, out, numel, block: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    byte = tl.load(bits + i // 8, mask=i < numel, other=0).to(tl.int32)
    bit = byte >> (i % 8).to(tl.int32) & 1
    # ends: values of all programs up to and including this one
    place = tl.load(ends + tl.program_id(0)) - tl.sum(bit) + tl.cumsum(bit) - 1
    value = tl.load(values + place, mask=(bit > 0) & (place < count), other=0.0)  # never beyond what was given
    tl.store(out + i, value, mask=i < numel)


@triton.jit
def _encode(bits, ends, dense, values, numel, block: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    byte = tl.load(bits + i // 8, mask=i < numel, other=0).to(tl.int32)
    bit = byte >> (i % 8).to(tl.int32) & 1
    place = tl.load(ends + tl.program_id(0)) - tl.sum(bit) + tl.cumsum(bit) - 1
    tl.store(values + place, tl.load(dense + i, mask=bit > 0, other=0.0), mask=bit > 0)


def sampled_grad_(out: Tensor, shape: tuple[int, int], crow: Tensor, col: Tensor, x: Tensor, grad: Tensor) -> None:
    """As ``sampled.sampled_grad_``; at least one token and one position. Local."""
    rows = torch.arange(shape[0], dtype=torch.int32, device=col.device)
    rows = rows.repeat_interleave(crow.diff(), output_size=len(col))  # else it would wait for the device
    # Transposed, so that an entry is a product of two contiguous rows.
    operands = grad.T.contiguous(), x.T.contiguous()
    grid = (triton.cdiv(len(col), _ENTRIES),)
    _sampled[grid](*operands, rows, col, out, len(col), len(x), entries=_ENTRIES, block=_TOKENS)


def _ends(bits: Tensor, numel: int) -> Tensor:
    programs = triton.cdiv(numel, _POSITIONS)
    counts = torch.empty(programs, dtype=torch.int64, device=bits.device)
    _count[(programs,)](bits, counts, numel, block=_POSITIONS)
    return counts.cumsum(0)


def encode(dense: Tensor, bits: Tensor) -> Tensor:
    """As ``packing.encode``, at least one position. Local; waits for the device."""
    ends = _ends(bits, dense.numel())
    values = dense.new_empty(int(ends[-1]))
    _encode[(len(ends),)](bits, ends, dense, values, dense.numel(), block=_POSITIONS)
    return values


def decode(bits: Tensor, values: Tensor, out: Tensor) -> Tensor:
    """As ``packing.decode``, at least one position. Local."""
    ends = _ends(bits, out.numel())
    _decode[(len(ends),)](bits, ends, values, values.numel(), out, out.numel(), block=_POSITIONS)
    return out
