"""One evolution: drop, grow, adapt. Every rank decides about its own interval, and only the ranking is shared.

mask     1 1 1 0 0 1 0 1      S: positions with a delta
S          x       x          drop    the smallest |delta| leaves S            (here position 1)
         . . . . g . .        grow    the largest |gradient| outside S enters  (4 was pruned: it joins the mask)
mask     1 1 0 0 1 1 0 1      adapt   the least sensitive active one leaves    (2 becomes 0: as many active as before)
"""

import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from seft_dist.backends import Backend
from seft_dist.config import SeftConfig
from seft_dist.kernels import bits
from seft_dist.kernels.ranking import ranking_keys
from seft_dist.optim.collectives import near_ties, next_to_border, select
from seft_dist.optim.delta import Columns
from seft_dist.optim.nm_groups import GroupRanking, NMGroups
from seft_dist.optim.report import EvolutionReport, Phase, ReportDraft
from seft_dist.optim.rounding import Rounding
from seft_dist.optim.state import State
from seft_dist.optim.window import Window, share_positions
from seft_dist.sparsity import scores
from seft_dist.sparsity.schedule import share
from seft_dist.sparsity.selection import INELIGIBLE

_T = TypeVar("_T")
Errors = Callable[[Rounding, int], Tensor]
"""Function that returns how far rounding can move each score of a layer, fp32, one for each key.

It is called while near-ties are counted.
"""

_DROP, _GROW = 1, 2  # keys of the random criteria's streams


