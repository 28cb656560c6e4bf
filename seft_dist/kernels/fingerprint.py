"""Hashes of a weight's values, in C++ if there is a compiler, else in torch."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from seft_dist.kernels.build import library
from seft_dist.sparsity import hashes


def fingerprint(weight: Tensor, start: int) -> Tensor:
    """Hash the non-zero weights of an interval; as ``hashes.fingerprint``.

    Args:
        weight: [n], in the model's dtype.
        start: Flat position of the first.

    Returns:
        int64 [].
    """
    known = weight.is_cpu and weight.dtype in (torch.bfloat16, torch.float32)
    functions = library() if known else None
    if functions is None:
        return hashes.fingerprint(weight, start)
    return _sum(functions.fingerprint_bf16 if weight.element_size() == 2 else functions.fingerprint_f32, weight, start)


def hash_of_weight(weight: Tensor, start: int) -> Tensor:
    """Hash the bits of an interval's weights; as ``hashes.hash_of_weight``.

    Args:
        weight: [n], any dtype.
        start: Flat position of the first.

    Returns:
        int64 [].
    """
    functions = library() if weight.is_cpu and weight.element_size() in (2, 4) else None
    if functions is None:
        return hashes.hash_of_weight(weight, start)
    return _sum(functions.hash_weight_16 if weight.element_size() == 2 else functions.hash_weight_32, weight, start)


def _sum(function: Any, weight: Tensor, start: int) -> Tensor:
    weight, total = weight.detach().contiguous(), ctypes.c_int64()
    function(weight.data_ptr(), weight.numel(), start, ctypes.byref(total), torch.get_num_threads())
    return torch.tensor(total.value)
