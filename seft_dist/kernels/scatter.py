"""Writing values to places in many tensors in one call, as an ordinary step does into the weights."""

import ctypes
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from seft_dist.kernels.arguments import expect
from seft_dist.kernels.build import library


def scatter_(outs: Sequence[Tensor], starts: Sequence[int], places: Sequence[Tensor], values: Tensor) -> None:
    """Set outs[i][places[i] - starts[i]] to the i-th part of the values.

    Args:
        outs: Tensors [n_i], contiguous, of the values' dtype.
        starts: Place of each tensor's first element.
        places: int32 or int64 [k_i] for each tensor, inside it, without repeats.
        values: [sum of k_i], one tensor's after another.

    Raises:
        ValueError: A place is outside its tensor; the compiled form has written the others then.
    """
    sizes = [place.shape[0] for place in places]
    expect(values.shape == (sum(sizes),), f"{sum(sizes)} values")
    functions = library() if values.is_cpu and values.element_size() in (2, 4) else None
    if functions is None:
        for out, start, place, part in zip(outs, starts, places, values.split(sizes), strict=True):
            out[place.long() - start] = part
        return
    wide = any(place.dtype == torch.int64 for place in places)  # all are read as one type
    places, values = [place.to(torch.int64 if wide else torch.int32) for place in places], values.contiguous()
    expect(all(place.is_contiguous() and place.is_cpu for place in places), "contiguous places on the CPU")
    expect(all(out.dtype == values.dtype and out.is_contiguous() and out.is_cpu for out in outs), "tensors of one type")
    expect(len(outs) == len(starts) == len(sizes), "a start and places for each tensor")
    longs, pointers = ctypes.c_int64 * len(sizes), ctypes.c_void_p * len(sizes)
    outside = (functions.scatter_16 if values.element_size() == 2 else functions.scatter_32)(
        pointers(*[out.data_ptr() for out in outs]),
        longs(*starts),
        longs(*[out.numel() for out in outs]),
        pointers(*[place.data_ptr() for place in places]),
        wide,
        longs(*accumulate(sizes)),
        *(len(sizes), values.data_ptr(), torch.get_num_threads()),
    )
    expect(not outside, "places inside their tensors")
