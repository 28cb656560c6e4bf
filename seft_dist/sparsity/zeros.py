"""How many weights are exactly 0."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class ZeroCount:
    """Zeros of one weight."""

    name: str
    """Module name of the linear."""
    numel: int
    """Weights it has."""
    zeros: int
    """Weights that are exactly 0."""

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.zeros / self.numel


def count_zeros(targets: dict[str, nn.Linear]) -> list[ZeroCount]:
    """Count the zeros of each target. Local; the weights must be whole.

    Args:
        targets: From ``find_targets``.
    """
    return [ZeroCount(name, linear.weight.numel(), int((linear.weight == 0).sum())) for name, linear in targets.items()]


def total_sparsity(counts: list[ZeroCount]) -> float:
    """Share of zeros over all weights. Local."""
    return sum(count.zeros for count in counts) / sum(count.numel for count in counts)
