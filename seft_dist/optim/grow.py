"""The second part of an evolution: the most promising positions enter the support, pruned ones too."""

from collections.abc import Callable

import torch
from torch import Tensor

from seft_dist.kernels import bits
from seft_dist.kernels.ranking import ranking_keys
from seft_dist.optim.nm_groups import GroupRanking
from seft_dist.optim.rounding import Rounding
from seft_dist.optim.working_state import WorkingState
from seft_dist.sparsity import scores
from seft_dist.sparsity.schedule import fraction_of, reactivated_share
from seft_dist.sparsity.selection import INELIGIBLE

_GROW = 2  # key of the random criterion's stream


def grow(work: WorkingState) -> None:
    """Put the positions with the largest score above 0 into the support, pruned ones too. Collective."""
    wanted = [max(0, budget - size) for budget, size in zip(work.state.budgets, work.sizes, strict=True)]
    if work.windows[0].positions is not None:  # at most as many as candidates, so that Adapt has as many to prune
        wanted = [min(pair) for pair in zip(wanted, num_candidates(work), strict=True)]
    ranking, work.grown = best_free(work, wanted, reactivated_share(work.config, work.step))
    work.count_pattern_near_ties(ranking, work.grown, Rounding.of_grow)
    work.reactivated = []
    for i, offsets in enumerate(work.grown):
        work.reactivated.append(offsets[~bits.holds(work.state.masks[i], offsets)])
        if len(work.reactivated[i]):  # a changed mask is a copy; packed weights keep the one before until `apply`
            work.state.masks[i] = work.mark(i, work.state.masks[i], work.reactivated[i], True)
    if work.config.reactivate == "trial":
        work.state.trial = [work.positions(i, offsets).sort().values for i, offsets in enumerate(work.reactivated)]


def best_free(
    work: WorkingState, wanted: list[int], reactivated: float
) -> tuple[Callable[[int], Tensor], list[Tensor]]:
    """Rank the positions that may grow, and choose the best, not too many pruned ones among them. Collective.

    Args:
        work: The evolution.
        wanted: How many of each target may grow.
        reactivated: Share of them that may be pruned positions, 0 to 1.

    Returns:
        The ranking, and the own offsets that were chosen.
    """
    caps = [fraction_of(reactivated, count) for count in wanted]
    any_free = _inside_groups(work, lambda i: _grow_key(work, i, _free(work, i)))
    if caps == wanted:
        return any_free, work.select(any_free, wanted, Rounding.of_grow)
    # The same as walking down one list and passing over pruned positions beyond the cap: the best pruned ones up to
    # the cap compete with all active ones.
    returning = work.nothing
    if any(caps):
        returning = work.select(lambda i: any_free(i).masked_fill_(work.mask(i), INELIGIBLE), caps, Rounding.of_grow)

    def with_best_pruned(i: int) -> Tensor:
        return _grow_key(work, i, work.mark(i, _free(work, i) & work.state.masks[i], returning[i], True))

    ranking = _inside_groups(work, with_best_pruned)
    return ranking, work.select(ranking, wanted, Rounding.of_grow)


def num_candidates(work: WorkingState) -> list[int]:
    """Return how many candidates of each kind a window keeps of each target."""
    return [fraction_of(work.config.window_candidates, budget) for budget in work.state.budgets]


def _inside_groups(work: WorkingState, key: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    """Let only the best of each group compete to grow, as many as it has active positions.

    Collective with a pattern. Each reactivated position costs its group an active position that did not grow, so there
    are always enough of those. A position on trial costs nothing before it is decided, and then competes itself.
    """
    if work.groups is None or work.config.reactivate == "trial":
        return key
    return GroupRanking(work.groups, key, work.groups.counter(work.mask))


def _free(work: WorkingState, i: int) -> Tensor:
    """Return the positions that may enter the support, uint8, packed."""
    free = work.windows[i].known()
    if free is None:
        free = torch.full_like(work.state.masks[i], 255)
    # what left in this step may not come back in it
    return work.mark(i, free, torch.cat([work.offsets(i), work.dropped[i], work.pruned[i]]), False)


def _grow_key(work: WorkingState, i: int, eligible: Tensor) -> Tensor:
    start, numel = work.intervals[i].start, len(work.intervals[i])
    if work.config.grow == "gradient":
        key = ranking_keys(work.windows[i].gradient(), largest=True, eligible=eligible, absolute=True)
    elif work.config.grow == "momentum":
        rows, cols = work.windows[i].rows, work.windows[i].cols
        assert rows is not None and cols is not None, "criterion without its statistics"
        key = ranking_keys(scores.momentum(rows, cols, start, numel), largest=True, eligible=eligible)
    else:
        positions = torch.arange(start, start + numel, device=work.backend.device)
        score = scores.uniform(positions, work.config.seed, i, work.step, _GROW)
        return ranking_keys(score, largest=True, eligible=eligible)
    # A position with score 0 would gain nothing: it costs an active weight, and the next update does not move it.
    return key.masked_fill_(key == 0, INELIGIBLE)
