"""A line of text that names the kernels in use."""

import torch

from seft_dist.kernels.build import compiler_command, lacks_triton, library


def describe(device: torch.device) -> str:
    """Name the kernels in use, e.g. "C++ (compiler 12.2.0, 16 lanes)". Builds the C++ ones at the first call.

    Args:
        device: Device of the weights.
    """
    if device.type == "cuda":
        lack = lacks_triton(device)
        return "Triton (never tested on a GPU)" if lack is None else f"torch ({lack})"
    if device.type != "cpu":
        return "torch"
    functions = library()
    if functions is None:
        return "torch (no C++ library)"
    options = "".join(f", {option}" for option in compiler_command()[1:])
    return f"C++ (compiler {functions.built_with().decode()}, {functions.lanes()} lanes{options})"
