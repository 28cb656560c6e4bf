"""Scores of the interchangeable criteria. A drop or adapt score is small, a grow score large, for the entry that moves.

Shapes: n positions of one rank's interval, k entries of the support in it. Everything is fp32 and finite.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1


def drop_magnitude(delta: Tensor) -> Tensor:
    """Return |delta| of each entry, fp32 [k]."""
    return delta.abs()


def drop_movement(delta: Tensor, grad: Tensor) -> Tensor:
    """Return -delta x accumulated gradient, fp32 [k]: small where the gradient pulls the delta back to 0.

    Args:
        delta: fp32 [k].
        grad: fp32 [k], accumulated over the window at the same entries.

    Source: the importance of Sanh et al. (arXiv 2005.07683), of deltas instead of weights.
    """
    return -(delta * grad)


def grow_gradient(grad: Tensor) -> Tensor:
    """Return |accumulated gradient| of each position, fp32 [n]."""
    return grad.abs()


def sensitivity(weight: Tensor, grad: Tensor) -> Tensor:
    """Return |weight x accumulated gradient| of each position, fp32 [n]."""
    return (weight * grad).abs()


def activation(weight: Tensor, norms: Tensor, start: int, rows: int) -> Tensor:
    """Return |weight| x L2 norm of its input, fp32 [n] (Wanda's score, arXiv 2306.11695).

    Args:
        weight: fp32 [n], the interval's weights.
        norms: fp32 [in] or [experts, in], norm of each input feature over the window.
        start: Flat position of the interval's first weight; its input is start mod in.
        rows: Number of rows of the whole weight, of all experts together.
    """
    return _interval(torch.mul, norms.new_ones(1).expand(rows), norms, start, weight.numel()).mul_(weight.abs())


def curvature(weight: Tensor, rows: Tensor, cols: Tensor, start: int) -> Tensor:
    """Return h x weight^2 / 2, fp32 [n]: how much the loss may rise where a weight becomes 0.

    The curvature h = row x column is that of a layer whose inputs and output gradients are independent. The first-order
    term, weight x gradient, is left out. Over the tokens of a window the gradient of one position is nearly noise, of a
    size sqrt(h / tokens): for the small weights that could leave, that is far more than h x weight^2 / 2, and the
    ranking would be random (docs/results.md#the-price-of-a-swap).

    Args:
        weight: fp32 [n], the interval's weights.
        rows: fp32 [out], of all experts one after another: sum over tokens of the squared gradient of each output.
        cols: fp32 [in] or [experts, in], sum over tokens of each squared input.
        start: Flat position of the interval's first weight.

    Source: the second-order term of LeCun et al. (Optimal Brain Damage), with the factors of Martens and Grosse (arXiv
    1503.05671).
    """
    return _interval(torch.mul, rows, cols, start, weight.numel()).mul_(weight).mul_(weight).div_(2)


def momentum(rows: Tensor, cols: Tensor, start: int, numel: int) -> Tensor:
    """Return the second-moment estimate min(row, column) of each position, fp32 [numel].

    Args:
        rows: fp32 [out], SM3's row accumulator.
        cols: fp32 [in], SM3's column accumulator.
        start: Flat position of the interval's first weight.
        numel: Number of positions.

    Source: Anil et al., SM3-II (arXiv 1901.11150).
    """
    return _interval(torch.minimum, rows, cols, start, numel)


def factored(rows: Tensor, cols: Tensor, start: int, numel: int) -> Tensor:
    """Return sqrt(row x column), fp32 [numel].

    It is the size of a weight gradient whose terms have random signs, up to a factor.

    Args:
        rows: fp32 [out], of all experts one after another: sum over tokens of the squared gradient of each output.
        cols: fp32 [in] or [experts, in], sum over tokens of each squared input.
        start: Flat position of the interval's first weight.
        numel: Number of positions.
    """
    return _interval(torch.mul, rows.sqrt(), cols.sqrt(), start, numel)


def _interval(join: Callable[..., Tensor], rows: Tensor, cols: Tensor, start: int, numel: int) -> Tensor:
    """Return join(row, column) at ``numel`` flat positions from ``start`` on, fp32 [numel].

    Only the rows that these positions touch are computed. All experts have the same number of rows, each has columns
    of its own.
    """
    cols = cols.view(-1, cols.shape[-1])
    width, height = cols.shape[1], len(rows) // len(cols)
    first, last = start // width, -(-(start + numel) // width)
    whole = rows.new_empty(last - first, width)
    for expert in range(first // height, -(-last // height)):
        begin, end = max(first, expert * height), min(last, (expert + 1) * height)
        join(rows[begin:end].unsqueeze(1), cols[expert], out=whole[begin - first : end - first])
    return whole.view(-1)[start - first * width :][:numel]


def uniform(positions: Tensor, *keys: int) -> Tensor:
    """Draw pseudo-random numbers that depend on position and keys only, so not on the layout.

    Args:
        positions: int64, flat positions of a weight.
        keys: Integers, e.g. seed, layer, step, purpose.

    Returns:
        fp32 in [0, 1), 2^24 distinct values, shape of ``positions``.

    Source: the SplitMix64 finalizer.
    """
    state = 0
    for key in keys:
        state = _mix_int(state + key & _MASK64)
    bits = mix(positions + (state - (1 << 64) if state >> 63 else state))
    return ((bits >> 40) & 0xFFFFFF).to(torch.float32) / (1 << 24)


def _mix_int(x: int) -> int:
    x = x + 0x9E3779B97F4A7C15 & _MASK64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK64
    return x ^ x >> 31


def mix(x: Tensor) -> Tensor:
    """Scramble integers, int64 of any shape, without losing any (SplitMix64)."""

    # int64 arithmetic wraps as uint64 does; a logical shift is an arithmetic one with the copied sign bits cut off.
    def shift(value: Tensor, by: int) -> Tensor:
        return (value >> by) & ((1 << (64 - by)) - 1)

    x = x + (0x9E3779B97F4A7C15 - (1 << 64))
    x = (x ^ shift(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ shift(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ shift(x, 31)
