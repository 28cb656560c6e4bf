"""Fused experts of transformers: modules that keep the weights of all experts of a layer in one 3-D parameter.

    tokens, sorted by the expert that each of them chose       0 0 0 | 1 | 2 2 | 3 3 3 3
    ends: where each expert's tokens end                             3   4     6         10

Every token appears once for each expert that it chose. Sorting puts the tokens of one expert next to each other, so
that an expert is one matrix product with a slice of the tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear  # bound here: DeepSpeed replaces the attribute of the module at run time

from seft_dist.backends.shards import whole_shape
from seft_dist.kernels.sampled import dense_grad

Projection = Callable[[str, Tensor, list[int]], Tensor]
"""Function that multiplies tokens with a fused weight.

Its arguments are the parameter's name, the tokens [T, in] sorted by expert, and where each expert's tokens end; it
returns [T, out].
"""


def is_experts(module: nn.Module) -> bool:
    """Return whether a module holds all experts of a layer in fused 3-D weights."""
    return any(len(shape) == 3 for shape in parameter_shapes(module).values()) and hasattr(module, "is_transposed")


def parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the whole shapes of a module's own parameters, also where they are sharded."""
    return {name: whole_shape(parameter) for name, parameter in module.named_parameters(recurse=False)}


def first_projection(experts: Any) -> str:
    """Return the name of the parameter that experts multiply their input with."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def expert_slices(ends: list[int]) -> list[slice]:
    """Return the slice of each expert's tokens, given where they end."""
    return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def experts_linear(x: Tensor, weight: Tensor, ends: list[int]) -> Tensor:
    """Multiply each token with its expert's weight.

    Args:
        x: [T, in], sorted by expert.
        weight: [experts, out, in].
        ends: Where each expert's tokens end.

    Returns:
        [T, out].
    """
    return torch.cat([linear(x[rows], weight[expert]) for expert, rows in enumerate(expert_slices(ends))])


def experts_dense_grad(x: Tensor, grad: Tensor, ends: list[int]) -> Tensor:
    """Compute the whole weight gradient of fused experts. Beside the result, only one expert's gradient is in memory.

    Args:
        x: [T, in], sorted by expert.
        grad: [T, out], gradient of the output.
        ends: Where each expert's tokens end.

    Returns:
        fp32 [experts * out, in].
    """
    whole = torch.empty(len(ends), grad.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
    for one, rows in zip(whole, expert_slices(ends), strict=True):
        one.copy_(dense_grad(x[rows], grad[rows]))
    return whole.view(-1, x.shape[1])


def experts_forward(
    module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, project: Projection
) -> Tensor:
    """Compute what transformers' fused experts compute, with the projections left to the caller.

    Args:
        module: The experts.
        hidden: [T, hidden].
        top_k_index: int64 [T, k], chosen experts.
        top_k_weights: [T, k], their shares.
        project: Computes the two projections; it gets T * k tokens.

    Returns:
        [T, hidden].
    """
    chosen = top_k_index.shape[-1]
    expert, order = top_k_index.reshape(-1).sort(stable=True)
    numbers = torch.arange(module.num_experts, device=expert.device)
    ends = torch.searchsorted(expert, numbers, right=True).tolist()
    x = project(first_projection(module), hidden[order // chosen], ends)
    x = project("down_proj", module._apply_gate(x) if module.has_gate else module.act_fn(x), ends)
    x = x * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    return x[order.argsort()].view(-1, chosen, x.shape[-1]).sum(1).to(hidden.dtype)
