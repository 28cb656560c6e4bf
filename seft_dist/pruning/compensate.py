"""Weights that stay make up for those that were pruned, by least squares on what each linear computes.

For a row w of a weight with the inputs X, of which the positions K stay, the new row v minimises

    |X v - X w|^2 + damping |v - w|^2     with v = 0 outside of K

SparseGPT solves this only for later columns; here all that stay are solved for at once, by conjugate gradients. An
iteration is one product of rows and the Hessian X^T X, and no Hessian is factored. Rows are independent of each other.

Which weights matter least changes with those that make up for others. So a mask can be chosen in rounds:

    weights     5 4 3 2 1
    round 1     5 4 3 2 0     the smallest is pruned, the others are solved for:   5 4 1 3 0
    round 2     5 4 0 3 0     1 has become the smallest, not 2

Sources: the problem, and pruning in rounds, are those of Boza, "Fast and Effective Weight Update for Pruned Large
    Language Models", arXiv 2401.02938, who solves it by ADMM; the solver that of Hestenes, Stiefel, "Methods of
    Conjugate Gradients for Solving Linear Systems", 1952; the schedule that of Zhu, Gupta, "To Prune, or Not to Prune",
    arXiv 1710.01878.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from seft_dist.pruning.masks import TILE

_ITERATIONS = 40
"""Most iterations. The error falls in each, so fewer give a weight that is less good, not a wrong one."""
_BETWEEN = 10
"""Most iterations between two rounds: after the next one they begin where these ended."""
_ENOUGH = 1e-6
"""A row is done when its gradient is this share of that at the start, in L2 norm."""
_FLAT = 1e-5
"""A row is done, too, where the curvature along its direction is this share of the mean: in fp32 it is rounding, and a
step could have any length."""


def scaled_hessian(hessian: Tensor, dampening: float) -> tuple[Tensor, Tensor]:
    """Dampen a Hessian, and scale its rows and columns such that its diagonal is 1.

    Args:
        hessian: X^T X up to a factor, fp64 [in, in]; it is changed.
        dampening: Share of its mean diagonal that is added to the diagonal.

    Returns:
        The scaled Hessian, fp32 [in, in]; and the root of the diagonal before, fp32 [in], by which weights are
        multiplied to fit it. Inputs that are always 0 without dampening have root 1 and a row of zeros.
    """
    diagonal = hessian.diagonal()
    diagonal += dampening * diagonal.mean()
    root = diagonal.sqrt()
    root[root == 0] = 1
    hessian.div_(root).div_(root.unsqueeze(1))
    return hessian.float(), root.float()


def prune_in_rounds(
    weight: Tensor, choose: Callable[[Tensor, float], Tensor], hessian: Tensor, root: Tensor, rounds: int
) -> Tensor:
    """Prune more and more weights, and change those that stay after each round. Collective if ``choose`` is.

    Args:
        weight: Rows of the weight before pruning, fp32 [rows, in]. Its zeros stay.
        choose: Function from the weights of a round and the share of the zeros that it ends with, above 0 and at most
            1, to those that are then pruned, bool [rows, in].
        hessian: From ``scaled_hessian``, fp32 [in, in].
        root: From ``scaled_hessian``, fp32 [in].
        rounds: Number of rounds.

    Returns:
        The weights, 0 where they are pruned, fp32 [rows, in].
    """
    new = weight
    for left in range(rounds - 1, -1, -1):
        pruned = choose(new, 1 - (left / rounds) ** 3) | (weight == 0)
        new = compensated(weight, pruned, hessian, root, start=new, iterations=_BETWEEN if left else _ITERATIONS)
    return new


def compensated(
    weight: Tensor,
    pruned: Tensor,
    hessian: Tensor,
    root: Tensor,
    *,
    start: Tensor | None = None,
    iterations: int = _ITERATIONS,
) -> Tensor:
    """Change the weights that stay such that the outputs change least. Local.

    Rows are solved in tiles that are never divided between ranks, so the result does not depend on their number.

    Args:
        weight: Rows of the weight before pruning, fp32 [rows, in].
        pruned: True where a weight becomes or stays 0, bool [rows, in].
        hessian: From ``scaled_hessian``, fp32 [in, in].
        root: From ``scaled_hessian``, fp32 [in].
        start: Weights from which the solution is sought, fp32 [rows, in]; None: ``weight``.
        iterations: Most iterations.

    Returns:
        The weights, 0 where they are pruned, fp32 [rows, in].
    """
    new = (weight if start is None else start).masked_fill(pruned, 0.0)
    for old, gone, tile in zip(weight.split(TILE), pruned.split(TILE), new.split(TILE), strict=True):
        tile += _solve((old - tile).mul_(root), (~gone).float(), hessian, iterations).div_(root)
        # A weight that stays may not be 0, it would count as pruned
        tile.copy_(torch.where(tile == 0, old, tile).masked_fill_(gone, 0.0))
    return new


def _solve(lost: Tensor, kept: Tensor, hessian: Tensor, iterations: int) -> Tensor:
    """Minimise (u - l) H (u - l) over changes u of the kept positions of each row, by conjugate gradients from 0 on.

    Args:
        lost: What the scaled weights l have lost so far, fp32 [rows, in].
        kept: 1 where a weight stays, else 0, fp32 [rows, in].
        hessian: Scaled Hessian, fp32 [in, in].
        iterations: Most iterations.

    Returns:
        Scaled changes u, 0 where nothing stays, fp32 [rows, in].
    """
    change = torch.zeros_like(lost)
    residual = (lost @ hessian).mul_(kept)
    direction, size = residual.clone(), _squares(residual)
    enough = size * _ENOUGH**2
    active = size > enough
    for _ in range(iterations):
        curved = (direction @ hessian).mul_(kept)
        along = (direction * curved).sum(1, keepdim=True)
        active &= along > _FLAT * _squares(direction)
        if not bool(active.any()):
            break
        step = torch.where(active, size / along, 0.0)
        change.addcmul_(direction, step)
        residual.addcmul_(curved, step, value=-1)
        before, size = size, _squares(residual)
        active &= size > enough
        direction = residual + direction * torch.where(active, size / before, 0.0)
    return change


def _squares(rows: Tensor) -> Tensor:
    return rows.square().sum(1, keepdim=True)
