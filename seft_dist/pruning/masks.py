"""Which weights go: the smallest scores of each row, of a whole weight, of everything, or N of every M.

Ranks own consecutive rows of each weight and decide together; the choice does not depend on how many they are: exact
counts, and among equal scores the smaller position goes first.
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
"""Rows that are never split between ranks, so that a matrix product has the same shapes on any number of them."""


def num_pruned(sparsity: float, numel: int) -> int:
    """Weights to prune in a group of ``numel``: sparsity * numel, rounded to the nearest."""
    return math.floor(sparsity * numel + 0.5)


def own_rows(rows: int, ranks: Group) -> tuple[int, int]:
    """First and last (exclusive) row of a weight that this rank prunes; may be none."""
    tiles = -(-rows // TILE)
    return tuple(min(rows, TILE * (tiles * rank // ranks.size)) for rank in (ranks.rank, ranks.rank + 1))  # type: ignore[return-value]


def gather_rows(own: Tensor, ranks: Group) -> Tensor:
    """Put the ranks' rows together. Collective.

    Args:
        own: [own rows, in], any type.
        ranks: Who owns the rows.

    Returns:
        [out, in] on every rank.
    """
    if ranks.size == 1:
        return own
    parts = ranks.gather(own.contiguous().view(-1).view(torch.uint8))
    return torch.cat(parts).view(own.dtype).view(-1, own.shape[1])


@dataclass(frozen=True)
class Ranking:
    """How scores become a mask."""

    kind: str
    """"row", "layer", or N:M such as "2:4" (N stay)."""
    sparsity: float
    """Share of each row, or of the weight, that goes."""

    @property
    def kept_of(self) -> tuple[int, int] | None:
        """N and M of a pattern, None without."""
        kept, _, width = self.kind.partition(":")
        return (int(kept), int(width)) if width else None

    def check(self, name: str, columns: int) -> None:
        """Raise a ValueError if a weight of so many input columns cannot have the pattern."""
        if self.kept_of is not None and columns % self.kept_of[1]:
            raise ValueError(
                f"{name} has {columns} input columns, which --pattern {self.kind} does not divide: choose another "
                "pattern, or --targets without it"
            )

    def zeros(self, rows: int, columns: int) -> int:
        """Weights of a weight [rows, columns] that go."""
        if self.kept_of is not None:
            kept, width = self.kept_of
            return rows * columns // width * (width - kept)
        if self.kind == "row":
            return rows * num_pruned(self.sparsity, columns)
        return num_pruned(self.sparsity, rows * columns)


@dataclass(frozen=True)
class Cut:
    """Where a ranking ends: everything below goes, and so many of the entries equal to it."""

    threshold: int
    ties: list[int]
    """Of each layer, this rank's share."""

    def mask(self, key: Tensor, layer: int = 0) -> Tensor:
        """True where a weight goes.

        Args:
            key: int32 [n], from ``pruning_keys``.
            layer: Number of the layer in the ranking.
        """
        gone = torch.zeros(key.numel(), dtype=torch.bool, device=key.device)
        gone[take(key, self.threshold, self.ties[layer])] = True
        return gone


def pruning_keys(scores: Tensor, weight: Tensor) -> Tensor:
    """Integer keys whose largest go first: zeros before all, then the smallest scores.

    Args:
        scores: fp32, not negative.
        weight: Same shape.

    Returns:
        int32 [numel].
    """
    return keys(_zeros_first(scores, weight).reshape(-1), largest=False)


def _zeros_first(scores: Tensor, weight: Tensor) -> Tensor:
    # A dead input has score 0 in its whole column: without this it would push a group over its number.
    return scores.masked_fill(weight == 0, -1.0)


def find_cut(ranks: Group, key_of: Callable[[int], Tensor], layers: int, wanted: int) -> Cut:
    """Rank the entries of several layers over all ranks, by counting. Collective.

    Nothing but histograms is sent, and only one layer's keys exist at a time.

    Args:
        ranks: Who owns the entries; consecutive intervals of each layer.
        key_of: This rank's keys of a layer; called four times for each.
        layers: How many.
        wanted: Entries that go.
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
        found, left = descend(ranks.sum(counts), left)
        prefix = prefix << bits | found
    threshold = threshold_key(int(prefix))
    own = [int(torch.count_nonzero(key_of(layer) == threshold)) for layer in range(layers)]
    ties = ranks.stack(torch.tensor(own)).tolist()
    allowed, still = [], int(left)
    for layer in range(layers):  # ties go in the order layer, rank, position
        before = sum(row[layer] for row in ties[: ranks.rank])
        allowed.append(max(0, min(ties[ranks.rank][layer], still - before)))
        still = max(0, still - sum(row[layer] for row in ties))
    return Cut(threshold, allowed)


def choose(scores: Tensor, weight: Tensor, ranking: Ranking, ranks: Group, count: int | Tensor | None = None) -> Tensor:
    """Choose the weights that go. Collective for kind "layer", else local.

    A group (row, layer) with more zeros than asked for keeps them.

    Args:
        scores: [own rows, in], fp32, not negative, finite.
        weight: [own rows, in]; zeros of it go first.
        ranking: How.
        ranks: Who owns the other rows.
        count: Weights that go in each row, or in the layer; int64 [rows], or of a pattern [groups]: in this one and that; None:
            what the ranking says.

    Returns:
        bool [own rows, in], True where a weight goes.
    """
    rows, columns = scores.shape
    if ranking.kind == "layer":
        assert not isinstance(count, Tensor)
        if count is None:
            total = int(ranks.sum(torch.tensor([rows])))
            count = ranking.zeros(total, columns)
        key = pruning_keys(scores, weight)
        return find_cut(ranks, lambda layer: key, 1, count).mask(key).view(rows, columns)
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
    gone = torch.arange(width, device=order.device) < torch.as_tensor(count, device=order.device).view(-1, 1)
    return torch.zeros_like(grouped, dtype=torch.bool).scatter_(1, order, gone.expand_as(order)).view(rows, columns)


def _smallest(values: Tensor, count: int) -> Tensor:
    """Mark the ``count`` smallest values of each row, of equal ones those further left.

    That is what a stable sort would put first, for a fifth of its time.

    Args:
        values: [rows, columns], fp32, finite.
        count: 0 to columns.

    Returns:
        bool [rows, columns].
    """
    if count == 0 or not values.numel():
        return torch.zeros_like(values, dtype=torch.bool)
    if values.device.type == "cpu":  # several times as fast as torch's
        last = torch.from_numpy(np.partition(values.numpy(), count - 1, axis=1)[:, count - 1 : count].copy())
    else:
        last = values.kthvalue(count, dim=1, keepdim=True).values
    below, equal = values < last, values == last
    left = count - torch.count_nonzero(below, dim=1).unsqueeze(1)
    crowded = (torch.count_nonzero(equal, dim=1).unsqueeze(1) != left).squeeze(1)
    equal[crowded] &= equal[crowded].cumsum(1, dtype=torch.int32) <= left[crowded]
    return below | equal
