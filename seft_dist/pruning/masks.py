"""Selection of the weights to prune: the smallest scores of each row, of a whole weight, of all weights, or by N:M.

Ranks own consecutive rows of each weight and select together. The selection does not depend on the number of ranks: the
counts are exact, and among equal scores the smaller position is pruned first.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from seft_dist.backends.group import Group
from seft_dist.sparsity.selection import BINS, DIGITS, descend, first_histogram, histogram, keys, take, threshold_key

TILE = 64
"""Number of rows that are never divided between ranks.

Matrix products thus have the same shapes on any number of ranks and give the same bits.
"""
_BLOCK = 1 << 22
"""Number of values among which equal ones are counted at a time."""


def num_pruned(sparsity: float, numel: int) -> int:
    """Number of weights to prune out of ``numel``: sparsity * numel, rounded to the nearest integer, halves upwards."""
    return math.floor(sparsity * numel + 0.5)


def own_rows(rows: int, ranks: Group) -> tuple[int, int]:
    """Rows [start, stop) of a weight that this rank prunes; the range may be empty.

    Args:
        rows: Number of rows of the weight.
        ranks: Ranks that share the work.
    """
    tiles = -(-rows // TILE)
    start, stop = (min(rows, TILE * (tiles * rank // ranks.size)) for rank in (ranks.rank, ranks.rank + 1))
    return start, stop


def gather_rows(own: Tensor, ranks: Group) -> Tensor:
    """Concatenate the rows of all ranks. Collective.

    Args:
        own: [own rows, in], of any dtype.
        ranks: Ranks that own the rows.

    Returns:
        [out, in] on every rank.
    """
    if ranks.size == 1:
        return own
    parts = ranks.gather(own.contiguous().view(-1).view(torch.uint8))
    return torch.cat(parts).view(own.dtype).view(-1, own.shape[1])


@dataclass(frozen=True)
class Ranking:
    """Rule by which scores become a mask: among which weights they are compared, and how many are pruned."""

    kind: str
    """"row", "layer", or a pattern N:M such as "2:4", in which N of M weights are kept."""
    sparsity: float
    """Share of each row, or of the whole weight, that is pruned; unused with a pattern."""

    @property
    def kept_of(self) -> tuple[int, int] | None:
        """N and M of a pattern; None without a pattern."""
        kept, _, width = self.kind.partition(":")
        return (int(kept), int(width)) if width else None

    def check(self, name: str, columns: int) -> None:
        """Raise a ValueError if M of the pattern does not divide the number of columns of a weight."""
        if self.kept_of is not None and columns % self.kept_of[1]:
            raise ValueError(
                f"{name} has {columns} input columns, which --pattern {self.kind} does not divide: choose another "
                "pattern, or --targets without it"
            )

    def zeros(self, rows: int, columns: int) -> int:
        """Number of zeros that a weight [rows, columns] has after pruning."""
        if self.kept_of is not None:
            kept, width = self.kept_of
            return rows * columns // width * (width - kept)
        if self.kind == "row":
            return rows * num_pruned(self.sparsity, columns)
        return num_pruned(self.sparsity, rows * columns)


@dataclass(frozen=True)
class KeyThreshold:
    """Threshold of a ranking over several layers: keys above it are pruned, and some of the keys equal to it."""

    threshold: int
    """The threshold, as an integer key."""
    ties: list[int]
    """For each layer, the number of this rank's keys equal to the threshold that are pruned."""

    def mask(self, key: Tensor, layer: int = 0) -> Tensor:
        """Apply the threshold to a layer.

        Args:
            key: Keys of this rank's part of the layer, int32 [n], from ``pruning_keys``.
            layer: Index of the layer in the ranking.

        Returns:
            True where a weight is pruned, bool [n].
        """
        selected = torch.zeros(key.numel(), dtype=torch.bool, device=key.device)
        selected[take(key, self.threshold, self.ties[layer])] = True
        return selected


def pruning_keys(scores: Tensor, weight: Tensor) -> Tensor:
    """Convert scores to integer keys, of which the largest are pruned first: zeros, then the smallest scores.

    Args:
        scores: Scores, fp32, not negative.
        weight: The weights, of the same shape.

    Returns:
        int32 [numel].
    """
    return keys(_zeros_first(scores, weight).reshape(-1), largest=False)


def _zeros_first(scores: Tensor, weight: Tensor) -> Tensor:
    # All weights of an input that is always 0 have score 0. If zeros did not come first, such weights could be pruned
    # in place of zeros, which stay 0 anyway: the group would end with too many zeros.
    return scores.masked_fill(weight == 0, -1.0)


