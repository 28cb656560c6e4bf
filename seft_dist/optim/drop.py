"""The first part of an evolution: the least useful deltas leave the support."""

import torch
from torch import Tensor

from seft_dist.config.method import OnDrop
from seft_dist.kernels.ranking import ranking_keys
from seft_dist.optim.rounding import Rounding
from seft_dist.optim.working_state import WorkingState
from seft_dist.sparsity import scores
from seft_dist.sparsity.schedule import fraction_of, reactivated_share

_DROP = 1  # key of the random criterion's stream


def drop(work: WorkingState, fraction: float) -> None:
    """Take the entries with the smallest score out of the support. Collective.

    Args:
        work: The evolution.
        fraction: Share of the support that is dropped, 0 to 1, as far as there are positions to replace it.
    """

    def errors(rounding: Rounding, i: int) -> Tensor:
        return rounding.of_drop(i, work.offsets(i), work.entries[i])

    wanted = [min(fraction_of(fraction, size), most) for size, most in zip(work.sizes, _replaceable(work), strict=True)]
    chosen = work.select(lambda i: _drop_key(work, i), wanted, errors)
    work.dropped = []
    for i, which in enumerate(chosen):
        offsets, base = work.offsets(i)[which], work.entries[i].base[which]
        restored = _restored(work.config.on_drop, base)
        memory_indices = work.backend.memory_indices(i, offsets[restored] + work.intervals[i].start)
        work.backend.store(i, memory_indices, base[restored].to(work.backend.dtypes[i]))
        stays = torch.ones(len(work.entries[i]), dtype=torch.bool, device=which.device)
        stays[which] = False
        work.entries[i] = work.entries[i].take(stays)
        work.dropped.append(offsets)
        if work.config.on_drop == "revert":
            work.pruned[i] = offsets[base == 0]
            work.state.masks[i] = work.mark(i, work.state.masks[i], work.pruned[i], False)
        committed = work.positions(i, offsets[~restored])
        work.state.committed[i] = torch.cat([work.state.committed[i], committed]).unique()
    work.count_entries()


def _restored(on_drop: OnDrop, base: Tensor) -> Tensor:
    """Tell for each entry whether its base returns; else the weight as it stands becomes the base.

    A base of 0 is a position that was reactivated earlier. Back at 0 it would be an active position with weight 0, so
    its weight stays, and Adapt decides about it; or, with "revert", it leaves the mask.
    """
    if on_drop == "commit_reactivated":
        return base != 0
    return torch.full_like(base, on_drop == "revert", dtype=torch.bool)


def _replaceable(work: WorkingState) -> list[int]:
    """Return how many deltas of each target positions without one could replace. Collective with ``adapt: none``.

    What is dropped may not come back in the same evolution. Scores of 0 and groups of N:M can leave fewer.
    """
    of_active = 1 - reactivated_share(work.config, work.step)  # of the positions to grow, at least this share is active
    # only adapt: none lets masks grow beyond their sizes
    active = work.state.active(work.backend) if work.config.adapt == "none" else work.state.mask_sizes
    limits = []
    for partition, held, budget in zip(work.backend.partitions, active, work.state.budgets, strict=True):
        most = partition.numel - budget
        if of_active:  # the small number is for quotients that are whole but for rounding
            most = min(most, int(max(0, held - budget) / of_active + 1e-6))
        limits.append(most)
    return limits


def _drop_key(work: WorkingState, i: int) -> Tensor:
    entries = work.entries[i]
    if work.config.drop == "magnitude":
        score = scores.drop_magnitude(entries.values)
    elif work.config.drop == "movement":
        score = scores.drop_movement(entries.values, work.windows[i].gradient()[work.offsets(i)])
    else:
        score = scores.uniform(entries.indices.long(), work.config.seed, i, work.step, _DROP)
    return ranking_keys(score, largest=False)
