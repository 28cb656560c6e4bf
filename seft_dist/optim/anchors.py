"""Signs in the anchors that another optimizer updates them, or that somebody clips or drops what they stand for.

Every anchor is 0 and stays 0, and each backward pass gives it the gradient ``ANCHOR_GRAD``. An optimizer that took
SEFT's place moves it at once, a call that clips gradients scales its gradient, and one that drops gradients takes it
away. Without that, all of them would look like training: the loss is printed, and nothing is learnt, or nothing is
clipped, or a batch counts that was to be skipped.
"""

import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from seft_dist.backends import Backend
from seft_dist.backends.shards import stored_part
from seft_dist.modules.kinds import Target
from seft_dist.optim.notices import SeftWarning
from seft_dist.optim.slot import ANCHOR_GRAD, Slot

ANCHOR = "seft_anchor"
"""Name of the anchor in a linear's module; ``seft_dist.optim.install`` makes it."""
_MANY = 256
"""Backward passes without a step after which a warning is due."""


class BackwardWatch:
    """Looks at the anchors when a backward pass begins: did another optimizer step, did somebody drop the gradients?

    Made, it is called by the slots.
    """

    def __init__(
        self,
        backend: Backend,
        targets: Sequence[Target],
        slots: Sequence[Slot],
        groups: Sequence[Mapping[str, Any]],
        drop: Callable[[], None],
    ) -> None:
        """Args:
        backend: Holds the weights.
        targets: All targets, with their anchors.
        slots: Their slots.
        groups: Parameter groups of the optimizer. DeepSpeed puts other parameters in the place of the anchors.
        drop: Drops the gradients since the last step, as ``SeftOptimizer.zero_grad`` does.
        """
        anchors = [getattr(target.module, target.attribute_name(ANCHOR)) for target in targets]
        self._anchors, self._slots, self._drop = anchors, slots, drop
        self._groups, self._is_replicated = groups, backend.name in ("single", "ddp")
        self._backward_passes = 0
        self._is_over = False
        self._current_pass = -1
        for slot in slots:
            slot.before_record = self._drop_if_dropped
        slots[-1].before_record = self._note_backward

    def end_of_step(self) -> None:
        """Note that SEFT itself steps."""
        self._is_over = True

    def _drop_if_dropped(self) -> None:
        """Before the first record of a backward pass, drop gradients that ``model.zero_grad()`` has dropped."""
        now = torch._C._current_graph_task_id()
        if now != self._current_pass:
            self._current_pass = now
            if self._were_dropped():
                self._drop()

    def _note_backward(self) -> None:
        """Count a backward pass; look for another optimizer in the second, fourth, eighth ... of them.

        Raises:
            RuntimeError: Another optimizer has moved an anchor.
        """
        self._drop_if_dropped()
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
                SeftWarning,
                stacklevel=2,
            )

    def _has_moved(self) -> bool:
        return any(bool(stored_part(anchor)[0].any()) for anchor in self._anchors)

    def _were_dropped(self) -> bool:
        """Return true if backward passes have recorded, and no anchor has a gradient of them any more.

        Ordinarily the first anchor that is looked at has one. Shards and engines keep gradients elsewhere.
        """
        if not self._is_replicated or self._groups[0]["params"][0] is not self._anchors[0]:
            return False
        recorded = [anchor for slot, anchor in zip(self._slots, self._anchors, strict=True) if slot.touched]
        return bool(recorded) and all(
            anchor.grad is None or (anchor.grad.is_cpu and not anchor.grad.any()) for anchor in recorded
        )


def check_unclipped(backend: Backend, anchors: Iterable[Tensor], max_grad_norm: float | None, is_first: bool) -> None:
    """Refuse clipping by others, which sees the anchors only. Collective in the first step.

    Args:
        backend: Knows the ranks.
        anchors: Parameters of the optimizer, with the gradients of a backward pass.
        max_grad_norm: Norm to which SEFT clips itself; then there is only a warning. So it is with DeepSpeed, whose
            ``gradient_clipping`` is 1.0 for those who never named it.
        is_first: True in the first step. In later ones there is only a warning, and on a GPU nothing, for which it
            would have to wait.

    Raises:
        ValueError: Somebody clips, and SEFT does not; every rank raises the same.
    """
    parts = (stored_part(anchor.grad)[0] for anchor in anchors if anchor.grad is not None)
    grads = [part for part in parts if part.numel()]
    if not is_first:  # who clips scales all alike, so one is enough
        grads = [grad for grad in grads[:1] if grad.is_cpu]
    largest = max((float(grad.abs().max()) for grad in grads), default=0.0)
    scaled = torch.tensor([0 < largest < ANCHOR_GRAD / 2])
    if is_first:
        backend.replicas.max(backend.owners.max(scaled := scaled.long()))
    if not scaled.any():
        return
    message = (
        "gradients were clipped outside of SeftOptimizer (torch.nn.utils.clip_grad_norm_, accelerator.clip_grad_norm_, "
        "Trainer's max_grad_norm or DeepSpeed's gradient_clipping), which has no effect: they do not see the gradients "
        "of deltas, and the norm that they return means nothing"
    )
    if is_first and max_grad_norm is None and "deepspeed" not in sys.modules:
        raise ValueError(
            f"{message}. Pass SeftOptimizer(..., max_grad_norm=1.0) and remove the other clipping; seft.grad_norm is "
            "the norm. With transformers.Trainer, SeftCallback does this (seft_dist.integrations.transformers)"
        )
    if backend.owners.rank == 0 and backend.replicas.rank == 0:
        own = "does not clip" if max_grad_norm is None else f"clips to max_grad_norm={max_grad_norm:g}"
        warnings.warn(f"{message}. SeftOptimizer itself {own}; seft.grad_norm is the norm", SeftWarning, stacklevel=4)