class Evolution:
    """The working state of one evolution.

    Lists have one item for each target. Offsets count from the start of the own interval.
    """

    def __init__(
        self,
        backend: Backend,
        config: SeftConfig,
        state: State,
        windows: list[Window],
        draft: ReportDraft,
        *,
        step: int,
        counts_near_ties: bool = False,
    ) -> None:
        """Args:
        backend: Must be inside its ``writing()`` context.
        config: The method.
        state: Changed by ``run``.
        windows: Statistics of each target, up to and including this step.
        draft: Costs of the windows so far; ``keep_candidates`` adds to it, ``run`` reports it.
        step: Optimizer step, counted from 1.
        counts_near_ties: True to count near-ties for the report.
        """
        self.backend, self.config, self.state, self.windows, self.step = backend, config, state, windows, step
        self.draft = draft
        self.intervals = [backend.interval(i) for i in range(len(windows))]
        self.entries = list(state.layers())
        self.sizes = [len(support) for support in state.supports]
        self.dropped: list[Tensor] = []
        self.grown: list[Tensor] = []
        self.removed: list[Tensor] = []
        self.reactivated: list[Tensor] = []
        self._norms: dict[int, Tensor] = {}
        self._phases: dict[str, Phase] = {}
        self._rounding: Rounding | None = None
        """Errors of the scores, while near-ties are counted."""
        self._near_ties: list[int] | None = None
        if counts_near_ties:
            self._near_ties = draft.near_ties or [0] * len(windows)
        self._counted_before = sum(draft.near_ties)
        self.groups = NMGroups(backend, config.known_pattern) if config.known_pattern else None
        """NMGroups of an N:M pattern, if there is one."""

    def run(self, fraction: float, betas: tuple[float, float], first: bool) -> EvolutionReport:
        """Move the support and the mask. Collective.

        Args:
            fraction: Share of the support that is dropped, 0 to 1.
            betas: Adam's decay rates, for seeded moments.
            first: True if this is the choice of the first support.

        Raises:
            RuntimeError: A promise about masks or supports does not hold afterwards.
        """
        draft = self.draft
        self._phase("window", self._prepare)
        self._phase("drop", lambda: self.drop(fraction))
        self._phase("grow", self.grow)
        self._phase("adapt", self.adapt)
        self._phase("commit", lambda: self.commit(betas))
        digest, counts = self._phase("verify", self._verify)
        dropped, grown, pruned, reactivated = counts
        spent = list(self._phases.values())[1:]
        before = self._phases["window"]
        self._phases["window"] = Phase(before.seconds + draft.seconds, before.bytes_sent + draft.bytes_sent)
        draft.near_ties = []
        support = sum(map(len, self.state.supports))
        return EvolutionReport(
            step=self.step,
            first=first,
            dropped=dropped,
            grown=grown,
            reactivated=reactivated,
            pruned=pruned,
            support=support,
            replaced=grown / max(support, 1),
            seconds=sum(phase.seconds for phase in spent),
            bytes_sent=sum(phase.bytes_sent for phase in spent),
            phases=self._phases,
            digest=digest,
            near_ties=self._near_ties,
        )

    def _prepare(self) -> None:
        for window in self.windows:
            window.reduce_factors()
        self._estimate_rounding()

    def _estimate_rounding(self) -> None:
        if self._near_ties is not None:
            self._rounding = Rounding(self.backend, self.config, self.windows, self.entries)

    def _phase(self, name: str, act: Callable[[], _T]) -> _T:
        began, sent = time.perf_counter(), self.backend.bytes_sent
        result = act()
        self._phases[name] = Phase(time.perf_counter() - began, self.backend.bytes_sent - sent)
        return result

    def _verify(self) -> tuple[str, list[int]]:
        digest = self.state.verify(self.backend, self.config)
        own = torch.tensor([sum(map(len, done)) for done in (self.dropped, self.grown, self.removed, self.reactivated)])
        return digest, self.backend.owners.sum(own).tolist()

    def _offsets(self, i: int) -> Tensor:
        return self.entries[i].indices.long() - self.intervals[i].start

    def _mask(self, i: int) -> Tensor:
        return bits.unpack(self.state.masks[i], len(self.intervals[i]))

    def _mark(self, i: int, packed: Tensor, offsets: Tensor, value: bool) -> Tensor:
        return bits.with_bits(packed, len(self.intervals[i]), offsets, value)

    def _grad(self, i: int) -> Tensor:
        return self.windows[i].gradient()

    def _select(self, key: Callable[[int], Tensor], wanted: list[int], errors: Errors) -> list[Tensor]:
        problems = list(range(len(self.windows))) if len(wanted) > 1 else [0] * len(self.windows)
        chosen = select(self.backend.owners, key, problems, wanted, self.config.selection)
        if self._rounding is not None:
            self._count(near_ties(self.backend.owners, key, problems, chosen, partial(errors, self._rounding)))
        return chosen

    def _count(self, near: list[int]) -> None:
        assert self._near_ties is not None
        self._near_ties = [before + now for before, now in zip(self._near_ties, near, strict=True)]

    def drop(self, fraction: float) -> None:
        """Take the entries with the smallest score out of the support. Collective."""
        chosen = self._select(self._drop_key, [share(fraction, size) for size in self.sizes], self._drop_errors)
        for i, which in enumerate(chosen):
            offsets, base = self._offsets(i)[which], self.entries[i].base[which]
            # base 0 is a position reactivated earlier: back at 0 it would be an active position with weight 0, so its
            # delta (the weight as it stands) becomes the base, and Adapt decides about it.
            restored = (
                base != 0 if self.config.on_drop == "commit_reactivated" else torch.zeros_like(base, dtype=torch.bool)
            )
            places = self.backend.places(i, offsets[restored] + self.intervals[i].start)
            self.backend.store(i, places, base[restored].to(self.backend.dtypes[i]))
            stays = torch.ones(len(self.entries[i]), dtype=torch.bool, device=which.device)
            stays[which] = False
            self.entries[i] = self.entries[i].take(stays)
            self.dropped.append(offsets)
            committed = (offsets[~restored] + self.intervals[i].start).to(self.backend.position_dtype)
            self.state.committed[i] = torch.cat([self.state.committed[i], committed]).unique()
        lost = self.backend.owners.sum(torch.tensor([len(offsets) for offsets in self.dropped])).tolist()
        self.sizes = [size - gone for size, gone in zip(self.sizes, lost, strict=True)]

    def _drop_key(self, i: int) -> Tensor:
        entries = self.entries[i]
        if self.config.drop == "magnitude":
            score = scores.drop_magnitude(entries.values)
        elif self.config.drop == "movement":
            score = scores.drop_movement(entries.values, self._grad(i)[self._offsets(i)])
        else:
            score = scores.uniform(entries.indices.long(), self.config.seed, i, self.step, _DROP)
        return ranking_keys(score, largest=False)

    def _drop_errors(self, rounding: Rounding, i: int) -> Tensor:
        return rounding.of_drop(i, self._offsets(i), self.entries[i])

    def grow(self) -> None:
        """Put the positions with the largest score above 0 into the support, pruned ones too. Collective."""
        wanted = [max(0, budget - size) for budget, size in zip(self.state.budgets, self.sizes, strict=True)]
        if self.windows[0].positions is not None:  # no more than candidates: so Adapt has enough of its own
            wanted = [min(pair) for pair in zip(wanted, self._num_candidates(), strict=True)]
        ranking, self.grown = self._best_free(wanted)
        self._count_close_calls(ranking, self.grown, Rounding.of_grow)
        for i, offsets in enumerate(self.grown):
            self.reactivated.append(offsets[~bits.holds(self.state.masks[i], offsets)])
            self.state.masks[i] = self._mark(i, self.state.masks[i], offsets, True)

    def _best_free(self, wanted: list[int]) -> tuple[Callable[[int], Tensor], list[Tensor]]:
        """Rank the positions that may grow, and choose the best, not too many pruned ones among them. Collective.

        Args:
            wanted: How many of each target may grow.

        Returns:
            The ranking, and the own offsets that were chosen.
        """
        caps = [share(self.config.reactivation, count) for count in wanted]
        any_free = self._inside_groups(lambda i: self._grow_key(i, self._free(i)))
        if caps == wanted:
            return any_free, self._select(any_free, wanted, Rounding.of_grow)
        # The best pruned ones up to the cap compete with all active ones: what walking down one list would give.
        pruned = self._select(lambda i: any_free(i).masked_fill_(self._mask(i), INELIGIBLE), caps, Rounding.of_grow)

        def with_best_pruned(i: int) -> Tensor:
            return self._grow_key(i, self._mark(i, self._free(i) & self.state.masks[i], pruned[i], True))

        ranking = self._inside_groups(with_best_pruned)
        return ranking, self._select(ranking, wanted, Rounding.of_grow)

    def _num_candidates(self) -> list[int]:
        return [share(self.config.window_candidates, budget) for budget in self.state.budgets]

    def keep_candidates(self) -> None:
        """Narrow the windows to the support, the best positions to grow and the best to prune. Collective."""
        began, sent = time.perf_counter(), self.backend.bytes_sent
        self._estimate_rounding()
        wanted = self._num_candidates()
        none = [self._offsets(i)[:0] for i in range(len(self.windows))]
        self.dropped, self.grown, prune = none, none, none
        _, grow = self._best_free(wanted)
        if self.config.adapt == "sensitivity":

            def spare(i: int) -> Tensor:
                return self._adapt_key(i).index_fill_(0, self._offsets(i), INELIGIBLE)

            prune = self._select(spare, wanted if self.config.scope == "layer" else [sum(wanted)], self._adapt_errors)
        for i, window in enumerate(self.windows):
            window.narrow_to(torch.cat([self._offsets(i), grow[i], prune[i]]).unique())
        share_positions(self.backend, self.windows)
        self.draft.seconds += time.perf_counter() - began
        self.draft.bytes_sent += self.backend.bytes_sent - sent
        self.draft.near_ties = self._near_ties or []

    def _inside_groups(self, key: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
        """Let only the best of each group compete to grow, as many as it has active positions.

        Collective with a pattern. Each reactivated position costs its group an active position that did not grow, so
        there are always enough of those.
        """
        return GroupRanking(self.groups, key, self.groups.counter(self._mask)) if self.groups else key

    def _count_close_calls(self, ranking: Callable[[int], Tensor], chosen: list[Tensor], errors: Errors) -> None:
        if self._rounding is not None and isinstance(ranking, GroupRanking):
            self._count(ranking.close_calls(chosen, partial(errors, self._rounding)))

    def _free(self, i: int) -> Tensor:
        """Return the positions that may enter the support, uint8, packed."""
        free = self.windows[i].known()
        if free is None:
            free = torch.full_like(self.state.masks[i], 255)
        # what left in this step may not come back in it
        return self._mark(i, free, torch.cat([self._offsets(i), self.dropped[i]]), False)

    def _grow_key(self, i: int, eligible: Tensor) -> Tensor:
        start, numel = self.intervals[i].start, len(self.intervals[i])
        if self.config.grow == "gradient":
            key = ranking_keys(self._grad(i), largest=True, eligible=eligible, absolute=True)
        elif self.config.grow == "momentum":
            rows, cols = self.windows[i].rows, self.windows[i].cols
            assert rows is not None and cols is not None, "criterion without its statistics"
            key = ranking_keys(scores.momentum(rows, cols, start, numel), largest=True, eligible=eligible)
        else:
            positions = torch.arange(start, start + numel, device=self.backend.device)
            score = scores.uniform(positions, self.config.seed, i, self.step, _GROW)
            return ranking_keys(score, largest=True, eligible=eligible)
        # A position with score 0 would gain nothing: it costs an active weight, and the next update does not move it.
        return key.masked_fill_(key == 0, INELIGIBLE)

    def adapt(self) -> None:
        """Take the active positions with the smallest score out of the mask until it has its size again. Collective."""
        self.removed = [offsets[:0] for offsets in self.grown]
        if self.config.adapt == "none":
            return
        if self.config.adapt == "activation":
            self._norms = {i: window.summed("norms").sqrt() for i, window in enumerate(self.windows)}
        self.removed = self._best_of_layers() if self.groups is None else self._best_of_groups(self.groups)
        for i, offsets in enumerate(self.removed):
            mask = self.state.masks[i] = self._mark(i, self.state.masks[i], offsets, False)
            self.entries[i] = self.entries[i].take(bits.holds(mask, self._offsets(i)))
            committed = self.state.committed[i]
            self.state.committed[i] = committed[bits.holds(mask, committed.long() - self.intervals[i].start)]
        if self.config.scope == "global":
            self.state.targets = self.state.active(self.backend)

    def _best_of_layers(self) -> list[Tensor]:
        active = self.state.active(self.backend)
        excess = [have - want for have, want in zip(active, self.state.targets, strict=True)]
        wanted = excess if self.config.scope == "layer" else [sum(excess)]
        removed = self._select(self._adapt_key, wanted, self._adapt_errors)
        if self._rounding is not None and self.config.scope == "global":
            # A near-tie of one layer in Grow moves the border for all of them.
            by = sum(self._near_ties or ()) - self._counted_before
            self._count(next_to_border(self.backend.owners, self._adapt_key, len(self.windows), wanted[0], by))
        return removed

    def _best_of_groups(self, groups: NMGroups) -> list[Tensor]:
        """Choose in each group as many positions as were reactivated in it. Collective."""

        def reactivated(i: int) -> Tensor:
            marks = torch.zeros(len(self.intervals[i]), dtype=torch.bool, device=self.backend.device)
            marks[self.reactivated[i]] = True
            return marks

        ranking = GroupRanking(groups, self._adapt_key, groups.counter(reactivated))
        removed = [(ranking(i) != INELIGIBLE).nonzero().view(-1) for i in range(len(self.windows))]
        self._count_close_calls(ranking, removed, self._adapt_errors)
        return removed

    def _weight(self, i: int) -> Tensor:
        weight = self.backend.own(i).to(torch.float32, copy=True)
        weight[self._offsets(i)] = self.entries[i].weight()  # fp32, before any cast
        return weight

    def _adapt_errors(self, rounding: Rounding, i: int) -> Tensor:
        return rounding.of_adapt(i, self._weight(i), self._norms.get(i), self._offsets(i), self.entries[i])

    def _adapt_key(self, i: int) -> Tensor:
        weight = self._weight(i)
        # Without the grown ones: their weight is still 0, the step would undo itself.
        eligible = self._mark(i, self.state.masks[i], self.grown[i], False)
        if self.config.adapt == "sensitivity":
            if (known := self.windows[i].known()) is not None:
                eligible &= known
            return ranking_keys(weight, largest=False, eligible=eligible, times=self._grad(i))
        if self.config.adapt == "activation":
            weight = scores.activation(weight, self._norms[i], self.intervals[i].start)
        return ranking_keys(weight, largest=False, eligible=eligible, absolute=True)

    def commit(self, betas: tuple[float, float]) -> None:
        """Give the grown positions entries, and every rank all positions. Collective.

        The order matters: a backend that stores active positions only has to know the new mask before it can find a
        grown position, and entries must be in place before the replicas' weights are written.
        """
        for i, removed in enumerate(self.removed):
            self.backend.remask(i, self.state.masks[i], removed)
        self.backend.sync_mask_counts()
        for i, offsets in enumerate(self.grown):
            positions = (offsets + self.intervals[i].start).to(self.backend.position_dtype)
            new = Columns.grown(positions, self.backend.load(i, self.backend.places(i, positions)).float())
            if self.config.moments == "seeded":
                self._seed(new, offsets, self.windows[i], betas)
            self.entries[i] = Columns.cat([self.entries[i], new]).sorted()
        self.state.set_entries(self.backend, self.entries)
        if self.backend.replicates:
            self._write_to_replicas()

    def _seed(self, new: Columns, offsets: Tensor, window: Window, betas: tuple[float, float]) -> None:
        age = window.num_steps
        assert window.total is not None and window.squares is not None, "seeded moments without their statistics"
        new.exp_avg = (1 - betas[0] ** age) / age * window.total[offsets].float()
        new.exp_avg_sq = (1 - betas[1] ** age) / age * window.squares[offsets].float()
        new.age = torch.full_like(new.age, age)

    def _write_to_replicas(self) -> None:
        """Write what other ranks changed in their intervals into this rank's whole weights. Collective."""
        changed = [torch.cat(moved) for moved in zip(self.dropped, self.removed, strict=True)]
        owners = self.backend.owners
        lengths = owners.stack(torch.tensor([len(offsets) for offsets in changed])).tolist()
        positions = owners.gather(
            torch.cat([offsets + part.start for offsets, part in zip(changed, self.intervals, strict=True)])
        )
        values = owners.gather(torch.cat([self.backend.own(i)[offsets] for i, offsets in enumerate(changed)]))
        for rank in range(owners.size):
            parts = zip(positions[rank].split(lengths[rank]), values[rank].split(lengths[rank]), strict=True)
            for i, (where, what) in enumerate(parts):
                self.backend.store(i, self.backend.places(i, where), what)
