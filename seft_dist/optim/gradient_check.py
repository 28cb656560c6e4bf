"""Checking that a step's gradient is finite, where the gradient is: the host need not wait for the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seft_dist.backends import Backend
from seft_dist.optim.window import Window


@dataclass(frozen=True)
class GradientCheck:
    """The result for one step, the same on every rank."""

    step: int
    nonfinite: Tensor
    """bool [targets, then vectors], True where the gradient is not finite."""
    is_finite: Tensor
    """bool [], True if the whole gradient is finite; on the device."""
    norm: Tensor
    """fp64 [], global norm of the gradient of deltas, norms and biases."""
    is_finite_on_host: Tensor
    """Copy of ``is_finite`` in host memory; complete once ``event`` is."""
    event: torch.cuda.Event | None

    @property
    def passed(self) -> bool:
        """True if the gradient is finite. Waits until the device knows, not for the work it has been given since."""
        if self.event is not None:
            self.event.synchronize()
        return bool(self.is_finite_on_host)

    def clipping_factor(self, max_norm: float | None) -> Tensor:
        """Return the factor that clips the gradient to a global norm, fp32 [] on the device.

        Args:
            max_norm: Largest norm; None: nothing is clipped.
        """
        if max_norm is None:
            return torch.ones((), dtype=torch.float32, device=self.norm.device)
        return (max_norm / (self.norm + 1e-6)).clamp(max=1.0).float()

    def raise_if_nonfinite(self, names: list[str]) -> None:
        """Stop here if a gradient is not finite. Waits as ``passed`` does.

        Args:
            names: Names of the targets, then of the vectors.

        Raises:
            FloatingPointError: A gradient is not finite.
        """
        if self.passed:
            return
        layers = [name for name, is_nonfinite in zip(names, self.nonfinite.tolist(), strict=True) if is_nonfinite]
        raise FloatingPointError(
            f"step {self.step}: the gradient of {layers[0]} is not finite ({len(layers)} of {len(names)} layers); "
            "nothing was changed. Lower the learning rate, or look at this batch"
        )


def check_gradient(
    backend: Backend,
    step: int,
    grads: Sequence[Tensor],
    windows: Sequence[Window | None],
    vectors: Sequence[Tensor] = (),
) -> GradientCheck:
    """Compute the global norm of all ranks' gradients, and whether they are finite. Collective.

    Does not wait for the device.

    Args:
        backend: Knows the ranks.
        step: Optimizer step, counted from 1.
        grads: Own entries' gradient of each target, fp32, averaged over ranks.
        windows: Window of each target; its pending step must be finite as well.
        vectors: Gradient of each trained norm and bias, fp32, averaged over ranks, the same on every rank.
    """
    # one call for all layers, as torch's own clip_grad_norm_ does it
    norms = torch.stack(torch._foreach_norm(list(grads), dtype=torch.float64))
    in_windows = torch.zeros_like(norms)
    for i, window in enumerate(windows):
        if window is not None:
            in_windows[i] = window.is_finite().logical_not()
    squared, in_windows = backend.owners.sum(torch.stack([norms.square(), in_windows]))
    if any(window is not None for window in windows):  # a window's sums are of this replica's tokens only
        in_windows = backend.replicas.max(in_windows)
    nonfinite = squared.isfinite().logical_not() | in_windows.bool()
    if vectors:
        others = torch.stack(torch._foreach_norm(list(vectors), dtype=torch.float64)).square()
        squared, nonfinite = torch.cat([squared, others]), torch.cat([nonfinite, others.isfinite().logical_not()])
    is_finite, event = nonfinite.any().logical_not(), None
    on_host = is_finite
    if norms.device.type == "cuda":  # never run on a GPU
        on_host = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(is_finite, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    return GradientCheck(step, nonfinite, is_finite, squared.sum().sqrt(), on_host, event)
