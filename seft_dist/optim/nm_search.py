"""Finding out whether the targets of a pruned model have N:M patterns that nobody has named."""

import torch
from torch import Tensor

from seft_dist.backends import Backend
from seft_dist.optim.nm_groups import NMGroups
from seft_dist.sparsity import nm_pattern
from seft_dist.sparsity.bitmask import unpack

SIZES = range(2, 17)
"""Group sizes M that are looked for."""
_FULL = 0.95
"""Share of its N active positions that a group of an N:M weight has at least, on average. In a weight without a pattern
the fullest group has many more than the others."""
_LEAST_GROUPS = 4
"""Least number of groups in a row: one group alone is no pattern."""
_SAMPLE, _SAMPLE_FULL = 4096, 0.9
"""Groups of a weight that are looked at first, and how full they must be: most weights have no pattern."""


def find_patterns(backend: Backend, masks: list[Tensor]) -> list[str | None]:
    """Find for each target the N:M pattern with the smallest groups that it has. Collective.

    Args:
        backend: Knows which rank owns which positions.
        masks: Packed mask of the own interval of each target, uint8.

    Returns:
        The pattern of each target, e.g. "2:4"; None where there is none.
    """
    own = [_fullest_groups(backend, i, packed) for i, packed in enumerate(masks)]
    fullest = backend.owners.max(torch.tensor(own)).tolist()
    found: list[str | None] = [None] * len(masks)
    for column, size in enumerate(SIZES):
        for active in range(1, size):
            alike = [i for i, most in enumerate(fullest) if most[column] == active and found[i] is None]
            if not alike:
                continue
            # Groups that ranks cut were left out. With them it must hold as well.
            counts = NMGroups(backend, f"{active}:{size}", alike).fullest(masks)
            for i in alike:
                if counts[i][1] <= active:
                    found[i] = f"{active}:{size}"
    return found


def _fullest_groups(backend: Backend, i: int, packed: Tensor) -> list[int]:
    """Return for each of ``SIZES`` the active positions of a target's fullest group on this rank; M without a pattern.

    Args:
        backend: Knows the interval and the shape.
        i: Number of the target.
        packed: Packed mask of the own interval.
    """
    width, interval = backend.shapes[i][1], backend.interval(i)
    mask = unpack(packed, len(interval))
    most = []
    for size in SIZES:
        if width % size or width < _LEAST_GROUPS * size:
            most.append(size)
            continue
        first = -interval.start % size
        whole = mask[first : first + (len(mask) - first) // size * size]
        stride = max(1, len(whole) // size // _SAMPLE) | 1  # odd: else it could meet the same inputs in each row
        sample = whole.view(-1, size)[::stride].reshape(-1)
        largest = _fullest(sample, size, _SAMPLE_FULL)
        most.append(_fullest(whole, size, _FULL) if largest < size else size)
    return most


def _fullest(mask: Tensor, size: int, full: float) -> int:
    """Return the active positions of the fullest group, 0 without groups; M if not nearly all are as full."""
    counts = nm_pattern.counts(mask, size)
    if not len(counts):
        return 0
    largest = int(counts.max())
    return largest if int(counts.sum()) >= full * largest * len(counts) else size
