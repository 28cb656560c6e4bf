"""Scores by size alone."""

from torch import Tensor


def magnitude_scores(weight: Tensor) -> Tensor:
    """|weight| in fp32.

    Args:
        weight: [out, in], any float type.

    Returns:
        [out, in], fp32, not negative.
    """
    return weight.detach().float().abs()
