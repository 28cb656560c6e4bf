"""Means over seeds, and confidence intervals of paired differences: Student's t without a library for it."""

import math
import statistics
from collections.abc import Sequence

from typing_extensions import TypedDict

CONFIDENCE = 0.95


class Spread(TypedDict):
    """A number over seeds."""

    mean: float
    deviation: float | None
    """Standard deviation of a sample; None: one seed, or a number that is not finite."""
    count: int


class Difference(TypedDict):
    """Differences between a method and the reference, paired by seed."""

    mean: float
    low: float | None
    """Lower end of the interval that holds the true mean with CONFIDENCE, for normal differences; None: one seed."""
    high: float | None
    count: int


def spread(values: Sequence[float]) -> Spread | None:
    """Compute mean and standard deviation; None without values."""
    if not values:
        return None
    finite = all(math.isfinite(value) for value in values)
    deviation = statistics.stdev(values) if len(values) > 1 and finite else None
    return Spread(mean=statistics.fmean(values), deviation=deviation, count=len(values))


def difference(values: Sequence[float], others: Sequence[float]) -> Difference | None:
    """Compute the mean of paired differences with its t interval.

    Args:
        values: Values of the method.
        others: Values of the reference, for the same seeds in the same order.

    Returns:
        None without values, or where one is not finite.
    """
    apart = [value - other for value, other in zip(values, others, strict=True)]
    if not apart or not all(math.isfinite(value) for value in apart):
        return None
    mean, count = statistics.fmean(apart), len(apart)
    if count == 1:
        return Difference(mean=mean, low=None, high=None, count=1)
    half = t_quantile(0.5 + CONFIDENCE / 2, count - 1) * statistics.stdev(apart) / math.sqrt(count)
    return Difference(mean=mean, low=mean - half, high=mean + half, count=count)


def t_quantile(share: float, freedom: int) -> float:
    """Compute the value below which a share of Student's t distribution lies.

    Args:
        share: 0.5 to below 1.
        freedom: Degrees of freedom, at least 1.
    """
    low, high = 0.0, 1.0
    while t_share(high, freedom) < share:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_share(middle, freedom) < share else (low, middle)
    return (low + high) / 2


def t_share(value: float, freedom: int) -> float:
    """Compute the share of Student's t distribution below a value, by the finite sums for whole degrees of freedom.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.

    Args:
        value: 0 or larger.
        freedom: Degrees of freedom, at least 1.
    """
    angle = math.atan(value / math.sqrt(freedom))
    square = math.cos(angle) ** 2
    term = total = math.cos(angle) if freedom % 2 else 1.0
    for k in range(1 + freedom % 2, freedom - 2, 2):
        term *= square * k / (k + 1)
        total += term
    if freedom == 1:
        return 0.5 + angle / math.pi
    inside = (angle + math.sin(angle) * total) * 2 / math.pi if freedom % 2 else math.sin(angle) * total
    return 0.5 + inside / 2
