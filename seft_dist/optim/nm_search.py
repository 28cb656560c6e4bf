"""Finding out whether a pruned model has an N:M pattern that nobody has named."""

import torch
from torch import Tensor

from seft_dist.backends import Backend
from seft_dist.optim.nm_groups import NMGroups
from seft_dist.sparsity import nm_pattern
from seft_dist.sparsity.bitmask import unpack

SIZES = range(2, 17)
"""Group sizes M that are looked for."""
_FULL = 0.95
"""Share of its N active positions that a group of an N:M model has at least, on average. In a model without a pattern
the fullest group has many more than the others."""
_LEAST_GROUPS = 4
"""Least number of groups in a row: one group alone is no pattern."""


def find_pattern(backend: Backend, masks: list[Tensor]) -> str | None:
    """Find the N:M pattern with the smallest groups that all targets have. Collective.

    Args:
        backend: Knows which rank owns which positions.
        masks: Packed mask of the own interval of each target, uint8.

    Returns:
        The pattern, e.g. "2:4"; None if there is none.
    """
    fullest = torch.tensor(_fullest_groups(backend, masks))
    most = backend.owners.max(fullest).tolist()
    for size, active in zip(SIZES, most, strict=True):
        if 0 < active < size:
            # Groups that ranks cut were left out. With them it must hold as well.
            pattern = f"{active}:{size}"
            if all(count <= active for _, count in NMGroups(backend, pattern).fullest(masks)):
                return pattern
    return None


def _fullest_groups(backend: Backend, masks: list[Tensor]) -> list[int]:
    """Return for each of ``SIZES`` the active positions of the fullest group on this rank; M where there is no pattern.

    Most models without a pattern show in their first layer that they have none.
    """
    widths = [width for _, width in backend.shapes]
    most = {
        size: 0 if all(width % size == 0 and width >= _LEAST_GROUPS * size for width in widths) else size
        for size in SIZES
    }
    for i, packed in enumerate(masks):
        sizes = [size for size in SIZES if most[size] < size]
        if not sizes:
            break
        interval = backend.interval(i)
        mask = unpack(packed, len(interval))
        for size in sizes:
            first = -interval.start % size
            counts = nm_pattern.counts(mask[first : first + (len(mask) - first) // size * size], size)
            if len(counts):
                largest = int(counts.max())
                has_pattern = int(counts.sum()) >= _FULL * largest * len(counts)
                most[size] = max(most[size], largest) if has_pattern else size
    return list(most.values())
