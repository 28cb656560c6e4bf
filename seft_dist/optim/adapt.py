"""The third part of an evolution: the mask shrinks to its size again."""

import torch
from torch import Tensor

from seft_dist.kernels import bits
from seft_dist.kernels.ranking import ranking_keys
from seft_dist.optim.collectives import next_to_border
from seft_dist.optim.nm_groups import GroupRanking, NMGroups
from seft_dist.optim.rounding import Rounding
from seft_dist.optim.working_state import WorkingState
from seft_dist.sparsity import scores
from seft_dist.sparsity.selection import INELIGIBLE


def adapt(work: WorkingState) -> None:
    """Take the active positions with the smallest score out of the mask until it has its size again. Collective.

    Their weights become 0 in ``Evolution.apply``. Positions that grew in this evolution do not compete. Positions on
    trial do: their trial ends here.
    """
    if work.config.adapts_by is None:
        return
    if work.config.adapt == "activation":
        work.norms = {i: window.summed_norms().sqrt() for i, window in enumerate(work.windows)}
    work.pruned = _least_of_layers(work) if work.groups is None else _least_of_groups(work, work.groups)
    for i, offsets in enumerate(work.pruned):
        mask = work.state.masks[i] = work.mark(i, work.state.masks[i], offsets, False)
        work.entries[i] = work.entries[i].take(bits.holds(mask, work.offsets(i)))
        committed = work.state.committed[i]
        work.state.committed[i] = committed[bits.holds(mask, committed.long() - work.intervals[i].start)]
    if work.config.scope == "global":
        work.state.mask_sizes = work.state.active(work.backend)


def end_trials(work: WorkingState) -> list[int]:
    """Decide about the positions on trial: all active positions are ranked, and the mask shrinks. Collective.

    Returns:
        Number of this rank's positions that were on trial, and of those that stay in the mask.
    """
    tried = work.state.trial
    adapt(work)
    stay = [
        bits.holds(mask, where.long() - interval.start)
        for mask, where, interval in zip(work.state.masks, tried, work.intervals, strict=True)
    ]
    work.state.trial = [where[:0] for where in tried]
    work.count_entries()
    return [sum(map(len, tried)), sum(int(each.sum()) for each in stay)]


def _least_of_layers(work: WorkingState) -> list[Tensor]:
    active = work.state.active(work.backend)
    excess = [have - want for have, want in zip(active, work.state.mask_sizes, strict=True)]
    if work.config.scope == "row":
        return _least_of_rows(work)
    wanted = excess if work.config.scope == "layer" else [sum(excess)]

    def key(i: int) -> Tensor:
        return adapt_key(work, i)

    pruned = work.select(key, wanted, lambda rounding, i: adapt_errors(work, rounding, i))
    if work.rounding is not None and work.config.scope == "global":
        # A near-tie of one layer in Grow moves the border for all of them.
        by = sum(work.near_ties or ()) - work.counted_before
        work.count(next_to_border(work.backend.owners, key, len(work.windows), wanted[0], by))
    return pruned


def _least_of_rows(work: WorkingState) -> list[Tensor]:
    """Choose in each row as many positions as it has too many. One process only."""
    assert work.backend.owners.size == 1
    pruned = []
    for i, grown in enumerate(work.reactivated):
        rows, cols = work.backend.shapes[i]
        excess = torch.bincount(grown // cols, minlength=rows)
        key, where = adapt_key(work, i).view(rows, cols).sort(1, descending=True)
        least = (torch.arange(cols) < excess.unsqueeze(1)) & (key != INELIGIBLE)
        chosen = (where + torch.arange(rows).unsqueeze(1) * cols)[least]
        # a row in which more have grown than others are left: the rest leaves anywhere in the layer
        missing = int(excess.sum()) - len(chosen)
        others = adapt_key(work, i).index_fill_(0, chosen, INELIGIBLE).topk(missing).indices
        pruned.append(torch.cat([chosen, others]).sort().values)
    return pruned


def _least_of_groups(work: WorkingState, groups: NMGroups) -> list[Tensor]:
    """Choose in each group as many positions as it has too many. Collective."""

    def too_many(i: int) -> Tensor:
        marks = torch.zeros(len(work.intervals[i]), dtype=torch.bool, device=work.backend.device)
        marks[work.reactivated[i]] = True
        marks[work.state.trial[i].long() - work.intervals[i].start] = True
        return marks

    ranking = GroupRanking(groups, lambda i: adapt_key(work, i), groups.counter(too_many))
    pruned = [(ranking(i) != INELIGIBLE).nonzero().view(-1) for i in range(len(work.windows))]
    work.count_pattern_near_ties(ranking, pruned, lambda rounding, i: adapt_errors(work, rounding, i))
    return pruned


def current_weight(work: WorkingState, i: int) -> Tensor:
    """Return a target's own weights, fp32 [own], those of the deltas before any cast."""
    weight = work.backend.own(i).to(torch.float32, copy=True)
    weight[work.offsets(i)] = work.entries[i].weight()  # fp32, before any cast
    return weight


def curvature_price(work: WorkingState, i: int, weight: Tensor) -> Tensor:
    """Return ``scores.curvature`` of weights fp32 [own] that a target could have, by its window."""
    return scores.curvature(weight, *work.windows[i].moments(), work.intervals[i].start)


def without_tokens(work: WorkingState, i: int) -> Tensor | None:
    """Return which of a target's own positions belong to experts that no token of the window has used, bool [own].

    Nothing is known of what they are worth, so they should stay as they are. None: there are no such experts.
    """
    experts = work.backend.experts[i]
    if experts == 1:
        return None
    # Tokens that the loss does not see say nothing either: the gradient of their outputs is 0.
    sums = work.norms[i] if work.norms else work.windows[i].moments()[0].view(experts, -1)
    silent = sums.sum(1) == 0
    interval, each = work.intervals[i], work.backend.partitions[i].numel // experts
    first, last = interval.start // each, -(-interval.stop // each)
    return silent[first:last].repeat_interleave(each)[interval.start - first * each :][: len(interval)]


def adapt_errors(work: WorkingState, rounding: Rounding, i: int) -> Tensor:
    """Return how far rounding can move each of ``adapt_key``'s scores, fp32 [own]."""
    return rounding.of_adapt(i, current_weight(work, i), work.norms.get(i), work.offsets(i), work.entries[i])


def adapt_key(work: WorkingState, i: int) -> Tensor:
    """Return the keys by which a target's own positions leave the mask, int32 [own]."""
    weight, window = current_weight(work, i), work.windows[i]
    # Without the grown ones: their weight is still 0, the step would undo itself.
    eligible = work.mark(i, work.state.masks[i], work.grown[i], False)
    if work.config.adapt == "sensitivity":
        if (known := window.known()) is not None:
            eligible &= known
        return ranking_keys(weight, largest=False, eligible=eligible, times=window.gradient())
    if work.config.adapt == "magnitude":
        return ranking_keys(weight, largest=False, eligible=eligible, absolute=True)
    if work.config.adapt == "curvature":
        score = curvature_price(work, i, weight)
    else:
        score = scores.activation(weight, work.norms[i], work.intervals[i].start, work.backend.shapes[i][0])
    if (unknown := without_tokens(work, i)) is not None:
        score.masked_fill_(unknown, torch.finfo(torch.float32).max)  # eligible, but after all others
    return ranking_keys(score, largest=False, eligible=eligible)
