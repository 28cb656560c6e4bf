"""Estimates of how far rounding can move the scores of an evolution, by which near-ties differ from choices.

They are made only where near-ties are counted.

A gradient is a sum over tokens. Where its terms cancel it is small, but the error of the sum is that of its terms: as
large as at a position of the same row and column whose terms do not cancel. So an error is a share of the value and of
what is typical of its row and column, never of a score alone.
"""

import torch
from torch import Tensor

from seft_dist.backends import Backend
from seft_dist.config import SeftConfig
from seft_dist.optim.delta import Columns
from seft_dist.optim.window import Window
from seft_dist.sparsity import scores

ROUNDING = 2.0**-12
"""Error of an fp32 gradient or delta, as a share of itself and of what is typical (measured: docs/numerics.md)."""
_BF16 = 2.0**-8
"""The same where gradients are kept in bf16: two of its steps."""


class Rounding:
    """Errors of the scores that the criteria rank by. Lists have one item for each target."""

    def __init__(self, backend: Backend, config: SeftConfig, windows: list[Window], entries: list[Columns]) -> None:
        """Compute what is typical of each row and column. Collective; one sum of a few numbers for each of them.

        Args:
            backend: Knows which rank owns which positions.
            config: The criteria.
            windows: Statistics of each target, after ``Window.reduce_factors``.
            entries: The own deltas of each target, before any is dropped.
        """
        self._backend, self._config, self._windows = backend, config, windows
        self._share = _BF16 if config.window_store == "bf16" else ROUNDING
        needs = config.grow != "random" or config.adapts_by == "sensitivity" or config.drop == "movement"
        own = [torch.cat([*self._sums(i, needs), self._update_sums(entries[i])]) for i in range(len(windows))]
        sums = backend.owners.sum(torch.cat(own)).split([len(part) for part in own])
        self._typical, self._update = [], []
        for (rows, cols), part in zip(backend.shapes, sums, strict=True):
            row, row_count, col, col_count, update = part.split([rows, rows, cols, cols, 3])
            mean = (row.sum() / row_count.sum().clamp(min=1)).clamp(min=torch.finfo(torch.float64).tiny)
            row, col = row / row_count.clamp(min=1), col / col_count.clamp(min=1)
            self._typical.append((row.float(), (col / mean).float()))
            delta, root = (update[:2] / update[2].clamp(min=1)).sqrt().tolist()
            self._update.append((delta, root))

    def _sums(self, i: int, needed: bool) -> list[Tensor]:
        """Return the gradient's sum of squares and number of non-zeros in each row, then in each column; fp64."""
        (rows, cols), interval = self._backend.shapes[i], self._backend.interval(i)
        sums = [
            torch.zeros(size, dtype=torch.float64, device=self._backend.device) for size in (rows, rows, cols, cols)
        ]
        if needed and len(interval):
            gradient = self._windows[i].gradient()
            first, last = interval.start // cols, -(-interval.stop // cols)
            whole = gradient.new_zeros((last - first) * cols)
            whole[interval.start - first * cols :][: len(interval)] = gradient
            whole = whole.view(-1, cols)
            for at, values in ((0, whole.square()), (1, whole != 0)):
                sums[at][first:last] = values.sum(1, dtype=torch.float64)
                sums[2 + at] += values.sum(0, dtype=torch.float64)
        return sums

    def _update_sums(self, entries: Columns) -> Tensor:
        root = self._root(entries)
        return torch.stack([entries.values.square().sum(), root.square().sum(), (entries.age > 0).sum()]).double()

    def _root(self, entries: Columns) -> Tensor:
        """Return the size of each entry's gradients, up to a factor that is much the same for all, fp32 [k]."""
        return (entries.exp_avg_sq / entries.age.clamp(min=1)).sqrt()

    def _of_gradient(self, i: int) -> Tensor:
        return (self._windows[i].gradient().abs() + self._typical_of(i)).mul_(self._share)

    def _typical_of(self, i: int) -> Tensor:
        interval = self._backend.interval(i)
        return scores.factored(*self._typical[i], interval.start, len(interval))

    def _of_deltas(self, i: int, entries: Columns) -> Tensor:
        # Adam divides: an update from small gradients has an error as large as that of large ones, over a smaller root.
        delta, root = self._update[i]
        amplified = (ROUNDING * root / self._root(entries)).clamp(max=2.0) * delta
        return entries.values.abs() * ROUNDING + torch.where(entries.values != 0, amplified, 0.0)

    def of_weights(self, i: int, weight: Tensor, offsets: Tensor, entries: Columns) -> Tensor:
        """Return the errors of a layer's own weights, fp32 [n]; arguments as of ``of_adapt``."""
        errors = weight.abs() * ROUNDING  # also of those whose delta became part of the base
        errors[offsets] += self._of_deltas(i, entries)
        return errors

    def of_drop(self, i: int, offsets: Tensor, entries: Columns) -> Tensor:
        """Return the errors of the scores by which a layer's own deltas are dropped, fp32 [k]; random ones have none.

        Args:
            i: Number of the target.
            offsets: int64 [k], offsets of the deltas in the own interval.
            entries: The own deltas.
        """
        if self._config.drop == "random":
            return torch.zeros_like(entries.values)
        errors = self._of_deltas(i, entries)
        if self._config.drop == "magnitude":
            return errors
        gradient = self._windows[i].gradient()[offsets].abs()
        return errors * gradient + entries.values.abs() * self._of_gradient(i)[offsets]

    def of_grow(self, i: int) -> Tensor:
        """Return the errors of the scores by which a layer's own positions grow, fp32 [n]; random ones have none."""
        interval = self._backend.interval(i)
        if self._config.grow == "random":
            return torch.zeros(len(interval), dtype=torch.float32, device=self._backend.device)
        if self._config.grow == "gradient":
            return self._of_gradient(i)
        window = self._windows[i]
        assert window.rows is not None and window.cols is not None, "criterion without its statistics"
        root = scores.momentum(window.rows, window.cols, interval.start, len(interval)).sqrt()
        return 2 * root * (root + self._typical_of(i)) * self._share

    def of_adapt(self, i: int, weight: Tensor, norms: Tensor | None, offsets: Tensor, entries: Columns) -> Tensor:
        """Return the errors of the scores by which a layer's own positions leave the mask, fp32 [n].

        Args:
            i: Number of the target.
            weight: fp32 [n], the own weights before any cast.
            norms: fp32 [experts, in], norms of the inputs, for criterion "activation".
            offsets: int64 [k], offsets of the deltas in the own interval.
            entries: The own deltas.
        """
        errors = self.of_weights(i, weight, offsets, entries)
        if self._config.adapt == "sensitivity":
            return self._windows[i].gradient().abs().mul_(errors) + weight.abs() * self._of_gradient(i)
        if self._config.adapt == "curvature":
            return self.of_price(i, weight, errors)
        if norms is not None:
            start, rows = self._backend.interval(i).start, self._backend.shapes[i][0]
            return scores.activation(errors + weight.abs() * ROUNDING, norms, start, rows)
        return errors

    def of_price(self, i: int, weight: Tensor, errors: Tensor) -> Tensor:
        """Return the errors of ``scores.curvature`` of a layer's own positions, fp32 [n].

        Args:
            i: Number of the target.
            weight: fp32 [n], weights at these positions.
            errors: fp32 [n], their errors.
        """
        # of h w^2 / 2: twice the error of w, and those of both factors of h
        doubled = (2 * errors + 2 * ROUNDING * weight.abs()) * weight.abs()
        return scores.curvature(doubled.sqrt_(), *self._windows[i].moments(), self._backend.interval(i).start)
