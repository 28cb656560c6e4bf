"""Groups of M consecutive positions, of an N:M pattern: ranking inside each, and what is active in each.

A row's length is a multiple of M, so group g of a flattened weight is positions g M .. g M + M - 1.
"""

import torch
from torch import Tensor

from seft_dist.sparsity import scores
from seft_dist.sparsity.partition import Interval
from seft_dist.sparsity.selection import INELIGIBLE


def extent(interval: Interval, size: int) -> Interval:
    """The positions of all groups that an interval touches. Local.

    Args:
        interval: Of a flattened weight.
        size: M.
    """
    return Interval(interval.start // size * size, -(-interval.stop // size) * size)


def counts(mask: Tensor, size: int) -> Tensor:
    """True positions in each group, int64 [n / size]. Local.

    Args:
        mask: bool [n], whole groups.
        size: M.
    """
    return mask.view(-1, size).sum(1)


def best(key: Tensor, limits: Tensor, size: int) -> Tensor:
    """The largest keys of each group, smaller positions first among ties. Local.

    Args:
        key: int32 [n], whole groups; ineligible ones are never among them.
        limits: int64 [n / size], how many of each group; fewer are given if fewer compete.
        size: M.

    Returns:
        bool [n].
    """
    taken = _ranks(key, size) < limits
    return taken.T.reshape(-1) & (key != INELIGIBLE)


def close_calls(key: Tensor, limits: Tensor, size: int, near: int) -> Tensor:
    """The last one that ``best`` takes of each group, if the first one that it leaves is almost equal. Local.

    Args:
        key: As for ``best``.
        limits: As for ``best``.
        size: M.
        near: Largest difference of two keys that counts as almost equal.

    Returns:
        bool [n].
    """
    ranks, across = _ranks(key, size), key.view(-1, size).T.long()
    is_last = ranks == limits - 1
    last = across.masked_fill(~is_last, 0).sum(0)
    next_one = across.masked_fill(ranks != limits, 0).sum(0)
    contested = (limits < size) & (next_one != INELIGIBLE) & (last - next_one <= near)
    return (is_last & contested).T.reshape(-1)


def _ranks(key: Tensor, size: int) -> Tensor:
    """Place of each key in its group, 0 for the first, int8 [size, groups]; size^2 / 2 comparisons, no sort."""
    across = key.view(-1, size).T.contiguous()
    ranks = torch.zeros(across.shape, dtype=torch.int8, device=key.device)
    for later in range(1, size):
        # of equal keys the earlier one comes first
        before = across[:later] >= across[later]
        ranks[later] += before.sum(0, dtype=torch.int8)
        ranks[:later] += ~before
    return ranks


def fingerprint(mask: Tensor, start: int, size: int) -> Tensor:
    """Hash of the number of active positions of every group, int64 []; the sum over intervals is the whole weight's. Local.

    Args:
        mask: bool [n], of an interval, which may begin and end inside groups.
        start: Flat position of the first.
        size: M.
    """
    return scores.mix((mask.nonzero().view(-1) + start) // size).sum()
