"""A Triton kernel that uses little of Triton: it tells a Triton that does not work from an error in our kernels."""

import torch
import triton
import triton.language as tl


@triton.jit
def _add_one(out, count, block: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(out + i, tl.load(out + i, mask=i < count, other=0.0) + 1.0, mask=i < count)


def add_one(tensor: torch.Tensor) -> torch.Tensor:
    """Add 1 to a vector, in place."""
    _add_one[(triton.cdiv(len(tensor), 8),)](tensor, len(tensor), block=8)
    return tensor
