"""The state that the parts of one evolution share: its inputs, its choices so far, and the ranking over all ranks."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from seft_dist.backends import Backend
from seft_dist.config import SeftConfig
from seft_dist.kernels import bits
from seft_dist.optim.collectives import near_ties, select
from seft_dist.optim.nm_groups import GroupRanking, NMGroups
from seft_dist.optim.rounding import Rounding
from seft_dist.optim.state import State
from seft_dist.optim.window import Window

Errors = Callable[[Rounding, int], Tensor]
"""Function that returns how far rounding can move each score of a layer, fp32, one for each key.

It is called while near-ties are counted.
"""


class WorkingState:
    """The working state of one evolution.

    Lists have one item for each target. Offsets count from the start of the own interval.
    """

    def __init__(
        self,
        backend: Backend,
        config: SeftConfig,
        state: State,
        windows: list[Window],
        *,
        step: int,
        near_ties: list[int] | None,
    ) -> None:
        """Args:
        backend: Must be inside its ``writing()`` context.
        config: The method.
        state: Changed by the evolution's parts.
        windows: Statistics of each target, up to and including this step.
        step: Optimizer step, counted from 1.
        near_ties: Near-ties of each target so far; None: they are not counted.
        """
        self.backend, self.config, self.state, self.windows, self.step = backend, config, state, windows, step
        self.intervals = [backend.interval(i) for i in range(len(windows))]
        self.entries = list(state.layers())
        """The own deltas of each target."""
        self.sizes = [len(support) for support in state.supports]
        """Number of deltas of each whole target."""
        self.nothing = [self.offsets(i)[:0] for i in range(len(windows))]
        """No offsets of any target."""
        self.dropped, self.grown, self.pruned, self.reactivated = (list(self.nothing) for _ in range(4))
        """Own offsets of each target that left or entered the support, left the mask, or entered it by growing."""
        self.returned = list(self.nothing)
        """Own offsets of each target that entered the mask with the value of the parent (``seft_dist.optim.swap``)."""
        self.returned_values: dict[int, Tensor] = {}
        """Values of each target at ``returned``, in the dtype of the weights."""
        self.norms: dict[int, Tensor] = {}
        """fp32 [experts, in], norms of each target's inputs over the window, once Adapt knows them (activation)."""
        self.rounding: Rounding | None = None
        """Errors of the scores, while near-ties are counted."""
        self.near_ties = near_ties
        self.counted_before = sum(near_ties or ())
        """Near-ties that were counted before this evolution began."""
        self.groups = NMGroups(backend, config.known_pattern) if config.known_pattern else None
        """Groups of the N:M pattern, if there is one."""

    def estimate_rounding(self) -> None:
        """Prepare the errors of scores if near-ties are counted. Collective."""
        if self.near_ties is not None:
            self.rounding = Rounding(self.backend, self.config, self.windows, self.entries)

    def offsets(self, i: int) -> Tensor:
        """Return the offsets of a target's own deltas, int64."""
        return self.entries[i].indices.long() - self.intervals[i].start

    def mask(self, i: int) -> Tensor:
        """Return a target's own mask, bool."""
        return bits.unpack(self.state.masks[i], len(self.intervals[i]))

    def mark(self, i: int, packed: Tensor, offsets: Tensor, value: bool) -> Tensor:
        """Return packed bits of a target's own interval with those at some offsets set to a value."""
        return bits.with_bits(packed, len(self.intervals[i]), offsets, value)

    def positions(self, i: int, offsets: Tensor) -> Tensor:
        """Return the flat positions of own offsets, ``Backend.position_dtype``."""
        return (offsets + self.intervals[i].start).to(self.backend.position_dtype)

    def count_entries(self) -> None:
        """Count the deltas of each whole target again. Collective."""
        self.sizes = self.backend.owners.sum(torch.tensor(list(map(len, self.entries)))).tolist()

    def select(self, key: Callable[[int], Tensor], wanted: list[int], errors: Errors) -> list[Tensor]:
        """Choose the best positions over all ranks. Collective.

        Args:
            key: Returns the keys of a layer's own candidates (``kernels.ranking.ranking_keys``).
            wanted: Number to choose in each layer, or one number for all of them together.
            errors: Errors of the scores.

        Returns:
            Indices of the chosen candidates of each layer, int64.
        """
        chosen = self.choose(key, wanted)
        if self.rounding is not None:
            problems = self._problems(wanted)
            self.count(near_ties(self.backend.owners, key, problems, chosen, partial(errors, self.rounding)))
        return chosen

    def choose(self, key: Callable[[int], Tensor], wanted: list[int]) -> list[Tensor]:
        """Choose as ``select`` does, and count no near-ties. Collective."""
        return select(self.backend.owners, key, self._problems(wanted), wanted, self.config.selection)

    def _problems(self, wanted: list[int]) -> list[int]:
        return list(range(len(self.windows))) if len(wanted) > 1 else [0] * len(self.windows)

    def count(self, near: list[int]) -> None:
        """Add near-ties of each target."""
        assert self.near_ties is not None
        self.near_ties = [before + now for before, now in zip(self.near_ties, near, strict=True)]

    def count_pattern_near_ties(self, ranking: Callable[[int], Tensor], chosen: list[Tensor], errors: Errors) -> None:
        """Add the near-ties inside the groups of a pattern. Collective if near-ties are counted."""
        if self.rounding is not None and isinstance(ranking, GroupRanking):
            self.count(ranking.near_ties(chosen, partial(errors, self.rounding)))
