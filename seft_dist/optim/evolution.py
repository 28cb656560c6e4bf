"""One evolution: drop, grow, adapt. Every rank decides about its own interval, and only the ranking is shared.

mask     1 1 1 0 0 1 0 1      S: positions with a delta
S          x       x          drop    the smallest |delta| leaves S            (here position 1)
         . . . . g . .        grow    the largest |gradient| outside S enters  (4 was pruned: it joins the mask)
mask     1 1 0 0 1 1 0 1      adapt   the least sensitive active one leaves    (2 becomes 0: as many active as before)

With ``swap_fraction`` no pruned position grows; the mask moves first, in ``seft_dist.optim.swap``.

With ``reactivate: trial`` Adapt comes first, and decides about what grew in the evolution before:

mask     1 1 1 0 0 1 0 1      adapt   nothing is on trial yet
         . . . . g . .        grow    4 joins the mask on trial: one more active than before
         ... training ...     4 is trained like any other delta
mask     1 1 0 0 1 1 0 1      adapt   the least of all leaves, 4 may be the one: as many active as before
"""

import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from seft_dist.backends import Backend
from seft_dist.config import SeftConfig
from seft_dist.optim.adapt import adapt, adapt_errors, adapt_key, end_trials
from seft_dist.optim.delta import Columns
from seft_dist.optim.drop import drop
from seft_dist.optim.grow import best_free, grow, num_candidates
from seft_dist.optim.report import EvolutionReport, Phase, ReportDraft
from seft_dist.optim.state import State
from seft_dist.optim.swap import Parent, swap
from seft_dist.optim.window import Window, share_positions
from seft_dist.optim.working_state import WorkingState
from seft_dist.sparsity.schedule import is_swap, reactivated_share, window_end
from seft_dist.sparsity.selection import INELIGIBLE

_T = TypeVar("_T")


