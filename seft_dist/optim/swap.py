"""Swaps: pruned positions come back with their value in the parent, the model before it was pruned, for active ones.

    active ones that promise least    prices  1  3  5      in pairs, from the outside in:
    pruned ones that promise most     prices  8  4  2      8 > 1 and 4 > 3 change places, 2 < 5 do not

The price is that of ``adapt: curvature``: how much the loss may rise without the weight. A position that comes back has
its trained value at once, so it is compared with active ones before anything is given up.
"""

from collections.abc import Mapping
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from seft_dist.backends.shards import whole_shape
from seft_dist.config import SeftConfig
from seft_dist.kernels import bits
from seft_dist.kernels.ranking import ranking_keys
from seft_dist.modules.kinds import Target
from seft_dist.optim.adapt import current_weight, curvature_price, without_tokens
from seft_dist.optim.delta import least_size
from seft_dist.optim.rounding import Rounding
from seft_dist.optim.working_state import WorkingState
from seft_dist.sparsity.schedule import fraction_of


class Parent(Protocol):
    """The model before it was pruned, whose weights are read where they are needed (``seft_dist.io.parent``)."""

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise a ValueError unless the parent has these targets, with weights that are stored in these shapes."""

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return the values [start, stop) of a target's flattened weight, in any dtype and memory."""


def check_parent(parent: Parent | None, config: SeftConfig, targets: Mapping[str, Target]) -> None:
    """Check that there is a parent if, and only if, weights are to come back from it.

    Raises:
        ValueError: There is none, it is of no use, or it is another model.
    """
    if parent is None:
        if config.swap_fraction > 0:
            raise ValueError(
                f"swap_fraction={config.swap_fraction:g} without a parent: needs the model before it was pruned "
                '(--parent FOLDER of seft train, or SeftOptimizer(..., parent=ParentModel.open("FOLDER"))), or '
                "swap_fraction 0"
            )
        return
    if not config.swap_fraction:
        raise ValueError(
            "a parent without swap_fraction: nothing would come back from it; set swap_fraction, e.g. to 0.02, or give "
            "no parent"
        )
    shapes = {name: whole_shape(target.weight) for name, target in targets.items()}
    largest = max(map(prod, shapes.values()))
    if not fraction_of(config.swap_fraction, largest):
        raise ValueError(
            f"swap_fraction={config.swap_fraction:g} lets no position swap, since the largest target has {largest} "
            "weights: choose a larger share"
        )
    parent.check(shapes)


def swap(work: WorkingState, parent: Parent) -> None:
    """Let active and pruned positions change places where the pruned one has the higher price. Collective.

    The weights are written later, in ``Evolution.apply``.
    """
    pruned = _Pruned(work, parent)
    most = [fraction_of(work.config.swap_fraction, partition.numel) for partition in work.backend.partitions]
    layers = work.config.scope == "layer"
    wanted = most if layers else [sum(most)]
    leaving = work.select(lambda i: _leaving_keys(work, i), wanted, lambda rounding, i: _errors(work, rounding, i))
    coming = work.select(pruned.keys, wanted, pruned.errors)
    # One more ranking counts the pairs that change places: of both lists together, as many win as could have left. For
    # each pruned position among the winners one comes: the dearest do, and the cheapest active ones leave.
    prices = [_both_prices(work, pruned, i, leaving[i], coming[i]) for i in range(len(coming))]
    counts = work.backend.owners.sum(torch.tensor(list(map(len, leaving)))).tolist()
    winners = work.select(
        lambda i: _pair_keys(prices[i], len(leaving[i])),
        counts if layers else [sum(counts)],
        lambda rounding, i: torch.cat([_errors(work, rounding, i)[leaving[i]], pruned.errors(rounding, i)[coming[i]]]),
    )
    lengths = list(map(len, leaving))
    own = torch.stack([(chosen >= length).sum() for chosen, length in zip(winners, lengths, strict=True)])
    del winners  # as large as a list
    pairs = work.backend.owners.sum(own).tolist()
    pairs = pairs if layers else [sum(pairs)]
    lists = [each.tensor_split([length]) for each, length in zip(prices, lengths, strict=True)]
    # The lists were ranked before, so their near-ties are counted already.
    leave = work.choose(lambda i: ranking_keys(lists[i][0], largest=False), pairs)
    come = work.choose(lambda i: ranking_keys(lists[i][1], largest=True), pairs)
    for i in range(len(prices)):
        _change_places(work, i, leaving[i][leave[i]], coming[i][come[i]])
        work.returned_values[i] = pruned.values(i)[work.returned[i]]
    if not layers:
        active = work.state.active(work.backend)
        if sum(active) != sum(work.state.mask_sizes):
            raise RuntimeError(f"swaps left {sum(active)} active positions, not {sum(work.state.mask_sizes)}")
        work.state.mask_sizes = active
    work.count_entries()


