"""A linear whose weight gradient exists only where deltas are.

Shapes: T tokens, weight [out, in], k deltas of all ranks in it. Conv1D stores [in, out]: its weight gradient is that of a
linear whose input and output gradient have changed places.

Forward is the plain linear: the weight already holds base + delta. Backward computes the input gradient as usual and the
weight gradient at the k positions; inside an evolution's window also the dense one, which goes straight to its owners.
"""

import time
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear  # bound here: DeepSpeed replaces the attribute of the module at run time

from seft_dist.backends.packed import PackedWeight, packed_of
from seft_dist.kernels.sampled import dense_grad, sampled_grad_
from seft_dist.modules.targets import ExpertWeight, Target, first_projection, is_conv1d
from seft_dist.optim.delta import Support
from seft_dist.optim.recompute_inputs import keep
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
        self.recorded: Callable[[], None] = _nothing
        """Called after each record: the gradient may leave for its owners."""

    def forget(self) -> None:
        """Drop the gradient since the last step."""
        self.grad, self.touched = None, False

    def record(self, x: Tensor, grad: Tensor, ends: list[int] | None = None) -> None:
        """Add one backward's weight gradient. Collective inside a window, else local.

        Args:
            x: [T, in], the linear's input.
            grad: [T, out], gradient of its output.
            ends: Of fused experts: where each one's tokens end, which lie one expert after another.
        """
        self.touched = True
        dense, began = None, time.perf_counter()
        if self.window is not None and self.window.needs_dense:
            dense = dense_grad(x, grad) if ends is None else _dense_grads(x, grad, ends)
        if self.support is not None:
            self._sample(self.support, x, grad, ends, dense)
        if self.window is not None:
            self.window.observe(x, grad)
            if dense is not None:
                self.window.add(dense)  # last: the sum over ranks may be made in place
                self.window.seconds += time.perf_counter() - began
        self.recorded()

    def _sample(self, support: Support, x: Tensor, grad: Tensor, ends: list[int] | None, dense: Tensor | None) -> None:
        before = self.grad
        if dense is not None:
            sampled = dense.view(-1)[support.positions()]
            self.grad = sampled if before is None else before.add_(sampled)
            return
        if before is None:
            self.grad = torch.empty(support.col.shape, device=grad.device)  # the first of a step writes, the others add
        assert self.grad is not None
        blocks, outs = [support], [self.grad]
        if ends is not None:
            blocks = support.blocks(len(ends))
            outs = list(self.grad.split([len(block) for block in blocks]))
        for rows, block, out in zip(_slices(ends, x.shape[0]), blocks, outs, strict=True):
            operands = x[rows], grad[rows]
            sampled_grad_(out, block.shape, block.crow, block.col, *operands, before is not None, block.bounds)


def _nothing() -> None:
    pass


def _dense_grads(x: Tensor, grad: Tensor, ends: list[int]) -> Tensor:
    """The whole gradient of fused experts, fp32 [experts x out, in]; beside it only that of one expert exists."""
    every = torch.empty(len(ends), grad.shape[1], x.shape[1], device=x.device)
    for one, rows in zip(every, _slices(ends, len(x)), strict=True):
        one.copy_(dense_grad(x[rows], grad[rows]))
    return every.view(-1, x.shape[1])


def _slices(ends: list[int] | None, tokens: int) -> list[slice]:
    """The tokens of each expert; without experts, all of them."""
    if ends is None:
        return [slice(0, tokens)]
    return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


Weight = Tensor | PackedWeight
"""What a forward multiplies with: the parameter, or the packed weight behind its outline."""


def _weight_of(module: nn.Module, key: str = "weight") -> Weight:
    parameter = getattr(module, key)
    return packed_of(parameter) or parameter


def _dense(weight: Weight) -> Tensor:
    """The weight itself; of a packed one, memory that the next call uses again. Collective if packed."""
    return weight if isinstance(weight, Tensor) else weight.dense()


def _save(ctx: Any, x: Tensor, weight: Weight, anchor: Tensor | None, slot: Slot | None) -> None:
    ctx.slot, ctx.dtype = slot, x.dtype
    kept: list[Tensor] = []
    if slot is not None:  # else nobody asks for the input
        ctx.input, kept = keep(x)
    # The weight itself is saved, no copy: engines free it after forward and gather it again for backward. Of a packed one
    # only the way to it is kept.
    ctx.packed = None if isinstance(weight, Tensor) else weight
    ctx.save_for_backward(*kept, *([weight] if isinstance(weight, Tensor) else []))
    ctx.anchor = None if anchor is None else (anchor.shape, anchor.dtype, anchor.device)


def _saved(ctx: Any) -> tuple[Sequence[Tensor], Weight]:
    """What was kept of the input, and the weight."""
    saved = ctx.saved_tensors
    return saved, saved[-1] if ctx.packed is None else ctx.packed


def _anchor_grad(ctx: Any) -> Tensor | None:
    if ctx.anchor is None:
        return None
    shape, dtype, device = ctx.anchor
    return torch.zeros(shape, dtype=dtype, device=device)


