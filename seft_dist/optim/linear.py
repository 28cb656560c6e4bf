"""A linear whose weight gradient exists only where deltas are.

Shapes: T tokens, weight [out, in], k deltas of all ranks in it. Conv1D stores [in, out]: its weight gradient is that of
a linear whose input and output gradient have changed places.

Forward is the plain linear: the weight already holds base + delta. Backward computes the input gradient as usual and
the weight gradient at the k positions; inside an evolution's window also the dense one, which goes straight to its
owners.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear  # bound here: DeepSpeed replaces the attribute of the module at run time

from seft_dist.backends.attachment import attachment_of
from seft_dist.backends.packed import PackedWeight, packed_of
from seft_dist.modules.experts import experts_forward, experts_linear
from seft_dist.modules.kinds import Forwards
from seft_dist.optim.anchors import ANCHOR
from seft_dist.optim.compiled_linear import compiled_linear
from seft_dist.optim.recompute_inputs import keep
from seft_dist.optim.slot import ANCHOR_GRAD, Slot
from seft_dist.optim.vectors import watched

HeldWeight = Tensor | PackedWeight
"""A weight to multiply with: the parameter, or the packed weight behind its placeholder."""


def _held_weight(module: nn.Module, key: str = "weight") -> HeldWeight:
    parameter = getattr(module, key)
    return packed_of(parameter) or parameter


def _dense(weight: HeldWeight) -> Tensor:
    """Return the weight, or a packed one decoded into memory that the next call reuses. Collective if packed."""
    return weight if isinstance(weight, Tensor) else weight.dense()


def _save(ctx: Any, x: Tensor, weight: HeldWeight, anchor: Tensor | None, slot: Slot | None) -> None:
    ctx.slot, ctx.dtype = slot, x.dtype
    kept: list[Tensor] = []
    if slot is not None:  # else nobody asks for the input
        ctx.input, kept = keep(x)
    # The weight itself is saved, not a copy: engines free it after forward and gather it again for backward. A packed
    # weight is decoded again for backward.
    ctx.packed = None if isinstance(weight, Tensor) else weight
    ctx.save_for_backward(*kept, *([weight] if isinstance(weight, Tensor) else []))
    ctx.anchor = None if anchor is None else (anchor.shape, anchor.dtype, anchor.device)


def _saved(ctx: Any) -> tuple[Sequence[Tensor], HeldWeight]:
    """Return what was kept of the input, and the weight."""
    saved = ctx.saved_tensors
    return saved, saved[-1] if ctx.packed is None else ctx.packed


def _anchor_grad(ctx: Any) -> Tensor | None:
    if ctx.anchor is None:
        return None
    shape, dtype, device = ctx.anchor
    return torch.full(shape, ANCHOR_GRAD, dtype=dtype, device=device)


def _records(ctx: Any) -> bool:
    """Return true if this backward pass adds to gradients; torch.autograd.grad of other tensors does not.

    The anchor is the last tensor that the function was applied to.
    """
    return bool(ctx.slot.armed and torch._C._will_engine_execute_node(ctx.next_functions[-1][0]))


class _SampledLinear(torch.autograd.Function):
    """y = x W^T + b, with W's gradient recorded in a slot. The anchor ties the graph where x needs no gradient.

    A packed weight without optimizer has neither slot nor anchor: it is frozen.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: HeldWeight,
        bias: Tensor | None,
        anchor: Tensor | None,
        slot: Slot | None,
        transposed: bool,
    ) -> Tensor:
        _save(ctx, x, weight, anchor, slot)
        ctx.transposed = transposed
        dense = _dense(weight)
        return linear(x, dense.T if transposed else dense, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        kept, weight = _saved(ctx)
        if ctx.slot is not None and _records(ctx):
            x = ctx.input.get(kept)
            tokens, grads_out = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
            ctx.slot.record(*((grads_out, tokens) if ctx.transposed else (tokens, grads_out)))
        elif ctx.slot is not None:
            ctx.input.leave()
        grad_x = None
        if ctx.needs_input_grad[0]:
            dense = _dense(weight)
            # Under autocast the output's type is not the weight's.
            grad_x = (grad.to(dense.dtype) @ (dense.T if ctx.transposed else dense)).to(ctx.dtype)
        grad_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, _anchor_grad(ctx), None, None


class _SampledExperts(torch.autograd.Function):
    """y = x W[e]^T for tokens sorted by their expert e, with the gradient of all of W recorded at once in a slot.

    One record for each fused weight, not for each expert: ranks whose tokens choose other experts still enter the same
    collectives.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: HeldWeight, anchor: Tensor | None, slot: Slot | None, ends: list[int]
    ) -> Tensor:
        _save(ctx, x, weight, anchor, slot)
        ctx.ends = ends
        return experts_linear(x, _dense(weight), ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        kept, weight = _saved(ctx)
        if ctx.slot is not None and _records(ctx):
            ctx.slot.record(ctx.input.get(kept), grad, ctx.ends)
        elif ctx.slot is not None:
            ctx.input.leave()
        grad_x = None
        if ctx.needs_input_grad[0]:
            dense = _dense(weight)
            grad_x = experts_linear(grad.to(dense.dtype), dense.transpose(1, 2), ctx.ends).to(ctx.dtype)
        return grad_x, None, _anchor_grad(ctx), None, None


def _forward_linear(module: Any, x: Tensor) -> Tensor:
    return _forward_compiled(module, x, False) if torch.compiler.is_compiling() else _eager_linear(module, x)


def _forward_conv1d(module: Any, x: Tensor) -> Tensor:
    return _forward_compiled(module, x, True) if torch.compiler.is_compiling() else _eager_conv1d(module, x)


def _forward_compiled(module: Any, x: Tensor, transposed: bool) -> Tensor:
    """Compute what ``_eager_linear`` and ``_eager_conv1d`` do, in a form that torch.compile can trace."""
    weight, bias = module.weight, module.bias
    anchor = getattr(module, ANCHOR, None)
    untraced: Callable[[Any, Tensor], Tensor] = _untraced_conv1d if transposed else _untraced_linear
    if packed_of(weight) is not None:
        return untraced(module, x)
    if anchor is None or not torch.is_grad_enabled():
        return linear(x, weight.T if transposed else weight, bias)
    if module._seft_attachment.vectors:  # its bias is trained
        return untraced(module, x)
    slot = module._seft_attachment.slots["weight"]
    return compiled_linear(x, weight, bias, anchor, slot, transposed)


def _eager_linear(module: Any, x: Tensor) -> Tensor:
    weight = _held_weight(module)
    if not torch.is_grad_enabled():
        return linear(x, _dense(weight), module.bias)
    output: Tensor = _SampledLinear.apply(
        x, weight, watched(module, "bias"), getattr(module, ANCHOR, None), _slot_of(module), False
    )
    return output


def _eager_conv1d(module: Any, x: Tensor) -> Tensor:
    weight = _held_weight(module)
    if not torch.is_grad_enabled():
        whole = isinstance(weight, Tensor)
        return type(module).forward(module, x) if whole else linear(x, _dense(weight).T, module.bias)
    output: Tensor = _SampledLinear.apply(
        x, weight, watched(module, "bias"), getattr(module, ANCHOR, None), _slot_of(module), True
    )
    return output


_untraced_linear = torch.compiler.disable(_eager_linear)
_untraced_conv1d = torch.compiler.disable(_eager_conv1d)


def _slot_of(module: nn.Module) -> Slot | None:
    return attachment_of(module).slots.get("weight")


@torch.compiler.disable  # type: ignore[untyped-decorator]  # nobody knows before how many tokens an expert gets
def _forward_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    packed = any(packed_of(parameter) is not None for parameter in module.parameters(recurse=False))
    if not torch.is_grad_enabled() and not module.training and not packed:
        # a checkpointed layer computes twice, the same each time
        output: Tensor = type(module).forward(module, hidden_states, top_k_index, top_k_weights)
        return output
    slots: dict[str, Slot] = attachment_of(module).slots

    def project(key: str, x: Tensor, ends: list[int]) -> Tensor:
        weight = _held_weight(module, key)
        if not torch.is_grad_enabled() or (key not in slots and isinstance(weight, Tensor)):
            return experts_linear(x, _dense(weight), ends)
        anchor = getattr(module, f"{key}_{ANCHOR}", None)
        projected: Tensor = _SampledExperts.apply(x, weight, anchor, slots.get(key), ends)
        return projected

    return experts_forward(module, hidden_states, top_k_index, top_k_weights, project)


SAMPLED_FORWARDS = Forwards(linear=_forward_linear, conv1d=_forward_conv1d, experts=_forward_experts)
"""Forward methods for weights that may be packed, and whose gradient is sampled where there is a slot."""
