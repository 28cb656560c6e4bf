"""Signs in the anchors that another optimizer updates them, or that somebody clips what they stand for.

Every anchor is 0 and stays 0, and each backward pass gives it the gradient ``ANCHOR_GRAD``. An optimizer that took
SEFT's place moves it at once, and a call that clips gradients scales its gradient. Without that, both would look like
training: the loss is printed, and nothing is learnt, or nothing is clipped.
"""

import sys
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from seft_dist.backends import Backend
from seft_dist.backends.shards import stored_part
from seft_dist.modules.kinds import Target
from seft_dist.optim.slot import ANCHOR_GRAD

ANCHOR = "seft_anchor"
"""Name of the anchor in a linear's module; ``seft_dist.optim.install`` makes it."""
_MANY = 1024
"""Backward passes without a step after which a warning is due."""


class StepWatch:
    """Looks, until the first ``step()``, for another optimizer that steps instead of SEFT."""

    def __init__(self, targets: Sequence[Target]) -> None:
        """Args:
        targets: All targets, with their anchors.
        """
        self._targets = targets
        self._backward_passes = 0
        self._is_over = False

    def end(self) -> None:
        """Note that SEFT itself steps."""
        self._is_over = True

    def note_backward(self) -> None:
        """Count a backward pass; look at the anchors in the second, fourth, eighth ... of them.

        Raises:
            RuntimeError: Another optimizer has moved an anchor.
        """
        if self._is_over:
            return
        self._backward_passes += 1
        count = self._backward_passes
        if count > 1 and count & (count - 1) == 0 and self._has_moved():
            raise RuntimeError(
                "another optimizer updates the model: gradients arrive, and SeftOptimizer.step() is never called, so "
                "nothing would be trained. Pass the SeftOptimizer to what steps (Trainer's optimizers= or "
                "optimizer_cls_and_kwargs=, accelerator.prepare, deepspeed.initialize). With DeepSpeed and "
                "offload_optimizer, accelerate puts DeepSpeedCPUAdam in its place: remove offload_optimizer from the "
                'ds_config (SEFT\'s state is small), or set "zero_force_ds_cpu_optimizer": false'
            )
        if count == _MANY:
            warnings.warn(
                f"{count} backward passes and no SeftOptimizer.step(): their gradients only add up. Is another "
                "optimizer stepped, or is the step missing in the loop?",
                stacklevel=2,
            )

    def _has_moved(self) -> bool:
        anchors = [getattr(target.module, target.attribute_name(ANCHOR)) for target in self._targets]
        return any(bool(stored_part(anchor)[0].any()) for anchor in anchors)


def check_unclipped(backend: Backend, anchors: Iterable[Tensor], max_grad_norm: float | None) -> None:
    """Refuse clipping by others, which sees the anchors only. Collective.

    Args:
        backend: Knows the ranks.
        anchors: Parameters of the optimizer, with the gradients of a backward pass.
        max_grad_norm: Norm to which SEFT clips itself; then there is only a warning. So it is with DeepSpeed, whose
            ``gradient_clipping`` is 1.0 for those who never named it.

    Raises:
        ValueError: Somebody clips, and SEFT does not; every rank raises the same.
    """
    grads = [stored_part(anchor.grad)[0] for anchor in anchors if anchor.grad is not None]
    largest = max((float(grad.abs().max()) for grad in grads if grad.numel()), default=0.0)
    scaled = torch.tensor([0 < largest < ANCHOR_GRAD / 2])
    if not backend.replicas.max(backend.owners.max(scaled.long())).any():
        return
    message = (
        "gradients were clipped outside of SeftOptimizer (torch.nn.utils.clip_grad_norm_, accelerator.clip_grad_norm_, "
        "Trainer's max_grad_norm or DeepSpeed's gradient_clipping), which has no effect: they do not see the gradients "
        "of deltas, and the norm that they return means nothing"
    )
    if max_grad_norm is None and "deepspeed" not in sys.modules:
        raise ValueError(
            f"{message}. Pass SeftOptimizer(..., max_grad_norm=1.0) and remove the other clipping; seft.grad_norm is "
            "the norm. With transformers.Trainer, SeftCallback does this (seft_dist.integrations.transformers)"
        )
    if backend.owners.rank == 0 and backend.replicas.rank == 0:
        own = "does not clip" if max_grad_norm is None else f"clips to max_grad_norm={max_grad_norm:g}"
        warnings.warn(f"{message}. SeftOptimizer itself {own}; seft.grad_norm is the norm", stacklevel=4)
