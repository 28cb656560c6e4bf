"""Whether a step's gradient may be used, decided where the gradient is: the host need not wait for it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seft_dist.backends import Backend
from seft_dist.optim.window import Window


@dataclass(frozen=True)
class Verdict:
    """About one step, the same on every rank."""

    step: int
    wrong: Tensor
    """bool [targets]: not finite."""
    is_finite: Tensor
    """bool []: all of them are."""
    norm: Tensor
    """fp64 [], global norm of the deltas' gradient."""
    told: Tensor
    """``is_finite`` on its way to the host; there once ``event`` is."""
    event: torch.cuda.Event | None

    @property
    def ok(self) -> bool:
        """Whether all are finite. Waits until the device knows, not for what it was given to do since."""
        if self.event is not None:
            self.event.synchronize()
        return bool(self.told)

    def refuse(self, names: list[str]) -> None:
        """Stop here if something is not finite. Waits as ``ok``.

        Args:
            names: Of the targets.

        Raises:
            FloatingPointError: Something is not finite.
        """
        if self.ok:
            return
        found = [name for name, is_wrong in zip(names, self.wrong.tolist(), strict=True) if is_wrong]
        raise FloatingPointError(
            f"step {self.step}: the gradient of {found[0]} is not finite ({len(found)} of {len(names)} layers); "
            "nothing was changed. Lower the learning rate, or look at this batch"
        )


def judge(backend: Backend, step: int, grads: Sequence[Tensor], windows: Sequence[Window | None]) -> Verdict:
    """Find out what all ranks' gradients are like. Collective; does not wait for the device.

    Args:
        backend: Knows the ranks.
        step: Counted from 1.
        grads: Own entries' gradient of each target, fp32, averaged over ranks.
        windows: Of each target; its pending step must be finite as well.
    """
    # one call for all layers, as torch's own clip_grad_norm_ does it
    norms = torch.stack(torch._foreach_norm(list(grads), dtype=torch.float64))
    others = torch.zeros_like(norms)
    for i, window in enumerate(windows):
        if window is not None:
            others[i] = window.is_finite().logical_not()
    squared, others = backend.owners.sum(torch.stack([norms.square(), others]))
    wrong = squared.isfinite().logical_not() | others.bool()
    is_finite, event = wrong.any().logical_not(), None
    told = is_finite
    if norms.device.type == "cuda":  # never run on a GPU
        told = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(is_finite, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    return Verdict(step, wrong, is_finite, squared.sum().sqrt(), told, event)
