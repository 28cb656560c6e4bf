"""Counting of the zeros in weights that ranks own in parts."""

import torch

from seft_dist.backends.base import Backend
from seft_dist.sparsity.zeros import ZeroCount, num_zeros


def count_zeros_over_ranks(backend: Backend) -> list[ZeroCount]:
    """Count the zeros of every target as it is stored now. Collective over the owners.

    Each rank counts the interval that it owns, so a position counts once, however many ranks store it.

    Args:
        backend: Backend that holds the weights; call ``drop_gathered`` first if layers may still be gathered.

    Returns:
        The counts of the whole weights, in the order of the targets; the same on every rank.
    """
    own = torch.tensor([num_zeros(backend.own(i)) for i in range(len(backend.names))])
    zeros = backend.owners.sum(own).tolist()
    numels = [partition.numel for partition in backend.partitions]
    return [ZeroCount(*count) for count in zip(backend.names, numels, zeros, strict=True)]
