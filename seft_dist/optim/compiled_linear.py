"""The linear of ``seft_dist.optim.linear`` as an operator that torch.compile puts into its graphs as it is.

The compiler cannot trace a backward pass that leaves a gradient in a slot. So the whole linear, with its backward pass,
is one operator to it: there is no graph break, the operations between the linears are fused, and what evolves (the
support, windows) is inside the operator, where no change makes the compiler start again. The compiler itself chooses
which inputs are kept for backward and which are computed again.

An operator takes tensors only, so a slot is known by its number, in a tensor: as a plain integer it would be a constant
of the graph, and layers that share their code could not share their graph.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear  # bound here: DeepSpeed replaces the attribute of the module at run time

from seft_dist.optim.slot import ANCHOR_GRAD, SLOTS, Slot


@torch.library.custom_op("seft_dist::sampled_linear", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, handle: Tensor, transposed: bool
) -> Tensor:
    return linear(x, weight.T if transposed else weight, bias)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, handle: Tensor, transposed: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1 if transposed else 0]))


@torch.library.custom_op("seft_dist::sampled_linear_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, anchor_grad: Tensor, handle: Tensor, transposed: bool, wants_input: bool
) -> tuple[Tensor, Tensor]:
    slot = SLOTS.get(int(handle))
    if slot is not None and slot.armed:
        tokens, grads_out = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        slot.record(*((grads_out, tokens) if transposed else (tokens, grads_out)))
    if not wants_input:
        return grad.new_empty(0), anchor_grad.clone()
    return grad @ (weight.T if transposed else weight), anchor_grad.clone()


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, anchor_grad: Tensor, handle: Tensor, transposed: bool, wants_input: bool
) -> tuple[Tensor, Tensor]:
    return (torch.empty_like(x) if wants_input else grad.new_empty(0)), torch.empty_like(anchor_grad)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, anchor, handle, transposed = inputs
    ctx.save_for_backward(x, weight, anchor, handle)
    ctx.transposed = transposed


def _backward_of(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, anchor, handle = ctx.saved_tensors
    wants_input = ctx.needs_input_grad[0]
    anchor_grad = torch.full_like(anchor, ANCHOR_GRAD)
    grad_x, anchor_grad = _backward(grad, x, weight, anchor_grad, handle, ctx.transposed, wants_input)
    return grad_x if wants_input else None, None, None, anchor_grad, None, None


_forward.register_autograd(_backward_of, setup_context=_setup_context)


def compiled_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, slot: Slot, transposed: bool
) -> Tensor:
    """Compute y = x W^T + b, with W's gradient recorded in a slot by the backward pass.

    Args:
        x: [..., in].
        weight: [out, in]; [in, out] if ``transposed``.
        bias: [out] or None.
        anchor: The weight's anchor.
        slot: Gets the gradient.
        transposed: True for the weight of a Conv1D.

    Returns:
        [..., out].
    """
    if torch.is_autocast_enabled(x.device.type):
        # a compiled graph runs without autocast, which was applied when it was traced
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    output: Tensor = _forward(x, weight, bias, anchor, slot.handle, transposed)
    return output
