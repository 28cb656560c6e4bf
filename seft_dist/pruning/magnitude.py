"""Magnitude pruning: a weight is scored by its absolute value."""

from torch import Tensor


def magnitude_scores(weight: Tensor) -> Tensor:
    """Score weights by their absolute values.

    Args:
        weight: [out, in], of any floating-point dtype.

    Returns:
        [out, in], fp32, not negative.
    """
    return weight.detach().float().abs()