class _SampledLinear(torch.autograd.Function):
    """y = x W^T + b, with W's gradient recorded in a slot. The anchor ties the graph where x needs no gradient.

    A packed weight without optimizer has neither slot nor anchor: it is frozen.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Weight,
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
        if ctx.slot is not None and ctx.slot.armed:
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
        return grad_x, None, None, _anchor_grad(ctx), None, None


class _SampledExperts(torch.autograd.Function):
    """y = x W[e]^T for tokens sorted by their expert e, with the gradient of all of W recorded at once in a slot.

    One record for each fused weight, not for each expert: ranks whose tokens choose other experts still enter the same
    collectives.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Weight, anchor: Tensor | None, slot: Slot | None, ends: list[int]
    ) -> Tensor:
        _save(ctx, x, weight, anchor, slot)
        ctx.ends = ends
        return experts_linear(x, _dense(weight), ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        kept, weight = _saved(ctx)
        if ctx.slot is not None and ctx.slot.armed:
            ctx.slot.record(ctx.input.get(kept), grad, ctx.ends)
        elif ctx.slot is not None:
            ctx.input.leave()
        grad_x = None
        if ctx.needs_input_grad[0]:
            dense = _dense(weight)
            grad_x = experts_linear(grad.to(dense.dtype), dense.transpose(1, 2), ctx.ends).to(ctx.dtype)
        return grad_x, None, _anchor_grad(ctx), None, None


def experts_linear(x: Tensor, weight: Tensor, ends: list[int]) -> Tensor:
    """Each token times its expert's weight.

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
    """What transformers' fused experts compute, with the projections left to the caller.

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


def _forward(module: Any, x: Tensor) -> Tensor:
    weight = _weight_of(module)
    if not torch.is_grad_enabled():
        return linear(x, _dense(weight), module.bias)
    output: Tensor = _SampledLinear.apply(
        x, weight, module.bias, getattr(module, ANCHOR, None), _slot_of(module), False
    )
    return output


def _forward_conv1d(module: Any, x: Tensor) -> Tensor:
    weight = _weight_of(module)
    if not torch.is_grad_enabled():
        whole = isinstance(weight, Tensor)
        return type(module).forward(module, x) if whole else linear(x, _dense(weight).T, module.bias)
    output: Tensor = _SampledLinear.apply(x, weight, module.bias, getattr(module, ANCHOR, None), _slot_of(module), True)
    return output


def _slot_of(module: nn.Module) -> Slot | None:
    return module.__dict__.get("seft_slot")


def _forward_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    packed = any(packed_of(parameter) is not None for parameter in module.parameters(recurse=False))
    if not torch.is_grad_enabled() and not module.training and not packed:
        # a checkpointed layer computes twice, the same each time
        output: Tensor = type(module).forward(module, hidden_states, top_k_index, top_k_weights)
        return output
    slots: dict[str, Slot] = module.__dict__.get("seft_slots", {})

    def project(key: str, x: Tensor, ends: list[int]) -> Tensor:
        weight = _weight_of(module, key)
        if not torch.is_grad_enabled() or (key not in slots and isinstance(weight, Tensor)):
            return experts_linear(x, _dense(weight), ends)
        anchor = getattr(module, f"{key}_{ANCHOR}", None)
        projected: Tensor = _SampledExperts.apply(x, weight, anchor, slots.get(key), ends)
        return projected

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
    """Be told what a fused weight is multiplied with.

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
    """Make a target record its weight gradient in a slot.

    Returns:
        The anchor, a one-element trainable parameter that gives sharding engines something to train (it stays out of the
        state dict and has no effect on the output), and the slot.
    """
    module, name = _place(target)
    if hasattr(module, name):
        raise ValueError("the model already has a SeftOptimizer: call detach() on it first")
    slot, weight = Slot(), target.weight
    packed = packed_of(weight)
    device = weight.device if packed is None else packed.bits.device
    anchor = nn.Parameter(torch.zeros(1, dtype=weight.dtype, device=device))
    module.register_parameter(name, anchor)
    hooks = [
        module.register_state_dict_post_hook(_hide_anchor(name)),
        module.register_load_state_dict_pre_hook(_expect_no_anchor(name)),
    ]
    if isinstance(target, ExpertWeight):
        module.__dict__.setdefault("seft_slots", {})[target.key] = slot
    else:
        module.seft_slot = slot
    bind_forward(target)
    module.__dict__.setdefault("seft_hooks", []).extend(hooks)
    return anchor, slot


def bind_forward(target: Target) -> None:
    """Make a target compute here, where its weight may be packed and its gradient sampled."""
    module, _ = _place(target)
    forward: Callable[..., Tensor] = _forward_conv1d if is_conv1d(module) else _forward
    if isinstance(target, ExpertWeight):
        forward = _forward_experts
    module.forward = types.MethodType(forward, module)


def _place(target: Target) -> tuple[Any, str]:
    """The module that gets the anchor, and the anchor's name in it."""
    if isinstance(target, ExpertWeight):
        return target.module, f"{target.key}_{ANCHOR}"
    return target, ANCHOR


def uninstall(target: Target) -> None:
    """Undo ``install``."""
    module, name = _place(target)
    for hook in module.__dict__.pop("seft_hooks", ()):
        hook.remove()
    for attribute in ("seft_slot", "seft_slots", "forward"):
        module.__dict__.pop(attribute, None)
    delattr(module, name)
    if packed_of(target.weight) is not None:
        bind_forward(target)
