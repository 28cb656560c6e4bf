"""Exact distributed top-k for all layers together, and the check that all ranks chose the same.

A *problem* is one ranking: a layer of its own, or all layers together (scope "global"). Candidates of a problem are
ordered by layer, then position; ranks own consecutive intervals, so this is also the order (layer, rank, local index),
and ties go to the first in it on every layout.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from seft_dist.backends.group import Group
from seft_dist.config import Selection
from seft_dist.kernels.ranking import first_histogram, survivors, top_k
from seft_dist.sparsity.selection import (
    BINS,
    DIGITS,
    INELIGIBLE,
    descend,
    histogram,
    take,
    threshold_key,
    values_of,
)


def select(
    group: Group, keys: Callable[[int], Tensor], problems: list[int], wanted: list[int], form: Selection = "auto"
) -> list[Tensor]:
    """Select the largest keys of each problem over all ranks. Collective.

    Args:
        group: The ranks that own the candidates.
        keys: This rank's keys of a layer, int32 [n]; called once or twice a layer, so that only one layer's exist.
        problems: The problem that each layer belongs to, 0 .. len(wanted) - 1.
        wanted: How many entries of each problem are selected; all of them if fewer compete.
        form: "gather", "radix", or "auto" for the one that moves fewer bytes. The result is the same.

    Returns:
        For each layer the selected local indices, int64, increasing.
    """
    if group.size == 1 and problems == list(range(len(wanted))):
        return [top_k(keys(layer), wanted[problem]) for layer, problem in enumerate(problems)]
    if form == "auto":
        candidates = sum(wanted[problem] for problem in problems)
        # Bytes of a rank on a ring, both divided by (size - 1) / size.
        form = "gather" if 4 * candidates * group.size < 2 * 8 * BINS * len(DIGITS) * len(wanted) else "radix"
    chosen = _select_gather if form == "gather" and group.size > 1 else _select_radix
    return chosen(group, keys, problems, wanted)


def _select_radix(group: Group, keys: Callable[[int], Tensor], problems: list[int], wanted: list[int]) -> list[Tensor]:
    """Find each problem's threshold digit by digit, from summed histograms of the keys. Collective.

    Ranks send counts only, whose number does not depend on the number of candidates. Arguments are those of ``select``.
    """
    counts = torch.zeros(len(wanted), BINS, dtype=torch.int64)
    for layer, problem in enumerate(problems):
        counts[problem] += first_histogram(keys(layer)).cpu()
    group.sum(counts)
    prefixes, left = descend(counts, torch.tensor(wanted).minimum(counts.sum(1)))
    # From here on only those above the first digit's bin matter, and the keys are computed once more for them.
    indices, kept = [], []
    for layer, problem in enumerate(problems):
        surviving, key = survivors(keys(layer), int(prefixes[problem]))
        indices.append(surviving)
        kept.append(key)
    for digit, (_, bits) in list(enumerate(DIGITS))[1:]:
        counts.zero_()
        for layer, problem in enumerate(problems):
            counts[problem] += histogram(kept[layer], digit, int(prefixes[problem])).cpu()
        next_digit, left = descend(group.sum(counts), left)
        prefixes = prefixes << bits | next_digit
    thresholds = [threshold_key(int(prefix)) for prefix in prefixes]
    ties = torch.tensor([int((kept[layer] == thresholds[problem]).sum()) for layer, problem in enumerate(problems)])
    allowed = _share_ties(group.stack(ties), group.rank, problems, left.tolist())
    return [
        indices[layer][take(kept[layer], thresholds[problem], allowed[layer])] for layer, problem in enumerate(problems)
    ]


def _share_ties(ties: Tensor, rank: int, problems: list[int], left: list[int]) -> list[int]:
    """Return how many ties this rank takes in each layer.

    Args:
        ties: int64 [ranks, layers], ties that each rank has.
        rank: This rank.
        problems: The problem that each layer belongs to.
        left: Ties that are wanted of each problem.
    """
    allowed = []
    left = list(left)
    for layer, problem in enumerate(problems):
        counts = ties[:, layer].tolist()
        allowed.append(max(0, min(counts[rank], left[problem] - sum(counts[:rank]))))
        left[problem] = max(0, left[problem] - sum(counts))
    return allowed


def _select_gather(group: Group, keys: Callable[[int], Tensor], problems: list[int], wanted: list[int]) -> list[Tensor]:
    """Gather each rank's best keys, as many as are wanted in all, and rank them on every rank. Collective.

    Cheaper than histograms where few are wanted. Arguments are those of ``select``.
    """
    own, own_keys = [], []
    for layer, problem in enumerate(problems):
        key = keys(layer)
        own.append(top_k(key, wanted[problem]))
        own_keys.append(key[own[-1]])
    lengths = group.stack(torch.tensor([indices.numel() for indices in own])).tolist()
    pieces = [rank_keys.cpu().split(lengths[rank]) for rank, rank_keys in enumerate(group.gather(torch.cat(own_keys)))]
    selected: list[Tensor] = [indices[:0] for indices in own]
    for problem, count in enumerate(wanted):
        layers = [layer for layer, its_problem in enumerate(problems) if its_problem == problem]
        # Layers first, then ranks: positions in ascending order, so that a stable sort breaks ties as one rank would.
        order = [(layer, rank) for layer in layers for rank in range(group.size)]
        candidates = torch.cat([pieces[rank][layer] for layer, rank in order])
        is_chosen = torch.zeros(candidates.numel(), dtype=torch.bool)
        is_chosen[torch.sort(candidates, descending=True, stable=True).indices[:count]] = True
        for (layer, rank), part in zip(order, is_chosen.split([lengths[r][i] for i, r in order]), strict=True):
            if rank == group.rank:
                selected[layer] = own[layer][part.to(own[layer].device)]
    return selected


def near_ties(
    group: Group,
    keys: Callable[[int], Tensor],
    problems: list[int],
    chosen: list[Tensor],
    errors: Callable[[int], Tensor],
) -> list[int]:
    """Count the candidates that rounding could put on the other side of a selection's border. Collective.

    The border is midway between the last selected score and the first that is not. Where two candidates can change
    places, the distance between them is at most the sum of their errors, so at least one of them is within its own
    error of the border: no more than twice as many positions can differ as are counted.

    Args:
        group: The ranks that own the candidates.
        keys: This rank's keys of a layer; called twice for each layer.
        problems: The problem that each layer belongs to.
        chosen: What ``select`` returned.
        errors: Returns how far rounding can move each score of a layer, fp32 [n]. Candidates with error 0 are not
            counted.

    Returns:
        Number of candidates of each layer, over all ranks, within their error of the border; 0 where all were selected,
        or none.
    """
    nothing = 1 << 32
    # Largest first, so that one reduction finds both: minus the last selected key, and the first that is not.
    borders = torch.full((2, max(problems) + 1), -nothing)
    for layer, problem in enumerate(problems):
        key = keys(layer)
        if chosen[layer].numel():
            borders[0, problem] = torch.maximum(borders[0, problem], -key[chosen[layer]].min().cpu().long())
        left = key.index_fill(0, chosen[layer], INELIGIBLE)
        if left.numel() and int(first := left.max()) != INELIGIBLE:
            borders[1, problem] = max(int(borders[1, problem]), int(first))
    group.max(borders)
    contested = (borders > -nothing).all(0)[problems].tolist()
    ends = borders.masked_fill(borders == -nothing, 0) * torch.tensor([[-1], [1]])
    middles = values_of(ends.to(torch.int32)).double().mean(0)[problems].tolist()
    counts = torch.zeros(len(problems), dtype=torch.int64)
    for layer in range(len(problems)):
        if contested[layer]:
            error = errors(layer)
            # the ineligible are NaN, near to nothing
            near = ((values_of(keys(layer)) - middles[layer]).abs() <= error) & (error > 0)
            counts[layer] = torch.count_nonzero(near)
    return group.sum(counts).tolist()


def next_to_border(group: Group, keys: Callable[[int], Tensor], layers: int, wanted: int, by: int) -> list[int]:
    """Count the candidates that are selected or not where a few more or fewer are wanted. Collective.

    Args:
        group: The ranks that own the candidates.
        keys: This rank's keys of a layer, all of one problem.
        layers: Number of layers.
        wanted: Number of entries that are selected.
        by: Number of entries more, or fewer, that could be selected.

    Returns:
        Number of candidates of each layer, over all ranks, that are at most ``by`` candidates away from the border.
    """
    if not by:
        return [0] * layers
    most, fewest = (select(group, keys, [0] * layers, [max(0, wanted + change)]) for change in (by, -by))
    return group.sum(torch.tensor([len(one) - len(other) for one, other in zip(most, fewest, strict=True)])).tolist()


def differing_ranks(owners: Group, replicas: Group, value: int) -> list[int]:
    """Find the ranks whose value is not the commonest one of all owners and replicas. Collective.

    Returns:
        Their numbers, replica by replica, the same on every rank: so either all ranks raise an error or none does.
    """
    values = replicas.stack(owners.stack(torch.tensor([value]))).view(-1)
    return (values != values.mode().values).nonzero().view(-1).tolist()
