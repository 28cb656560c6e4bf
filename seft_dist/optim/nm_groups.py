"""N:M patterns over ranks: groups that a border between two ranks cuts are completed on each side.

M = 4, chunks of 6 positions:

    group              0         1             2
    position     0 1 2 3   4 5 | 6 7   8 9 10 11
    rank         0 owns 0 .. 5 | 1 owns 6 .. 11

    edges of rank 0: left nothing, right 6 7      rank 0 ranks groups 0 and 1, and keeps 0 .. 5 of the result
    edges of rank 1: left 4 5, right nothing      rank 1 ranks groups 1 and 2, and keeps 6 .. 11

Each rank that touches a group sees all of it, so that all of them come to the same result. Ranking on one of the ranks
and sending the result back would take two exchanges instead of one. Only values of cut groups travel: at most 2 (M - 1)
of a rank and layer, whatever the size of the model. Where every chunk holds whole groups (FSDP2 keeps whole rows),
nothing is sent.

All ranks must enter an exchange with the same layers in the same order, also those ranks that own nothing of them.
"""

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from seft_dist.backends import Backend
from seft_dist.config.pattern import pattern_sizes
from seft_dist.sparsity import nm_pattern
from seft_dist.sparsity.bitmask import unpack
from seft_dist.sparsity.partition import Interval
from seft_dist.sparsity.selection import INELIGIBLE

Edges = dict[int, tuple[Tensor, Tensor]]
"""A layer with cut groups to the other ranks' values left and right of the own interval that complete its groups."""