class Evolution:
    """Runs one evolution, or narrows its windows to candidates."""

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
        parent: Parent | None = None,
    ) -> None:
        """Args:
        backend: Must be inside its ``writing()`` context.
        config: The method.
        state: Changed by ``run``.
        windows: Statistics of each target, up to and including this step.
        draft: Costs of the windows so far; ``keep_candidates`` adds to it, ``run`` reports it.
        step: Optimizer step, counted from 1.
        counts_near_ties: True to count near-ties for the report.
        parent: Model from which pruned positions come back; None: from none.
        """
        near_ties = (draft.near_ties or [0] * len(windows)) if counts_near_ties else None
        self.work = WorkingState(backend, config, state, windows, step=step, near_ties=near_ties)
        self._draft, self._parent = draft, parent
        self._phases: dict[str, Phase] = {}
        self._decided: list[int] = []
        """Number of own positions whose trial ended, and of those that stayed; empty without trials."""

    def run(self, fraction: float, betas: tuple[float, float], first: bool) -> EvolutionReport:
        """Move the support and the mask. Collective.

        Args:
            fraction: Share of the support that is dropped, 0 to 1.
            betas: Adam's decay rates, for seeded moments.
            first: True if this is the choice of the first support.

        Raises:
            RuntimeError: A promise about masks or supports does not hold afterwards.
        """
        work = self.work
        on_trial = work.config.reactivate == "trial"
        self._phase("window", self._prepare)
        if on_trial:
            self._decided = self._phase("adapt", lambda: end_trials(work))
        if (parent := self._parent) is not None and not first and is_swap(work.config, work.step):
            self._phase("swap", lambda: swap(work, parent))
        self._phase("drop", lambda: drop(work, fraction))
        self._phase("grow", lambda: grow(work))
        if not on_trial:
            self._phase("adapt", lambda: adapt(work))
        self._phase("commit", lambda: self.apply(betas))
        digest, moved, (tried, kept) = self._phase("verify", self._verify)
        dropped, grown, reactivated, pruned = map(sum, zip(*moved, strict=True))
        spent = list(self._phases.values())[1:]
        before, now = self._draft.take(), self._phases["window"]
        self._phases["window"] = Phase(before.seconds + now.seconds, before.bytes_sent + now.bytes_sent)
        support = sum(map(len, work.state.supports))
        return EvolutionReport(
            step=work.step,
            first=first,
            dropped=dropped,
            grown=grown,
            reactivated=reactivated,
            pruned=pruned,
            tried=tried,
            kept=kept,
            support=support,
            replaced=grown / max(support, 1),
            seconds=sum(phase.seconds for phase in spent),
            bytes_sent=sum(phase.bytes_sent for phase in spent),
            phases=self._phases,
            digest=digest,
            moved=moved,
            near_ties=work.near_ties,
        )

    def _prepare(self) -> None:
        for window in self.work.windows:
            window.reduce_factors()
        self.work.estimate_rounding()

    def _phase(self, name: str, act: Callable[[], _T]) -> _T:
        began, sent = time.perf_counter(), self.work.backend.bytes_sent
        result = act()
        self._phases[name] = Phase(time.perf_counter() - began, self.work.backend.bytes_sent - sent)
        return result

    def _verify(self) -> tuple[str, list[list[int]], list[int]]:
        """Check the promises about masks and supports, and count what has moved. Collective.

        Returns:
            The digest of the topology; for each target how many positions were dropped, grown, reactivated and pruned;
            and what was decided about trials.
        """
        work = self.work
        digest = work.state.verify(work.backend, work.config)
        back = [torch.cat(ways) for ways in zip(work.reactivated, work.returned, strict=True)]
        moved = zip(work.dropped, work.grown, back, work.pruned, strict=True)
        counts = [len(offsets) for row in moved for offsets in row]
        counts = work.backend.owners.sum(torch.tensor(counts + self._decided)).tolist()
        rows = [counts[4 * i : 4 * i + 4] for i in range(len(work.windows))]
        return digest, rows, counts[4 * len(rows) :] or [0, 0]

    def keep_candidates(self) -> None:
        """Narrow the windows to the support, the best positions to grow and the best to prune. Collective."""
        with self._draft.measuring(self.work.backend):
            self._choose_candidates()
        self._draft.near_ties = self.work.near_ties or []

    def _choose_candidates(self) -> None:
        """Rank with what one step of the window says, and keep more positions than an evolution needs. Collective."""
        work = self.work
        self._prepare()
        wanted = num_candidates(work)
        prune = work.nothing
        _, grown = best_free(work, wanted, reactivated_share(work.config, window_end(work.config, work.step)))
        if work.config.adapts_by == "sensitivity":

            def spare(i: int) -> Tensor:
                return adapt_key(work, i).index_fill_(0, work.offsets(i), INELIGIBLE)

            prune = work.select(
                spare,
                wanted if work.config.scope == "layer" else [sum(wanted)],
                lambda rounding, i: adapt_errors(work, rounding, i),
            )
        for i, window in enumerate(work.windows):
            window.narrow_to(torch.cat([work.offsets(i), grown[i], prune[i]]).unique())
        share_positions(work.backend, work.windows)

    def apply(self, betas: tuple[float, float]) -> None:
        """Write what left and entered the mask, and give the grown positions entries, known to every rank. Collective.

        The order matters: a backend that stores active positions only has to know the new mask before it can find a
        grown position, and entries must be in place before the replicas' weights are written.
        """
        work = self.work
        for i, pruned in enumerate(work.pruned):
            work.backend.remask(i, work.state.masks[i], pruned)
        work.backend.sync_mask_counts()
        for i, values in work.returned_values.items():
            where = work.backend.memory_indices(i, work.positions(i, work.returned[i]))
            work.backend.store(i, where, values)
        for i, offsets in enumerate(work.grown):
            positions = work.positions(i, offsets)
            new = Columns.grown(positions, work.backend.load(i, work.backend.memory_indices(i, positions)).float())
            if work.config.moments == "seeded":
                self._seed(new, offsets, work.windows[i], betas)
            work.entries[i] = Columns.cat([work.entries[i], new]).sorted()
        work.state.set_entries(work.backend, work.entries)
        if work.backend.replicates:
            self._write_to_replicas()

    def _seed(self, new: Columns, offsets: Tensor, window: Window, betas: tuple[float, float]) -> None:
        age = window.num_steps
        assert window.total is not None and window.squares is not None, "seeded moments without their statistics"
        new.exp_avg = (1 - betas[0] ** age) / age * window.total[offsets].float()
        new.exp_avg_sq = (1 - betas[1] ** age) / age * window.squares[offsets].float()
        new.age = torch.full_like(new.age, age)

    def _write_to_replicas(self) -> None:
        """Write what other ranks changed in their intervals into this rank's whole weights. Collective."""
        work = self.work
        changed = [torch.cat(moved) for moved in zip(work.dropped, work.pruned, work.returned, strict=True)]
        owners = work.backend.owners
        lengths = owners.stack(torch.tensor([len(offsets) for offsets in changed])).tolist()
        positions = owners.gather(
            torch.cat([offsets + part.start for offsets, part in zip(changed, work.intervals, strict=True)])
        )
        values = owners.gather(torch.cat([work.backend.own(i)[offsets] for i, offsets in enumerate(changed)]))
        for rank in range(owners.size):
            parts = zip(positions[rank].split(lengths[rank]), values[rank].split(lengths[rank]), strict=True)
            for i, (where, what) in enumerate(parts):
                work.backend.store(i, work.backend.memory_indices(i, where), what)
