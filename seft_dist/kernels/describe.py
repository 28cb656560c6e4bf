"""Which kernels run here, in a line."""

import torch

from seft_dist.kernels.build import library, triton_kernels


def describe(device: torch.device) -> str:
    """Say which kernels are used, e.g. "C++ (GCC 12.2.0, 16 lanes)". Local; builds the C++ ones at the first call.

    Args:
        device: Of the weights.
    """
    if device.type == "cuda":
        return "Triton (never tested on a GPU)" if triton_kernels() is not None else "torch (no Triton)"
    if device.type != "cpu":
        return "torch"
    functions = library()
    if functions is None:
        return "torch (no C++ library)"
    return f"C++ (compiler {functions.built_with().decode()}, {functions.lanes()} lanes)"
