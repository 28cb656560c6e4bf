"""Slots, in which the backward pass of a target leaves its weight gradient until it goes to the ranks that own it."""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from seft_dist.kernels.sampled import dense_grad, sampled_grad_
from seft_dist.modules.experts import expert_slices, experts_dense_grad
from seft_dist.optim.delta import Support
from seft_dist.optim.window import Window

ANCHOR_GRAD = 2.0**32
"""Gradient of every anchor in a backward pass: a power of two, so large that any usual threshold of clipping scales it,
and so small that the squares of many anchors' sums over many passes add up in fp32, as DeepSpeed does it. The optimizer
notices by it whether another one updates the anchors, or whether somebody clips them (``seft_dist.optim.anchors``)."""


class Slot:
    """The positions to sample in one target's weight gradient, and the gradient that was sampled there.

    The optimizer calls ``prepare`` before a step, backward calls ``record``, the exchange calls ``take_grad``.
    """

    def __init__(self) -> None:
        self.handle = torch.tensor(id(self))
        """int64 [] in CPU memory, by which ``seft_dist.optim.compiled_linear`` finds the slot."""
        SLOTS[id(self)] = self
        self.armed = False
        """True once the slot was prepared: backward records from then on."""
        self.touched = False
        """True if a backward pass has recorded since the last step."""
        self.support: Support | None = None
        """Positions to sample: of the deltas, and of a window's candidates; None before the first support is chosen."""
        self.grad: Tensor | None = None
        """fp32 [k], this rank's gradient since the last step; None: nothing was recorded, or it has been taken."""
        self.window: Window | None = None
        """Window that accumulates the dense gradient; None outside an evolution's window."""
        self.before_record: Callable[[], None] = _nothing
        """Called before each record."""
        self._on_record: Callable[[], None] = _nothing

    def __deepcopy__(self, memo: object) -> "Slot":
        """Return an empty slot, so that a copy of the model leaves no gradient with the optimizer of the original."""
        return Slot()

    def prepare(self, support: Support | None, window: Window | None) -> None:
        """Drop what is left of the last step, and set what the coming step's backward passes record."""
        self.armed = True
        self.forget()
        self.support, self.window = support, window

    def on_record(self, callback: Callable[[], None]) -> None:
        """Set what is called after each record, e.g. to send the gradient to its owners."""
        self._on_record = callback

    def forget(self) -> None:
        """Drop the gradient since the last step."""
        self.grad, self.touched = None, False

    def take_grad(self) -> Tensor | None:
        """Hand the gradient over, fp32 [k], and keep nothing of it; None if there is none."""
        grad, self.grad = self.grad, None
        return grad

    def record(self, x: Tensor, grad: Tensor, ends: list[int] | None = None) -> None:
        """Add the weight gradient of one backward pass. Collective inside a window.

        Args:
            x: [T, in], the linear's input; of a weight that is stored transposed the gradient of its output.
            grad: [T, out], gradient of its output; of a weight that is stored transposed its input.
            ends: Where each expert's tokens end, for fused experts; the tokens are sorted by expert.

        Raises:
            ValueError: The gradient is fp16.
        """
        if grad.dtype == torch.float16:
            raise ValueError(
                "gradients are float16 (autocast or model): their range is too small without loss scaling, which "
                "SeftOptimizer does not support. Use bf16: torch.autocast(..., dtype=torch.bfloat16), bf16=True"
            )
        self.before_record()
        self.touched = True
        if self.window is not None and self.window.needs_dense:
            with self.window.measuring():
                dense = dense_grad(x, grad) if ends is None else experts_dense_grad(x, grad, ends)
                self._sample(x, grad, ends, dense)
                self.window.observe(x, grad, ends)
                self.window.add(dense)  # last: the sum over ranks may be made in place
        else:
            self._sample(x, grad, ends, None)
            if self.window is not None:
                self.window.observe(x, grad, ends)
        self._on_record()

    def _sample(self, x: Tensor, grad: Tensor, ends: list[int] | None, dense: Tensor | None) -> None:
        """Add the gradient at the support, from the dense one if that is there; do nothing before the first support."""
        before, support = self.grad, self.support
        if support is None:
            return
        if dense is not None:
            sampled = dense.view(-1)[support.positions()]
            self.grad = sampled if before is None else before.add_(sampled)
            return
        if before is None:
            # The first of a step writes, the others add.
            self.grad = torch.empty(support.col.shape, dtype=torch.float32, device=grad.device)
        assert self.grad is not None
        tokens, blocks, outs = [slice(0, len(x))], [support], [self.grad]
        if ends is not None:
            tokens, blocks = expert_slices(ends), support.blocks(len(ends))
            outs = list(self.grad.split([len(block) for block in blocks]))
        for rows, block, out in zip(tokens, blocks, outs, strict=True):
            operands = x[rows], grad[rows]
            sampled_grad_(out, block.shape, block.crow, block.col, *operands, before is not None, block.bounds)


def _nothing() -> None:
    pass


SLOTS: "weakref.WeakValueDictionary[int, Slot]" = weakref.WeakValueDictionary()
"""All slots by the numbers in their handles."""
