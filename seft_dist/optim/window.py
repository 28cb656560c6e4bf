"""What an evolution needs to know of the steps before it: dense statistics of one weight, as this rank's own shard.

A step's contribution counts only once the step succeeded: ``fold`` adds it, ``discard`` forgets it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from seft_dist.backends.base import Backend
from seft_dist.config import SeftConfig
from seft_dist.sparsity import scores


@dataclass(frozen=True)
class Needs:
    """Which statistics a configuration's criteria read."""

    dense: bool
    norms: bool
    squares: bool
    factored: bool

    @classmethod
    def of(cls, config: SeftConfig) -> "Needs":
        """Derive them. Local."""
        seeded, factored = config.moments == "seeded", config.grow == "momentum"
        dense = (
            seeded
            or factored
            or config.grow == "gradient"
            or config.adapt == "sensitivity"
            or config.drop == "movement"
        )
        return cls(dense, config.adapt == "activation", seeded, factored)


class Window:
    """Accumulated gradient of weight i over the steps of one window.

    Memory: 4 bytes for each own weight, 4 more between a backward and its step if the window has several steps, 4 more for
    seeded moments; the dense gradient itself exists during ``add`` only.
    """

    def __init__(self, backend: Backend, i: int, needs: Needs) -> None:
        self._backend, self._i, self._needs = backend, i, needs
        self.num_steps = 0
        """Steps folded in."""
        self.bytes_sent = 0
        """By this rank, for dense gradients."""
        self.total: Tensor | None = None
        """fp32 [own], sum over steps of the gradient averaged over ranks."""
        self.squares: Tensor | None = None
        """fp32 [own], sum over steps of its square (seeded moments)."""
        self.norms: Tensor | None = None
        """fp32 [in], sum of squares of the linear's input, this rank's tokens only (activation)."""
        self.rows: Tensor | None = None
        """fp32 [out], row accumulator (momentum); the same on every rank."""
        self.cols: Tensor | None = None
        """fp32 [in], column accumulator (momentum)."""
        self._step: Tensor | None = None
        self._step_norms: Tensor | None = None

    @property
    def needs_dense(self) -> bool:
        """Whether ``add`` must be called."""
        return self._needs.dense

    @property
    def needs_norms(self) -> bool:
        """Whether ``add_norms`` must be called."""
        return self._needs.norms

    def add(self, dense: Tensor) -> None:
        """Bring one backward's dense gradient to its owners. **Collective**.

        Args:
            dense: fp32 [out, in], this rank's.
        """
        sent = self._backend.bytes_sent
        own = self._backend.reduce_dense(self._i, dense).to(self._backend.device)
        self.bytes_sent += self._backend.bytes_sent - sent
        self._step = own if self._step is None else self._step.add_(own)

    def add_norms(self, x: Tensor) -> None:
        """Count one forward's input, [T, in]. Local."""
        if self.needs_norms:
            squared = x.float().square().sum(0)
            self._step_norms = squared if self._step_norms is None else self._step_norms + squared

    def is_finite(self) -> Tensor:
        """Whether the pending step may be folded, bool []. Local."""
        return torch.isfinite(self._step).all() if self._step is not None else torch.tensor(True)

    def discard(self) -> None:
        """Forget what was added since the last ``fold``. Local."""
        self._step = self._step_norms = None

    def fold(self) -> None:
        """Count the pending step. **Collective** for momentum, else local."""
        self.num_steps += 1
        if self._step_norms is not None:
            self.norms = self._step_norms if self.norms is None else self.norms + self._step_norms
        if self._needs.dense:
            step = self._step if self._step is not None else torch.zeros(self._numel, device=self._backend.device)
            if self._needs.squares:
                self.squares = step.square() if self.squares is None else self.squares.addcmul_(step, step)
            if self._needs.factored:
                self._fold_factored(step)
            self.total = step if self.total is None else self.total.add_(step)
        self.discard()

    @property
    def _numel(self) -> int:
        return len(self._backend.interval(self._i))

    def _fold_factored(self, step: Tensor) -> None:
        (rows, cols), start = self._backend.shapes[self._i], self._backend.interval(self._i).start
        if self.rows is None or self.cols is None:
            self.rows, self.cols = torch.zeros(rows, device=step.device), torch.zeros(cols, device=step.device)
        estimate = scores.momentum(self.rows, self.cols, start, step.numel()) + step.square()
        positions = torch.arange(start, start + step.numel(), device=step.device)
        for accumulator, index in ((self.rows, positions // cols), (self.cols, positions % cols)):
            accumulator.zero_().scatter_reduce_(0, index, estimate, "amax")
            self._backend.owners.max(accumulator)

    def input_norms(self) -> Tensor:
        """L2 norm of each input feature over the window and all ranks, fp32 [in]. **Collective**."""
        width = self._backend.shapes[self._i][1]
        squared = self.norms.clone() if self.norms is not None else torch.zeros(width, device=self._backend.device)
        return self._backend.replicas.sum(self._backend.owners.sum(squared)).sqrt()
