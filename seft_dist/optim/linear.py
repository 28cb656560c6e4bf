"""A linear whose weight gradient exists only where deltas are.

Shapes: T tokens, weight [out, in], k deltas of all ranks in it. Conv1D stores [in, out]: its weight gradient is that of a
linear whose input and output gradient have changed places.

Forward is the plain linear: the weight already holds base + delta. Backward computes the input gradient as usual and the
weight gradient at the k positions; inside an evolution's window also the dense one, which goes straight to its owners.
"""

import time
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear  # bound here: DeepSpeed replaces the attribute of the module at run time

from seft_dist.kernels.sampled import sampled_grad_
from seft_dist.optim.delta import Support
from seft_dist.optim.targets import ExpertWeight, Target, first_projection, is_conv1d
from seft_dist.optim.window import Window

ANCHOR = "seft_anchor"


class Slot:
    """What one target's backward reads and fills: positions, gradient, window."""

    def __init__(self) -> None:
        self.armed = False
        """Whether backward records anything."""
        self.touched = False
        """Whether a backward has recorded since the last step."""
        self.support: Support | None = None
        """Positions to sample: the deltas', in a window of candidates theirs too; None: none yet."""
        self.grad: Tensor | None = None
        """fp32 [k], this rank's gradient since the last step; None: no backward yet."""
        self.window: Window | None = None
        """Where the dense gradient goes; None outside an evolution's window."""

    def forget(self) -> None:
        """Drop the gradient since the last step. Local."""
        self.grad, self.touched = None, False

    @torch.no_grad()
    def record(self, x: Tensor, grad: Tensor, ends: list[int] | None = None) -> None:
        """Add one backward's weight gradient. **Collective** inside a window, else local.

        Args:
            x: [T, in], the linear's input.
            grad: [T, out], gradient of its output.
            ends: Of fused experts: where each one's tokens end, which lie one expert after another.
        """
        self.touched = True
        dense, began = None, time.perf_counter()
        if self.window is not None and self.window.needs_dense:
            parts = [grad[rows].float().T @ x[rows].float() for rows in _slices(ends, len(x))]
            dense = parts[0] if ends is None else torch.cat(parts)
        if self.support is not None:
            if self.grad is None:
                self.grad = torch.zeros(len(self.support), device=grad.device)
            if dense is not None:
                self.grad += dense.view(-1)[self.support.positions()]
            elif ends is None:
                support = self.support
                sampled_grad_(self.grad, support.shape, support.crow, support.col, x, grad)
            else:
                self._record_experts(self.support, x, grad, ends)
        if self.window is not None:
            self.window.observe(x, grad)
            if dense is not None:
                self.window.add(dense)  # last: the sum over ranks may be made in place
                self.window.seconds += time.perf_counter() - began

    def _record_experts(self, support: Support, x: Tensor, grad: Tensor, ends: list[int]) -> None:
        assert self.grad is not None
        blocks = support.blocks(len(ends))
        outs = self.grad.split([len(block) for block in blocks])
        for rows, block, out in zip(_slices(ends, len(x)), blocks, outs, strict=True):
            if rows.start < rows.stop:
                sampled_grad_(out, block.shape, block.crow, block.col, x[rows], grad[rows])


def _slices(ends: list[int] | None, tokens: int) -> list[slice]:
    """The tokens of each expert; without experts, all of them."""
    if ends is None:
        return [slice(0, tokens)]
    return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


