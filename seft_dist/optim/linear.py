"""A linear whose weight gradient exists only where deltas are.

Shapes: T tokens, weight [out, in], k deltas of all ranks in it.

Forward is the plain linear: the weight already holds base + delta. Backward computes the input gradient as usual and the
weight gradient at the k positions; inside an evolution's window also the dense one, which goes straight to its owners.
"""

import types
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear  # bound here: DeepSpeed replaces the attribute of the module at run time

from seft_dist.optim.delta import Support
from seft_dist.optim.window import Window

ANCHOR = "seft_anchor"
_DENSE_ABOVE = 0.1
"""Density above which a dense product and an index is faster on a CPU than sampled_addmm (docs/numerics.md)."""


class Slot:
    """What one target's backward reads and fills: positions, gradient, window."""

    def __init__(self) -> None:
        self.armed = False
        """Whether backward records anything."""
        self.touched = False
        """Whether a backward has recorded since the last step."""
        self.support: Support | None = None
        """Positions to sample; None: no delta yet."""
        self.grad: Tensor | None = None
        """fp32 [k], this rank's gradient since the last step; None: no backward yet."""
        self.window: Window | None = None
        """Where the dense gradient goes; None outside an evolution's window."""

    def forget(self) -> None:
        """Drop the gradient since the last step. Local."""
        self.grad, self.touched = None, False

    @torch.no_grad()
    def record(self, x: Tensor, grad: Tensor) -> None:
        """Add one backward's weight gradient. **Collective** inside a window, else local.

        Args:
            x: [T, in], the linear's input.
            grad: [T, out], gradient of its output.
        """
        self.touched = True
        dense = grad.float().T @ x.float() if self.window is not None and self.window.needs_dense else None
        if self.support is not None:
            if self.grad is None:
                self.grad = torch.zeros(len(self.support), device=grad.device)
            if dense is None:
                sampled_grad_(self.grad, self.support, x, grad)
            else:
                self.grad += dense.view(-1)[self.support.positions()]
        if self.window is not None:
            self.window.add_norms(x)
            if dense is not None:
                self.window.add(dense)  # last: the sum over ranks may be made in place


def sampled_grad_(out: Tensor, support: Support, x: Tensor, grad: Tensor) -> None:
    """Add the weight gradient at the support's positions to ``out``, accumulated in fp32. Local.

    Args:
        out: fp32 [k].
        support: k positions of a weight [out, in].
        x: [T, in].
        grad: [T, out].
    """
    rows, columns = support.shape
    if not len(support):
        return
    if x.device.type == "cpu" and len(support) < _DENSE_ABOVE * rows * columns and torch.backends.mkl.is_available():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            pattern = torch.sparse_csr_tensor(
                support.crow, support.col, out, size=(rows, columns), check_invariants=False
            )
        out.copy_(torch.sparse.sampled_addmm(pattern, grad.float().T, x.float()).values())
        return
    # Never run on a GPU. sampled_addmm takes no bf16 there: a dense product for one block of rows at a time.
    block = max(1, (1 << 24) // columns)
    crow = support.crow[::block].tolist() + [len(support)]
    positions = support.positions()
    for number, first in enumerate(range(0, rows, block)):
        begin, end = crow[number], crow[number + 1]
        dense = grad[:, first : first + block].float().T @ x.float()
        out[begin:end] += dense.view(-1)[positions[begin:end] - first * columns]


class _SampledLinear(torch.autograd.Function):
    """y = x W^T + b, with W's gradient recorded in a slot. The anchor ties the graph where x needs no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, slot: Slot) -> Tensor:
        # The weight itself is saved, no copy: engines free it after forward and gather it again for backward.
        ctx.save_for_backward(x, weight)
        ctx.slot = slot
        ctx.anchor = anchor.shape, anchor.dtype, anchor.device
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        if ctx.slot.armed:
            ctx.slot.record(x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]))
        # Under autocast the output's type is not the weight's.
        grad_x = (grad.to(weight.dtype) @ weight).to(x.dtype) if ctx.needs_input_grad[0] else None
        shape, dtype, device = ctx.anchor
        return grad_x, None, None, torch.zeros(shape, dtype=dtype, device=device), None


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return linear(x, module.weight, module.bias)
    anchor = getattr(module, ANCHOR)
    return _SampledLinear.apply(x, module.weight, module.bias, anchor, module.seft_slot)


def _hide_anchor(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    state.pop(prefix + ANCHOR, None)


def _expect_no_anchor(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    state.setdefault(prefix + ANCHOR, getattr(module, ANCHOR).detach())


def install(module: nn.Linear) -> tuple[nn.Parameter, Slot]:
    """Make a linear record its weight gradient in a slot. Local.

    Returns:
        The anchor, a one-element trainable parameter that gives sharding engines something to train (it stays out of the
        state dict and has no effect on the output), and the slot.
    """
    if hasattr(module, ANCHOR):
        raise ValueError("the model already has a SeftOptimizer: call detach() on it first")
    anchor = nn.Parameter(torch.zeros(1, dtype=module.weight.dtype, device=module.weight.device))
    module.register_parameter(ANCHOR, anchor)
    slot = Slot()
    module.seft_slot = slot  # type: ignore[assignment]
    module.forward = types.MethodType(_forward, module)  # type: ignore[method-assign]
    module.seft_hooks = [  # type: ignore[assignment]
        module.register_state_dict_post_hook(_hide_anchor),
        module.register_load_state_dict_pre_hook(_expect_no_anchor),
    ]
    return anchor, slot


def uninstall(module: nn.Linear) -> None:
    """Undo ``install``. Local."""
    for hook in module.seft_hooks:  # type: ignore[union-attr]
        hook.remove()
    del module.seft_hooks, module.seft_slot, module.forward
    delattr(module, ANCHOR)