class _Pruned:
    """The pruned positions as the parent has them; the values of one target at a time are in memory."""

    def __init__(self, work: WorkingState, parent: Parent) -> None:
        self._work, self._parent = work, parent

    def values(self, i: int) -> Tensor:
        """Return the parent's values of a target's own interval, in the dtype of the weights."""
        backend, interval = self._work.backend, self._work.intervals[i]
        values = self._parent.read(backend.names[i], interval.start, interval.stop)
        return values.to(backend.device).to(backend.dtypes[i])

    def prices(self, i: int) -> Tensor:
        """Return the prices of these values, fp32 [own]."""
        return curvature_price(self._work, i, self.values(i).float())

    def keys(self, i: int) -> Tensor:
        """Return the keys by which a target's own positions come back, int32 [own]; those without a value cannot."""
        values = self.values(i)
        usable = (values.abs() >= least_size(values.dtype)) & values.isfinite() & ~self._work.mask(i)
        if (unknown := without_tokens(self._work, i)) is not None:
            usable &= ~unknown
        prices = curvature_price(self._work, i, values.float().masked_fill(~usable, 0.0))
        return ranking_keys(prices, largest=True, eligible=bits.pack(usable))

    def errors(self, rounding: Rounding, i: int) -> Tensor:
        """Return how far rounding can move the prices, fp32 [own]; the values themselves are exact."""
        values = self.values(i).float()
        return rounding.of_price(i, values, torch.zeros_like(values))


def _leaving_keys(work: WorkingState, i: int) -> Tensor:
    price, eligible = curvature_price(work, i, current_weight(work, i)), work.state.masks[i]
    if (unknown := without_tokens(work, i)) is not None:
        eligible = eligible & bits.pack(~unknown)
    return ranking_keys(price, largest=False, eligible=eligible)


def _errors(work: WorkingState, rounding: Rounding, i: int) -> Tensor:
    weight = current_weight(work, i)
    return rounding.of_price(i, weight, rounding.of_weights(i, weight, work.offsets(i), work.entries[i]))


def _both_prices(work: WorkingState, pruned: _Pruned, i: int, leaving: Tensor, coming: Tensor) -> Tensor:
    return torch.cat([curvature_price(work, i, current_weight(work, i))[leaving], pruned.prices(i)[coming]])


def _pair_keys(prices: Tensor, num_active: int) -> Tensor:
    """Return keys of active and pruned positions, int32, such that of equal prices that of an active position wins.

    The last bit of the keys says who is active. So prices are compared without their last bit, on every layout.
    """
    key = ranking_keys(prices, largest=True)
    key[:num_active] |= 1
    key[num_active:] &= ~1
    return key


def _change_places(work: WorkingState, i: int, leave: Tensor, come: Tensor) -> None:
    """Take own offsets out of a target's mask, its support and what was committed, and put others into the mask."""
    start = work.intervals[i].start
    mask = work.mark(i, work.mark(i, work.state.masks[i], leave, False), come, True)
    work.state.masks[i], work.pruned[i], work.returned[i] = mask, leave, come
    work.entries[i] = work.entries[i].take(bits.holds(mask, work.offsets(i)))
    committed = work.state.committed[i]
    committed = committed[bits.holds(mask, committed.long() - start)]
    work.state.committed[i] = torch.cat([committed, work.positions(i, come)]).unique()
