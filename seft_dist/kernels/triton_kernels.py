"""The kernels for CUDA, in Triton.

They have never run on a GPU: Triton's interpreter tests their results, not their speed. Import this module only where
Triton is installed; with TRITON_INTERPRET=1 set before, the kernels run on CPU tensors.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from seft_dist.kernels.choice import DEFAULT_LAUNCH, Launch

_MOST_PARTS = 8
"""Largest number of programs that share a row of the sampled gradient."""
_POSITIONS = 1024
"""Number of positions that one program packs or unpacks."""


@triton.jit
def _sampled(  # type: ignore[no-untyped-def]
    grad, x, crow, cols, out, tokens, entries: tl.constexpr, block: tl.constexpr
):
    # The entries of one row share what is read of the output's gradient; several programs share a row that has many.
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(crow + row).to(tl.int64)
    end = tl.load(crow + row + 1).to(tl.int64)
    step = tl.num_programs(1).to(tl.int64) * entries
    for chunk in range(begin + tl.program_id(1) * entries, end, step):
        k = chunk + tl.arange(0, entries)
        inside = k < end
        col = tl.load(cols + k, mask=inside, other=0).to(tl.int64)
        total = tl.zeros([entries, block], dtype=tl.float32)
        for first in range(0, tokens, block):
            t = first + tl.arange(0, block)
            valid = t < tokens
            left = tl.load(grad + row * tokens + t, mask=valid, other=0.0).to(tl.float32)
            there = inside[:, None] & valid[None, :]
            right = tl.load(x + col[:, None] * tokens + t[None, :], mask=there, other=0.0).to(tl.float32)
            total += right * left[None, :]
        before = tl.load(out + k, mask=inside, other=0.0)
        tl.store(out + k, before + tl.sum(total, axis=1), mask=inside)


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


def sampled_grad_(
    out: Tensor,
    shape: tuple[int, int],
    crow: Tensor,
    col: Tensor,
    x: Tensor,
    grad: Tensor,
    launch: Launch = DEFAULT_LAUNCH,
) -> None:
    """Compute what ``sampled.sampled_grad_`` does, for at least one token and one position; adds to ``out``."""
    entries, block, warps = launch
    # Transposed, so that an entry is a product of two contiguous rows.
    operands = grad.T.contiguous(), x.T.contiguous()
    parts = min(_MOST_PARTS, triton.cdiv(2 * len(col), shape[0] * entries))  # a row may have twice the mean at once
    _sampled[(shape[0], parts)](*operands, crow, col, out, len(x), entries=entries, block=block, num_warps=warps)


def try_out(device: torch.device) -> None:
    """Launch one kernel on a single number. Does not wait for the device.

    Raises:
        Exception: Any error of Triton: no compiler, no headers of Python, a device that it does not know.
    """
    crow, one = torch.arange(2, dtype=torch.int32, device=device), torch.ones(1, 1, device=device)
    given = (torch.zeros(1, device=device), (1, 1), crow, torch.zeros_like(crow[:1]), one, one)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # Triton launches on the current device
        sampled_grad_(*given)


def _ends(bits: Tensor, numel: int) -> Tensor:
    programs = triton.cdiv(numel, _POSITIONS)
    counts = torch.empty(programs, dtype=torch.int64, device=bits.device)
    _count[(programs,)](bits, counts, numel, block=_POSITIONS)
    return counts.cumsum(0)


def encode(dense: Tensor, bits: Tensor) -> Tensor:
    """Compute what ``packing.encode`` does, for at least one position. Waits for the device."""
    ends = _ends(bits, dense.numel())
    values = dense.new_empty(int(ends[-1]))
    _encode[(len(ends),)](bits, ends, dense, values, dense.numel(), block=_POSITIONS)
    return values


def decode(bits: Tensor, values: Tensor, out: Tensor) -> Tensor:
    """Compute what ``packing.decode`` does, for at least one position."""
    ends = _ends(bits, out.numel())
    _decode[(len(ends),)](bits, ends, values, values.numel(), out, out.numel(), block=_POSITIONS)
    return out
