"""Groups of M consecutive positions in an N:M pattern: ranking inside each group, and counting active positions.

A row's length is a multiple of M, so group g of a flattened weight is positions g M .. g M + M - 1.
"""

import torch
from torch import Tensor

from seft_dist.sparsity import scores
from seft_dist.sparsity.partition import Interval
from seft_dist.sparsity.selection import INELIGIBLE, values_of


def extent(interval: Interval, size: int) -> Interval:
    """Return the positions of all groups that an interval touches.

    Args:
        interval: Positions of a flattened weight.
        size: M.
    """
    return Interval(interval.start // size * size, -(-interval.stop // size) * size)


def counts(mask: Tensor, size: int) -> Tensor:
    """Count the True positions in each group, int64 [n / size].

    Args:
        mask: bool [n], whole groups.
        size: M.
    """
    return mask.view(torch.uint8).view(-1, size).sum(1, dtype=torch.uint8).long()  # of booleans it takes 8 bytes each


def best(key: Tensor, limits: Tensor, size: int) -> Tensor:
    """Mark the largest keys of each group, smaller positions first among ties.

    Args:
        key: int32 [n], whole groups; ineligible ones are never among them.
        limits: int64 [n / size], number of keys of each group; fewer are marked if fewer compete.
        size: M.

    Returns:
        bool [n].
    """
    taken = _ranks(key, size) < limits
    return taken.T.reshape(-1) & (key != INELIGIBLE)


def near_ties(key: Tensor, limits: Tensor, size: int, errors: Tensor) -> Tensor:
    """Mark the positions that rounding could have moved into or out of those that ``best`` marks in their group.

    Args:
        key: int32 [n], whole groups.
        limits: int64 [n / size], number of keys of each group.
        size: M.
        errors: fp32 [n], how far rounding can move each score; positions with error 0 do not move.

    Returns:
        bool [n].
    """
    ranks, across = _ranks(key, size), key.view(-1, size).T.contiguous()

    def at(rank: Tensor) -> Tensor:
        """Return the value of each group at a place of its ranking; NaN where nothing competes for it."""
        here = ranks == rank
        return values_of(across.masked_fill(~here, 0).sum(0, dtype=torch.int32)).masked_fill(~here.any(0), torch.nan)

    # Of two that can change sides at least one is within its error of the middle.
    middle = (at(limits - 1) + at(limits)) / 2
    error = errors.view(-1, size).T
    near = ((values_of(across) - middle).abs() <= error) & (error > 0)
    return near.T.reshape(-1)


def _ranks(key: Tensor, size: int) -> Tensor:
    """Return the place of each key in its group, 0 for the first, int8 [size, groups].

    It takes size^2 / 2 comparisons and no sort.
    """
    across = key.view(-1, size).T.contiguous()
    ranks = torch.zeros(across.shape, dtype=torch.int8, device=key.device)
    for later in range(1, size):
        # of equal keys the earlier one comes first
        before = across[:later] >= across[later]
        ranks[later] += before.sum(0, dtype=torch.int8)
        ranks[:later] += ~before
    return ranks


def fingerprint(mask: Tensor, start: int, size: int) -> Tensor:
    """Hash the number of active positions of every group, int64 []; the sum over intervals is the whole weight's hash.

    Args:
        mask: bool [n], mask of an interval, which may begin and end inside groups.
        start: Flat position of the interval's first weight.
        size: M.
    """
    return scores.mix((mask.nonzero().view(-1) + start) // size).sum()