class _SampledLinear(torch.autograd.Function):
    """y = x W^T + b, with W's gradient recorded in a slot. The anchor ties the graph where x needs no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, slot: Slot, transposed: bool
    ) -> Tensor:
        # The weight itself is saved, no copy: engines free it after forward and gather it again for backward.
        ctx.save_for_backward(x, weight)
        ctx.slot, ctx.transposed = slot, transposed
        ctx.anchor = anchor.shape, anchor.dtype, anchor.device
        return linear(x, weight.T if transposed else weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        if ctx.slot.armed:
            tokens, grads_out = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
            ctx.slot.record(*((grads_out, tokens) if ctx.transposed else (tokens, grads_out)))
        # Under autocast the output's type is not the weight's.
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad.to(weight.dtype) @ (weight.T if ctx.transposed else weight)).to(x.dtype)
        shape, dtype, device = ctx.anchor
        return grad_x, None, None, torch.zeros(shape, dtype=dtype, device=device), None, None


class _SampledExperts(torch.autograd.Function):
    """y = x W[e]^T for tokens sorted by their expert e, with the gradient of all of W recorded at once in a slot.

    One record for each fused weight, not for each expert: ranks whose tokens choose other experts still enter the same
    collectives.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, anchor: Tensor, slot: Slot, ends: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.slot, ctx.ends = slot, ends
        ctx.anchor = anchor.shape, anchor.dtype, anchor.device
        return experts_linear(x, weight, ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        if ctx.slot.armed:
            ctx.slot.record(x, grad, ctx.ends)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = experts_linear(grad.to(weight.dtype), weight.transpose(1, 2), ctx.ends).to(x.dtype)
        shape, dtype, device = ctx.anchor
        return grad_x, None, torch.zeros(shape, dtype=dtype, device=device), None, None


def experts_linear(x: Tensor, weight: Tensor, ends: list[int]) -> Tensor:
    """Each token times its expert's weight. Local.

    Args:
        x: [T, in], sorted by expert.
        weight: [experts, out, in].
        ends: Where each expert's tokens end.

    Returns:
        [T, out].
    """
    return torch.cat([linear(x[rows], weight[expert]) for expert, rows in enumerate(_slices(ends, len(x)))])


def experts_forward(
    module: Any,
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    project: Callable[[str, Tensor, list[int]], Tensor],
) -> Tensor:
    """What transformers' fused experts compute, with the projections left to the caller. Local.

    Args:
        module: The experts.
        hidden: [T, hidden].
        top_k_index: int64 [T, k], chosen experts.
        top_k_weights: [T, k], their shares.
        project: Gets a parameter's name, [T * k, in] sorted by expert, and where each expert's rows end.

    Returns:
        [T, hidden].
    """
    chosen = top_k_index.shape[-1]
    expert, order = top_k_index.reshape(-1).sort(stable=True)
    every = torch.arange(module.num_experts, device=expert.device)
    ends = torch.searchsorted(expert, every, right=True).tolist()
    x = project(first_projection(module), hidden[order // chosen], ends)
    x = project("down_proj", module._apply_gate(x) if module.has_gate else module.act_fn(x), ends)
    x = x * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    return x[order.argsort()].view(-1, chosen, x.shape[-1]).sum(1).to(hidden.dtype)


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return linear(x, module.weight, module.bias)
    anchor = getattr(module, ANCHOR)
    return _SampledLinear.apply(x, module.weight, module.bias, anchor, module.seft_slot, False)


def _forward_conv1d(module: Any, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return type(module).forward(module, x)
    return _SampledLinear.apply(x, module.weight, module.bias, getattr(module, ANCHOR), module.seft_slot, True)


def _forward_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    if not torch.is_grad_enabled() and not module.training:  # a checkpointed layer computes twice, the same each time
        return type(module).forward(module, hidden_states, top_k_index, top_k_weights)

    def project(key: str, x: Tensor, ends: list[int]) -> Tensor:
        weight = getattr(module, key)
        if key not in module.seft_slots or not torch.is_grad_enabled():
            return experts_linear(x, weight, ends)
        return _SampledExperts.apply(x, weight, getattr(module, f"{key}_{ANCHOR}"), module.seft_slots[key], ends)

    return experts_forward(module, hidden_states, top_k_index, top_k_weights, project)


def _hide_anchor(name: str) -> Callable[..., None]:
    def hook(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        state.pop(prefix + name, None)

    return hook


def _expect_no_anchor(name: str) -> Callable[..., None]:
    def hook(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        state.setdefault(prefix + name, getattr(module, name).detach())

    return hook


def watch_experts(target: ExpertWeight, see: Callable[[Tensor, list[int]], None]) -> Callable[[], None]:
    """Be told what a fused weight is multiplied with. Local.

    Args:
        target: The weight.
        see: Gets [T, in], sorted by expert, and where each expert's tokens end.

    Returns:
        Ends it.
    """
    module = target.module
    seen_by = module.__dict__.setdefault("seft_watchers", {})
    seen_by[target.key] = see

    def project(key: str, x: Tensor, ends: list[int]) -> Tensor:
        if key in seen_by:
            seen_by[key](x, ends)
        return experts_linear(x, getattr(module, key), ends)

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return experts_forward(module, hidden_states, top_k_index, top_k_weights, project)

    module.forward = forward

    def end() -> None:
        seen_by.pop(target.key, None)
        if not seen_by:
            module.__dict__.pop("forward", None)

    return end


def install(target: Target) -> tuple[nn.Parameter, Slot]:
    """Make a target record its weight gradient in a slot. Local.

    Returns:
        The anchor, a one-element trainable parameter that gives sharding engines something to train (it stays out of the
        state dict and has no effect on the output), and the slot.
    """
    module, name = _place(target)
    if hasattr(module, name):
        raise ValueError("the model already has a SeftOptimizer: call detach() on it first")
    slot, weight = Slot(), target.weight
    anchor = nn.Parameter(torch.zeros(1, dtype=weight.dtype, device=weight.device))
    module.register_parameter(name, anchor)
    hooks = [
        module.register_state_dict_post_hook(_hide_anchor(name)),
        module.register_load_state_dict_pre_hook(_expect_no_anchor(name)),
    ]
    if isinstance(target, ExpertWeight):
        module.__dict__.setdefault("seft_slots", {})[target.key] = slot
        forward: Callable[..., Tensor] = _forward_experts
    else:
        module.seft_slot = slot
        forward = _forward_conv1d if is_conv1d(module) else _forward
    module.forward = types.MethodType(forward, module)
    module.__dict__.setdefault("seft_hooks", []).extend(hooks)
    return anchor, slot


def _place(target: Target) -> tuple[Any, str]:
    """The module that gets the anchor, and the anchor's name in it."""
    if isinstance(target, ExpertWeight):
        return target.module, f"{target.key}_{ANCHOR}"
    return target, ANCHOR


def uninstall(target: Target) -> None:
    """Undo ``install``. Local."""
    module, name = _place(target)
    for hook in module.__dict__.pop("seft_hooks", ()):
        hook.remove()
    for attribute in ("seft_slot", "seft_slots", "forward"):
        module.__dict__.pop(attribute, None)
    delattr(module, name)
