"""Hash of a weight's values, in C++ if there is a compiler, else in torch."""

import ctypes

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
    weight, total = weight.detach().contiguous(), ctypes.c_int64()
    function = functions.fingerprint_bf16 if weight.dtype == torch.bfloat16 else functions.fingerprint_f32
    function(weight.data_ptr(), weight.numel(), start, ctypes.byref(total), torch.get_num_threads())
    return torch.tensor(total.value)
