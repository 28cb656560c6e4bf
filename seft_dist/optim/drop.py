"""The first part of an evolution: the least useful deltas leave the support."""

import torch
from torch import Tensor

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
        fraction: Share of the support that is dropped, 0 to 1. No more are dropped than can be replaced: by active
            positions without a delta, and pruned ones as far as ``reactivation`` admits them.
    """

    def errors(rounding: Rounding, i: int) -> Tensor:
        return rounding.of_drop(i, work.offsets(i), work.entries[i])

    wanted = [fraction_of(fraction, size) for size in work.sizes]
    of_active = 1 - reactivated_share(work.config, work.step)  # of the positions to grow, at least this share is active
    if of_active:
        spare = [max(0, active - most) for active, most in zip(work.state.mask_sizes, work.state.budgets, strict=True)]
        wanted = [min(count, int(active / of_active)) for count, active in zip(wanted, spare, strict=True)]
    chosen = work.select(lambda i: _drop_key(work, i), wanted, errors)
    work.dropped = []
    for i, which in enumerate(chosen):
        offsets, base = work.offsets(i)[which], work.entries[i].base[which]
        # base 0 is a position reactivated earlier: back at 0 it would be an active position with weight 0, so its
        # delta (the weight as it stands) becomes the base, and Adapt decides about it.
        restored = (
            base != 0 if work.config.on_drop == "commit_reactivated" else torch.zeros_like(base, dtype=torch.bool)
        )
        memory_indices = work.backend.memory_indices(i, offsets[restored] + work.intervals[i].start)
        work.backend.store(i, memory_indices, base[restored].to(work.backend.dtypes[i]))
        stays = torch.ones(len(work.entries[i]), dtype=torch.bool, device=which.device)
        stays[which] = False
        work.entries[i] = work.entries[i].take(stays)
        work.dropped.append(offsets)
        committed = work.positions(i, offsets[~restored])
        work.state.committed[i] = torch.cat([work.state.committed[i], committed]).unique()
    work.count_entries()


def _drop_key(work: WorkingState, i: int) -> Tensor:
    entries = work.entries[i]
    if work.config.drop == "magnitude":
        score = scores.drop_magnitude(entries.values)
    elif work.config.drop == "movement":
        score = scores.drop_movement(entries.values, work.windows[i].gradient()[work.offsets(i)])
    else:
        score = scores.uniform(entries.indices.long(), work.config.seed, i, work.step, _DROP)
    return ranking_keys(score, largest=False)