def find_threshold(ranks: Group, key_of: Callable[[int], Tensor], layers: int, wanted: int) -> KeyThreshold:
    """Find the threshold of a ranking of several layers over all ranks, by radix selection. Collective.

    The digits of the threshold are found one after the other, from histograms that are summed over layers and ranks. So
    ranks exchange only histograms, and the keys of only one layer are in memory at a time.

    Args:
        ranks: Ranks that own the entries, in consecutive intervals of each layer.
        key_of: Returns this rank's keys of a layer; called four times for each layer.
        layers: Number of layers.
        wanted: Number of entries to prune.
    """
    counts = torch.zeros(1, BINS, dtype=torch.int64)
    for layer in range(layers):
        counts += first_histogram(key_of(layer)).cpu()
    ranks.sum(counts)
    prefix, left = descend(counts, torch.tensor([wanted]).minimum(counts.sum(1)))
    for digit, (_, bits) in list(enumerate(DIGITS))[1:]:
        counts.zero_()
        for layer in range(layers):
            counts += histogram(key_of(layer), digit, int(prefix)).cpu()
        value, left = descend(ranks.sum(counts), left)
        prefix = prefix << bits | value
    threshold = threshold_key(int(prefix))
    own = [int(torch.count_nonzero(key_of(layer) == threshold)) for layer in range(layers)]
    ties = ranks.stack(torch.tensor(own)).tolist()
    allowed, still = [], int(left)
    for layer in range(layers):  # equal keys are pruned in the order of layer, rank and position
        before = sum(row[layer] for row in ties[: ranks.rank])
        allowed.append(max(0, min(ties[ranks.rank][layer], still - before)))
        still = max(0, still - sum(row[layer] for row in ties))
    return KeyThreshold(threshold, allowed)


def select_pruned(
    scores: Tensor, weight: Tensor, ranking: Ranking, ranks: Group, count: int | Tensor | None = None
) -> Tensor:
    """Select the weights to prune. Collective for kind "layer", otherwise local.

    A row, group or layer that already has more zeros than asked for keeps them.

    Args:
        scores: [own rows, in], fp32, not negative, finite.
        weight: [own rows, in]; its zeros are selected first.
        ranking: Rule for the selection.
        ranks: Ranks that own the other rows.
        count: Number of weights to prune in each row, or in the layer. A tensor, int64 [rows], or [groups] with a
            pattern, has a number for each of them. None: as the ranking says.

    Returns:
        True where a weight is pruned, bool [own rows, in].
    """
    rows, columns = scores.shape
    if ranking.kind == "layer":
        assert not isinstance(count, Tensor)
        if count is None:
            total = int(ranks.sum(torch.tensor([rows])))
            count = ranking.zeros(total, columns)
        key = pruning_keys(scores, weight)
        return find_threshold(ranks, lambda layer: key, 1, count).mask(key).view(rows, columns)
    width = columns
    if ranking.kept_of is not None:
        kept, width = ranking.kept_of
        count = count if isinstance(count, Tensor) else width - kept
    elif count is None:
        count = num_pruned(ranking.sparsity, columns)
    grouped = _zeros_first(scores, weight).reshape(-1, width)
    if ranking.kept_of is None and not isinstance(count, Tensor):
        return _smallest(grouped, count)
    order = torch.sort(grouped, dim=1, stable=True).indices
    selected = torch.arange(width, device=order.device) < torch.as_tensor(count, device=order.device).view(-1, 1)
    return torch.zeros_like(grouped, dtype=torch.bool).scatter_(1, order, selected.expand_as(order)).view(rows, columns)


def _smallest(values: Tensor, count: int) -> Tensor:
    """Mark the ``count`` smallest values of each row; of equal values those further left.

    The result is that of a stable sort, in less time: the value with rank ``count`` is found by partitioning,
    smaller values are marked, and of the equal ones as many as are still missing.

    Args:
        values: [rows, columns], fp32, finite.
        count: 0 to columns.

    Returns:
        bool [rows, columns].
    """
    if count == 0 or not values.numel():
        return torch.zeros_like(values, dtype=torch.bool)
    if values.device.type == "cpu":  # numpy's partition is several times as fast as torch's kthvalue
        last = torch.from_numpy(np.partition(values.numpy(), count - 1, axis=1)[:, count - 1 : count].copy())
    else:
        last = values.kthvalue(count, dim=1, keepdim=True).values
    selected = values < last
    block = max(1, _BLOCK // values.shape[1])  # a weight with many equal values would need several times its memory
    for some, chosen, own_last in zip(values.split(block), selected.split(block), last.split(block), strict=True):
        row, column = (some == own_last).nonzero(as_tuple=True)
        equal = torch.bincount(row, minlength=len(some))
        first = equal.cumsum(0) - equal
        number = torch.arange(len(row), device=row.device) - first[row]  # of an equal value in its row
        taken = number < (count - _count(chosen))[row]
        chosen[row[taken], column[taken]] = True
    return selected


def _count(marks: Tensor) -> Tensor:
    """Count the marks of each row, int64 [rows]; on a CPU numpy is ten times as fast as torch."""
    if marks.device.type == "cpu":
        return torch.from_numpy(np.count_nonzero(marks.numpy(), axis=1))
    return torch.count_nonzero(marks, dim=1)
