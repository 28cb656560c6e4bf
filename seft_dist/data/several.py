"""Sequences made of others: several conversations in one sequence, and several sources in one data set."""

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from seft_dist.data.sequences import IGNORE, Conversations, Provenance, TokenSequences, positions


def pack(lengths: NDArray[np.int32], capacity: int) -> list[NDArray[np.int64]]:
    """Put items into as few packs of limited size as the rule of best fit, longest first, finds.

    Args:
        lengths: Size of each item, at most ``capacity``.
        capacity: Size of a pack.

    Returns:
        Numbers of the items in each pack, in ascending order; the packs in the order of their first items.
    """
    packs: list[list[int]] = []
    open_packs: dict[int, list[int]] = {}  # room that is left -> packs with that room
    rooms: list[int] = []  # the keys of open_packs, ascending
    for item in np.argsort(-lengths.astype(np.int64), kind="stable").tolist():
        length = int(lengths[item])
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            number = open_packs[room].pop()
            if not open_packs[room]:
                del open_packs[room], rooms[at]
        else:
            room, number = capacity, len(packs)
            packs.append([])
        packs[number].append(item)
        left = room - length
        if left > 0:
            if left not in open_packs:
                insort(rooms, left)
                open_packs[left] = []
            open_packs[left].append(number)
    sorted_packs = [np.sort(np.array(items, dtype=np.int64)) for items in packs]
    return sorted(sorted_packs, key=lambda items: int(items[0]))


class PackedConversations(TokenSequences):
    """Several conversations in each sequence of up to ``seq_len`` tokens, each of them separate from the others."""

    def __init__(self, conversations: Conversations) -> None:
        """Args:
        conversations: The conversations, each of at most ``seq_len`` tokens.
        """
        self._conversations, self._own_lengths = conversations, conversations.lengths()
        self._packs = pack(self._own_lengths, conversations.provenance.config.seq_len)

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all conversations."""
        return self._conversations.num_tokens

    @property
    def provenances(self) -> list[Provenance]:
        """Origin of the conversations."""
        return self._conversations.provenances

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, index: Any) -> Any:
        assert 0 <= index < len(self)
        items = self._packs[index].tolist()
        ids, labels = (torch.cat(parts) for parts in zip(*(self._conversations[item] for item in items), strict=True))
        starts = np.cumsum([0, *(int(self._own_lengths[item]) for item in items[:-1])])
        labels[starts] = IGNORE
        return ids, labels, positions(starts, len(ids))

    def contents(self, start: int, stop: int) -> Iterator[Any]:
        """Yield lengths, tokens, labels and 1 for each token that begins a conversation, else 0, as int32 arrays."""
        packs = self._packs[start:stop]
        yield np.array([self._own_lengths[items].sum() for items in packs], dtype=np.int32)
        samples = [self[index] for index in range(start, stop)]
        for number in (0, 1):
            yield np.concatenate([sample[number].numpy() for sample in samples]).astype(np.int32)
        yield np.concatenate([(sample[2] == 0).numpy() for sample in samples]).astype(np.int32)


class MixedSequences(TokenSequences):
    """The sequences of several sources, those of one behind those of another."""

    def __init__(self, sources: Mapping[str, TokenSequences], weights: Mapping[str, float]) -> None:
        """Args:
        sources: The sources by their names.
        weights: Weight of each source.
        """
        self.sources, self.weights = dict(sources), [weights[name] for name in sources]
        self._starts = np.cumsum([0, *(len(source) for source in self.sources.values())])

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all sources."""
        return sum(source.num_tokens for source in self.sources.values())

    @property
    def provenances(self) -> list[Provenance]:
        """Origin of each source."""
        return [each for source in self.sources.values() for each in source.provenances]

    @property
    def counts(self) -> list[int]:
        """Number of sequences of each source."""
        return [len(source) for source in self.sources.values()]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: Any) -> Any:
        assert 0 <= index < len(self)
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return list(self.sources.values())[number][index - int(self._starts[number])]

    def contents(self, start: int, stop: int) -> Iterator[Any]:
        """Yield the lengths and then the contents of the sequences start <= i < stop, as int32 arrays, for a digest."""
        parts = []
        for begin, source in zip(self._starts.tolist(), self.sources.values(), strict=False):
            first, last = max(start - begin, 0), min(stop - begin, len(source))
            if first < last:
                parts.append(list(source.contents(first, last)))
        yield np.concatenate([part[0] for part in parts])
        for part in parts:
            yield from part[1:]

    def describe(self, num_sequences: int) -> list[str]:
        """Describe what each source gives to a run, in a line each.

        Args:
            num_sequences: Sequences that the run takes.
        """
        total, lines = sum(self.weights), []
        for (name, source), weight in zip(self.sources.items(), self.weights, strict=True):
            passes = weight / total * num_sequences / len(source)
            lines.append(
                f"data.mix.{name}: {weight / total:.1%} of the sequences, out of {len(source):,}: {passes:.2f} passes"
            )
        return lines
