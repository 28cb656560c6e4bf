"""Signs in the anchors that another optimizer updates them, or that somebody clips or drops what they stand for.

Every anchor is 0 and stays 0, and each backward pass gives it the gradient ``ANCHOR_GRAD``. An optimizer that took
SEFT's place moves it at once, a call that clips gradients scales its gradient, and one that drops gradients takes it
away. Without that, all of them would look like training: the loss is printed, and nothing is learnt, or nothing is
clipped, or a batch counts that was to be skipped.
"""

import sys
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from seft_dist.backends import Backend
from seft_dist.backends.shards import stored_part
from seft_dist.modules.kinds import Target
from seft_dist.optim.notices import LEVEL, SeftWarning
from seft_dist.optim.slot import ANCHOR_GRAD, Slot

ANCHOR = "seft_anchor"
"""Name of the anchor in a linear's module; ``seft_dist.optim.install`` makes it."""
_MANY = 256
"""Backward passes without a step after which a warning is due."""


class BackwardWatch:
    """Looks at the anchors: did another optimizer step, did somebody drop or clip the gradients?"""

    def __init__(
        self,
        backend: Backend,
        targets: Sequence[Target],
        slots: Sequence[Slot],
        params: Callable[[], Sequence[Tensor]],
        drop: Callable[[], None],
    ) -> None:
        """Have the slots call it before they record.

        Args:
            backend: Holds the weights.
            targets: All targets, with their anchors.
            slots: Their slots.
            params: Returns the parameters of the optimizer. DeepSpeed puts others in the place of the anchors.
            drop: Drops the gradients since the last step, as ``SeftOptimizer.zero_grad`` does.
        """
        anchors = [getattr(target.module, target.attribute_name(ANCHOR)) for target in targets]
        self._backend, self._anchors, self._slots = backend, anchors, slots
        self._params, self._drop = params, drop
        self._backward_passes = 0
        self._has_stepped = self._has_warned = False
        self._pass_looked_at = self._pass_counted = -1
        for slot in slots:
            slot.before_record = self.before_record
        slots[-1].before_record = self._before_last

    def before_record(self) -> None:
        """Drop gradients that ``model.zero_grad()`` has dropped, before the first record of a backward pass."""
        now = torch._C._current_graph_task_id()
        if now != self._pass_looked_at:
            self._pass_looked_at = now
            self.look()

    def _before_last(self) -> None:
        """Also count backward passes until the first step; look for another optimizer in the second, fourth, eighth ...

        Raises:
            RuntimeError: Another optimizer has moved an anchor.
        """
        self.before_record()
        now = torch._C._current_graph_task_id()
        if self._has_stepped or now == self._pass_counted:
            return
        self._pass_counted = now
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

    def look(self, may_wait: bool = True) -> None:
        """Drop the gradients if backward passes have recorded, and no anchor has a gradient of them any more.

        Ordinarily the first anchor that is looked at has one. Shards and engines keep gradients elsewhere, so nothing
        is done with them.

        Args:
            may_wait: False: gradients that are there are not read, so those that were set to 0 are not noticed.
        """
        if self._backend.name not in ("single", "ddp") or self._params()[0] is not self._anchors[0]:
            return
        recorded = [anchor for slot, anchor in zip(self._slots, self._anchors, strict=True) if slot.touched]
        if recorded and all(
            anchor.grad is None or (may_wait and anchor.grad.is_cpu and not anchor.grad.any()) for anchor in recorded
        ):
            self._drop()

    def check_step(self, max_grad_norm: float | None, is_managed: bool, may_wait: bool) -> None:
        """Note that SEFT itself steps, and refuse clipping by others, which sees the anchors only.

        Collective in the first step, where it raises. In later ones there is only a warning.

        Args:
            max_grad_norm: Norm to which SEFT clips itself; then there is only a warning. So it is with DeepSpeed, whose
                ``gradient_clipping`` is 1.0 for those who never named it.
            is_managed: True if it is known that others clip the anchors too, and it does not matter.
            may_wait: False: nothing is looked at after the first step, since that would wait for the device.

        Raises:
            ValueError: Somebody clips, and SEFT does not; every rank raises the same.
        """
        backend, is_first = self._backend, not self._has_stepped
        self._has_stepped = True
        if is_managed or self._has_warned or not (is_first or may_wait):
            return
        parts = [stored_part(anchor.grad)[0].view(-1) for anchor in self._params() if anchor.grad is not None]
        grads = torch.cat(parts) if parts else torch.zeros(1)
        largest = float(grads.abs().max()) if grads.numel() else 0.0
        is_clipped = torch.tensor([int(0 < largest < ANCHOR_GRAD / 2)])
        if is_first:
            is_clipped = backend.replicas.max(backend.owners.max(is_clipped))
        if not is_clipped.any():
            return
        message = (
            "gradients were clipped outside of SeftOptimizer (torch.nn.utils.clip_grad_norm_, "
            "accelerator.clip_grad_norm_, Trainer's max_grad_norm or DeepSpeed's gradient_clipping), which has no "
            "effect: they do not see the gradients of deltas, and the norm that they return means nothing"
        )
        if is_first and max_grad_norm is None and "deepspeed" not in sys.modules:
            self._has_stepped = False
            raise ValueError(
                f"{message}. Pass SeftOptimizer(..., max_grad_norm=1.0) and remove the other clipping; seft.grad_norm "
                "is the norm. With transformers.Trainer, SeftCallback does this (seft_dist.integrations.transformers)"
            )
        self._has_warned = True
        if backend.owners.rank == 0 and backend.replicas.rank == 0:
            own = "does not clip" if max_grad_norm is None else f"clips to max_grad_norm={max_grad_norm:g}"
            text = f"{message}. SeftOptimizer itself {own}; seft.grad_norm is the norm"
            warnings.warn(text, SeftWarning, stacklevel=LEVEL)