class NMGroups:
    """The groups of every target. Lists have one item for each target."""

    def __init__(self, backend: Backend, pattern: str, targets: Sequence[int] | None = None) -> None:
        """Args:
        backend: Holds the weights; M divides the length of the rows of ``targets``.
        pattern: "N:M".
        targets: Numbers of the targets whose groups are meant, in order; None for all.
        """
        self.backend = backend
        self._targets = range(len(backend.names)) if targets is None else targets
        self.most, self.size = pattern_sizes(pattern)
        self.cut = [
            i
            for i in self._targets
            if backend.partitions[i].chunk % self.size and backend.partitions[i].chunk < backend.partitions[i].numel
        ]
        """Layers in which a border between ranks cuts a group; the same on every rank."""
        self._offsets: dict[int, list[int]] = {}

    def exchange(self, values: Callable[[int], Tensor]) -> Edges:
        """Get the values of other ranks that complete the cut groups. Collective, unless no layer has any.

        Args:
            values: This rank's values of a layer, [n] in the order of its interval; called once for each layer in
                ``cut``.
        """
        if not self.cut:
            return {}
        # One message for all layers. A rank sends the ends of its intervals to everybody, because a group can span more
        # than two ranks; what is not needed by a rank is dropped there.
        sent = []
        for i in self.cut:
            own, start = values(i), self.backend.interval(i).start
            sent += [own[part.start - start : part.stop - start] for part in self._sent(i, self.backend.owners.rank)]
        received = self.backend.owners.gather(torch.cat(sent))
        return {
            i: (self._pick(received, at, left), self._pick(received, at, right))
            for at, (i, (left, right)) in enumerate(self._missing.items())
        }

    @cached_property
    def _missing(self) -> dict[int, tuple[Interval, Interval]]:
        """Positions left and right that complete the own interval of each cut layer."""
        missing = {}
        for i in self.cut:
            own = self.backend.interval(i)
            whole = nm_pattern.extent(own, self.size)
            missing[i] = (Interval(whole.start, own.start), Interval(own.stop, whole.stop))
        return missing

    def _sent(self, i: int, rank: int) -> tuple[Interval, Interval]:
        """Return the positions of cut groups at both ends of a rank's interval.

        An interval inside one group is all head: its positions are sent once.
        """
        own = self.backend.partitions[i].interval(rank)
        head = Interval(own.start, min(own.stop, nm_pattern.extent(Interval(own.start, own.start), self.size).stop))
        return head, Interval(max(head.stop, own.stop // self.size * self.size), own.stop)

    def _pick(self, received: list[Tensor], at: int, wanted: Interval) -> Tensor:
        """Pick the values of positions next to the own interval out of all ranks' messages.

        The positions can belong to several ranks where intervals are shorter than a group.

        Args:
            received: Message of each rank.
            at: Index of the layer in ``cut``.
            wanted: The positions.
        """
        i = self.cut[at]
        pieces = [received[0][:0]]
        chunk, position = self.backend.partitions[i].chunk, wanted.start
        while position < wanted.stop:
            rank = position // chunk
            stop = min(wanted.stop, (rank + 1) * chunk)
            head, tail = self._sent(i, rank)
            offset = self._begin(rank)[at]
            offset += position - head.start if position < head.stop else len(head) + position - tail.start
            pieces.append(received[rank][offset : offset + stop - position])
            position = stop
        return torch.cat(pieces)

    def _begin(self, rank: int) -> list[int]:
        """Return the index in a rank's message at which each cut layer's values begin."""
        if rank not in self._offsets:
            begins, offset = [], 0
            for i in self.cut:
                begins.append(offset)
                offset += sum(map(len, self._sent(i, rank)))
            self._offsets[rank] = begins
        return self._offsets[rank]

    def whole(self, i: int, own: Tensor, edges: Edges) -> Tensor:
        """Add what completes the first and the last group to the own values.

        Args:
            i: Number of the target.
            own: [n], values of the own interval.
            edges: What ``exchange`` returned for the same values.
        """
        if i not in edges or not any(map(len, edges[i])):
            return own
        left, right = edges[i]
        return torch.cat([left, own, right])

    def own(self, i: int, whole: Tensor) -> Tensor:
        """Return the part of the own interval, a view; the inverse of ``whole``."""
        left = self._missing[i][0] if i in self._missing else ()
        return whole[len(left) : len(left) + len(self.backend.interval(i))]

    def counter(self, marks: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
        """Count the marked positions of each group. Collective; the function that it returns is not.

        Args:
            marks: Returns bool [n] for the own interval of a layer.

        Returns:
            A function that returns the counts of a layer, int64 [groups that the own interval touches].
        """
        edges = self.exchange(lambda i: marks(i).to(torch.uint8))
        return lambda i: nm_pattern.counts(self.whole(i, marks(i).to(torch.uint8), edges).bool(), self.size)

    def fingerprints(self, masks: list[Tensor]) -> list[int]:
        """Hash the number of active positions of every group of each whole weight. Collective.

        The hash is the same for every layout.

        Args:
            masks: Packed mask of the own interval of each target, uint8.
        """
        own = [
            nm_pattern.fingerprint(unpack(masks[i], len(interval)), interval.start, self.size)
            for i, interval in enumerate(map(self.backend.interval, range(len(masks))))
        ]
        return self.backend.owners.sum(torch.stack(own).cpu()).tolist()

    def fullest(self, masks: list[Tensor]) -> list[tuple[int, int]]:
        """Return the group with the most active positions of each whole weight, and how many it has. Collective.

        Both are -1 for targets that are not meant.

        Args:
            masks: As for ``fingerprints``.
        """
        active = self.counter(lambda i: unpack(masks[i], len(self.backend.interval(i))))
        rows = torch.full((len(masks), 2), -1)
        for i in self._targets:
            counts = active(i)
            if len(counts):
                most = int(counts.argmax())
                rows[i, 0] = nm_pattern.extent(self.backend.interval(i), self.size).start // self.size + most
                rows[i, 1] = counts[most]
        every = self.backend.owners.stack(rows)
        ranks = every[:, :, 1].argmax(0)
        return [(int(every[rank, i, 0]), int(every[rank, i, 1])) for i, rank in enumerate(ranks.tolist())]

    def check(self, masks: list[Tensor], prints: list[int]) -> None:
        """Check that no group broke the pattern or changed its number of active positions. Collective.

        Args:
            masks: As for ``fingerprints``.
            prints: What ``fingerprints`` returned at the start.

        Raises:
            RuntimeError: Names the layer; every rank raises the same.
        """
        for name, shape, (group, count) in zip(
            self.backend.names, self.backend.shapes, self.fullest(masks), strict=True
        ):
            if count > self.most:
                where = describe_group(group, self.size, shape[1])
                raise RuntimeError(
                    f"{name}: {where} hold {count} active positions, needs at most {self.most}; "
                    "the run stops, its last checkpoint is intact"
                )
        for name, before, now in zip(self.backend.names, prints, self.fingerprints(masks), strict=True):
            if before != now:
                raise RuntimeError(
                    f"{name}: a group of {self.size} inputs has another number of active positions than at the start; "
                    "the run stops, its last checkpoint is intact"
                )


class GroupRanking:
    """Keys in which only the best of each group are eligible.

    It takes the place of a function that returns the keys of a layer. The keys are computed again in each call: one
    layer's keys exist at a time, only those of cut groups are kept.
    """

    def __init__(self, whole_groups: NMGroups, keys: Callable[[int], Tensor], limits: Callable[[int], Tensor]) -> None:
        """Exchange the keys of cut groups. Collective.

        Args:
            whole_groups: Groups of all layers.
            keys: Returns this rank's keys of a layer, int32 [n].
            limits: Returns how many are taken of each group of a layer, int64 [groups that the own interval touches].
        """
        self._groups, self._keys, self._limits = whole_groups, keys, limits
        self._edges = whole_groups.exchange(keys)

    def __call__(self, i: int) -> Tensor:
        """Return the keys of a layer's own interval, int32 [n]."""
        own = self._keys(i)
        whole = self._groups.whole(i, own, self._edges)
        best = nm_pattern.best(whole, self._limits(i), self._groups.size)
        return own.masked_fill_(~self._groups.own(i, best), INELIGIBLE)

    def near_ties(self, chosen: list[Tensor], errors: Callable[[int], Tensor]) -> list[int]:
        """Count the positions of each layer that rounding could have put in or out of a group's best. Collective.

        Args:
            chosen: Own offsets of each layer that were taken in the end, int64; groups without any are not counted.
            errors: Returns how far rounding can move each score of a layer, fp32 [n].
        """
        whole_groups, size = self._groups, self._groups.size
        edges = whole_groups.exchange(errors)

        def marks(i: int) -> Tensor:
            taken = torch.zeros(len(whole_groups.backend.interval(i)), dtype=torch.bool, device=chosen[i].device)
            return taken.index_fill_(0, chosen[i], True)

        taken_of = whole_groups.counter(marks)
        counts = torch.zeros(len(chosen), dtype=torch.int64)
        for i in range(len(chosen)):
            key = whole_groups.whole(i, self._keys(i), self._edges)
            error = whole_groups.whole(i, errors(i), edges)
            close = nm_pattern.near_ties(key, self._limits(i), size, error)
            close &= (taken_of(i) > 0).repeat_interleave(size)
            counts[i] = torch.count_nonzero(whole_groups.own(i, close))
        return whole_groups.backend.owners.sum(counts).tolist()


def describe_group(group: int, size: int, width: int) -> str:
    """Describe a group in words, e.g. "row 3, inputs 8 to 11".

    Args:
        group: Number of the group in the flattened weight.
        size: M.
        width: Number of inputs of a row.
    """
    row, first = divmod(group * size, width)
    return f"row {row}, inputs {first} to {first + size - 1}"
