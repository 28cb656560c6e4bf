"""Hashes and sketches that do not depend on how a weight is divided.

The sum over any intervals is the whole's (wrapping). Everything is int64 and added up exactly, so neither the order of
positions nor the number of ranks shows in a bit.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from seft_dist.sparsity.scores import mix

BUCKETS = 8
"""Length of a sketch. Distances between such sketches are off by a quarter, typically."""
SCALE = 2.0**40
"""Number of units in 1: values are rounded to 1 / SCALE, about 1e-12, so that their sums are exact."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ON_CPU, _ON_DEVICE = 1 << 14, 1 << 22  # a piece's intermediate results stay in the cache: 14 times faster on a CPU


def hash_of_set(positions: Tensor) -> Tensor:
    """Hash a set of positions, int64 [].

    Args:
        positions: [k], integers, in any order.
    """
    return _sum(mix(part.to(torch.int64)).sum() for part in pieces(positions))


def hash_of_entries(positions: Tensor, values: Tensor) -> Tensor:
    """Hash the bits of values together with their positions, int64 [].

    Args:
        positions: [k], integers, in any order.
        values: [k], any dtype; 0 and -0 differ.
    """
    parts = zip(pieces(positions), pieces(values.view(_BITS[values.element_size()])), strict=True)
    return _sum(mix(mix(where.to(torch.int64)) + what).sum() for where, what in parts)


def hash_of_weight(weight: Tensor, start: int) -> Tensor:
    """Hash the bits of an interval's weights, int64 []; positions with the value 0 add nothing.

    Args:
        weight: [n], any dtype.
        start: Flat position of the interval's first weight.
    """
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    for piece in pieces(weight.view(_BITS[weight.element_size()])):
        filled = piece.nonzero().view(-1)
        total += mix(mix(filled + start) + piece[filled]).sum()
        start += piece.numel()
    return total


def fingerprint(weight: Tensor, start: int) -> Tensor:
    """Hash the non-zero weights of an interval, int64 []. It does not depend on the dtype that holds the values.

    Args:
        weight: [n], in the model's dtype.
        start: Flat position of the first.
    """
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    for piece in pieces(weight):
        active = piece.nonzero().view(-1)
        values = piece[active].float().view(torch.int32).to(torch.int64)
        total += (mix(active + start) * (values | 1 << 32)).sum()
        start += piece.numel()
    return total


def sketch(positions: Tensor, values: Tensor | None = None) -> Tensor:
    """Sum values with random signs a few times, so that ``distance`` can estimate how far two vectors are apart.

    Args:
        positions: [k], integers, in any order.
        values: fp32 [k]; None: 1 at each position (then the sketch is of a set, in whole numbers).

    Returns:
        int64 [BUCKETS]; if values are given, in units of 1 / SCALE.

    Source: the count sketch (Charikar, Chen, Farach-Colton, ICALP 2002).
    """
    total = torch.zeros(BUCKETS, dtype=torch.int64, device=positions.device)
    others = pieces(values) if values is not None else None
    for where in pieces(positions):
        drawn = mix(~where.to(torch.int64))
        term = (drawn >> 32 & 1) * 2 - 1
        if others is not None:
            term = term * (next(others).double() * SCALE).round().to(torch.int64)
        total.index_add_(0, drawn & BUCKETS - 1, term)
    return total


def distance(first: list[int], second: list[int]) -> float:
    """Estimate the L2 distance of two vectors from their sketches, in the sketches' units.

    For sketches of sets, its square estimates the number of positions that are in one of the two sets only.
    """
    return float(float(sum((a - b) ** 2 for a, b in zip(first, second, strict=True))) ** 0.5)


def pieces(values: Tensor) -> Iterator[Tensor]:
    """Divide a tensor [n] into parts whose intermediate results stay in the cache."""
    return iter(values.split(_ON_CPU if values.device.type == "cpu" else _ON_DEVICE))


def _sum(terms: Iterator[Tensor]) -> Tensor:
    total = next(terms)  # split() gives one empty piece of an empty tensor
    for term in terms:
        total = total + term
    return total
