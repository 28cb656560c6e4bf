"""Orders in which training takes the sequences of a data set: endless, and pure functions of a seed and a position.

No order depends on the number of ranks, and none has a state to save: whoever asks for the sequence at a position gets
the same answer, in any process, at any time.
"""

import hashlib
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Order = Callable[[int], int]
"""Function from a position, counted from 0, to the index of a sequence."""

GROUPED_STEPS = 50
"""Optimizer steps among whose sequences those of similar length are put together."""


def _generator(purpose: str) -> torch.Generator:
    digest = hashlib.sha256(purpose.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


class EpochOrder:
    """All sequences of a data set, again and again: each epoch is a permutation drawn from (seed, epoch)."""

    def __init__(self, count: int, seed: int, source: str = "") -> None:
        """Args:
        count: Number of sequences.
        seed: Seed of the permutations.
        source: Text that tells this data set from others with the same seed.
        """
        self._count, self._seed, self._source = count, seed, source
        self._permutations: dict[int, Tensor] = {}

    def __call__(self, position: int) -> int:
        """Return the index of the sequence at a position."""
        epoch, offset = divmod(position, self._count)
        if epoch not in self._permutations:
            # A batch touches at most two epochs that follow each other: older permutations are dropped
            self._permutations = {kept: order for kept, order in self._permutations.items() if abs(kept - epoch) == 1}
            generator = _generator(f"order {self._seed} {epoch}{self._source}")
            self._permutations[epoch] = torch.randperm(self._count, generator=generator)
        return int(self._permutations[epoch][offset])


class MixedOrder:
    """Several data sets, laid one behind the other, of which each gets its share of any stretch of positions.

    The first source gets floor(share x n) of the first n positions, the second one its share of what is left in the
    same way, and so on. So a source has at any time what its weight asks for, up to one sequence for each source.
    Within its own positions it goes through its own permutations.
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[float], seed: int) -> None:
        """Args:
        counts: Number of sequences of each source.
        weights: Weight of each source, above 0.
        seed: Seed of the permutations.
        """
        parts = [Fraction(repr(weight)) for weight in weights]
        self._shares = [part / sum(parts[number:]) for number, part in enumerate(parts)]
        self._offsets = [sum(counts[:number]) for number in range(len(counts))]
        self._orders = [EpochOrder(count, seed, f" source {number}") for number, count in enumerate(counts)]

    def __call__(self, position: int) -> int:
        """Return the index of the sequence at a position, counted through all sources."""
        number, own = self.source_of(position)
        return self._offsets[number] + self._orders[number](own)

    def source_of(self, position: int) -> tuple[int, int]:
        """Return the number of the source that has a position, and how many it had before."""
        for number, share in enumerate(self._shares):
            taken = share.numerator * position // share.denominator
            if share.numerator * (position + 1) // share.denominator > taken:
                return number, taken
            position -= taken
        raise AssertionError("the last source takes every position that is left")


class LengthGrouped:
    """Another order, in which the sequences of each ``GROUPED_STEPS`` optimizer steps are sorted by length.

    They are cut into steps again, and these are shuffled. Nothing is moved from one pass over the data to another,
    except that the step in which one ends and the next begins stays as a whole.
    """

    def __init__(
        self, order: Order, lengths: NDArray[np.int32], global_batch: int, num_sequences: int, seed: int
    ) -> None:
        """Args:
        order: The order without regard to lengths.
        lengths: Tokens of each sequence.
        global_batch: Sequences of an optimizer step.
        num_sequences: Sequences of a pass over the data.
        seed: Seed of the order of the steps.
        """
        self._order, self._lengths, self._seed = order, lengths, seed
        self._global_batch, self._num_sequences = global_batch, num_sequences
        self._first, self._group = 0, np.empty(0, dtype=np.int64)

    def __call__(self, position: int) -> int:
        """Return the index of the sequence at a position."""
        if not self._first <= position < self._first + len(self._group):
            first, last = self._steps_of_group(position // self._global_batch)
            self._first, self._group = first * self._global_batch, self._sort(first, last)
        return int(self._group[position - self._first])

    def _steps_of_group(self, step: int) -> tuple[int, int]:
        """Return the first step of a step's group, and the step behind its last one."""
        epoch = step * self._global_batch // self._num_sequences
        begin, end = (-(-each * self._num_sequences // self._global_batch) for each in (epoch, epoch + 1))
        first = step - (step - begin) % GROUPED_STEPS
        return first, min(first + GROUPED_STEPS, end)

    def _sort(self, first: int, last: int) -> NDArray[np.int64]:
        positions = range(first * self._global_batch, last * self._global_batch)
        indices = np.fromiter((self._order(position) for position in positions), dtype=np.int64, count=len(positions))
        steps = indices[np.argsort(self._lengths[indices], kind="stable")].reshape(-1, self._global_batch)
        shuffled = torch.randperm(len(steps), generator=_generator(f"steps {self._seed} {first}"))
        grouped: NDArray[np.int64] = steps[shuffled.numpy()].reshape(-1)
        return grouped
