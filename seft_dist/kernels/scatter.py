"""Writing values to indices in many tensors in one call, as an ordinary step does into the weights."""

import ctypes
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from seft_dist.kernels.arguments import expect
from seft_dist.kernels.build import library


def scatter_(outs: Sequence[Tensor], starts: Sequence[int], indices: Sequence[Tensor], values: Tensor) -> None:
    """Set outs[i][indices[i] - starts[i]] to the i-th part of the values.

    Args:
        outs: Tensors [n_i], contiguous, of the values' dtype.
        starts: Place of each tensor's first element.
        indices: int32 or int64 [k_i] for each tensor, inside it, without repeats.
        values: [sum of k_i], one tensor's after another.

    Raises:
        ValueError: An index is outside its tensor; the compiled form has written the others then.
    """
    sizes = [index.shape[0] for index in indices]
    expect(values.shape == (sum(sizes),), f"{sum(sizes)} values")
    functions = library() if values.is_cpu and values.element_size() in (2, 4) else None
    if functions is None:
        for out, start, index, part in zip(outs, starts, indices, values.split(sizes), strict=True):
            out[index.long() - start] = part
        return
    wide = any(index.dtype == torch.int64 for index in indices)  # all are read as one type
    indices, values = [index.to(torch.int64 if wide else torch.int32) for index in indices], values.contiguous()
    expect(all(index.is_contiguous() and index.is_cpu for index in indices), "contiguous indices on the CPU")
    expect(all(out.dtype == values.dtype and out.is_contiguous() and out.is_cpu for out in outs), "tensors of one type")
    expect(len(outs) == len(starts) == len(sizes), "a start and indices for each tensor")
    longs, pointers = ctypes.c_int64 * len(sizes), ctypes.c_void_p * len(sizes)
    outside = (functions.scatter_16 if values.element_size() == 2 else functions.scatter_32)(
        pointers(*[out.data_ptr() for out in outs]),
        longs(*starts),
        longs(*[out.numel() for out in outs]),
        pointers(*[index.data_ptr() for index in indices]),
        wide,
        longs(*accumulate(sizes)),
        *(len(sizes), values.data_ptr(), torch.get_num_threads()),
    )
    expect(not outside, "indices inside their tensors")
