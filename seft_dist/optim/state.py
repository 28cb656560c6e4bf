"""The topology and the deltas of a run as one rank holds them, and the promises they must keep."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from seft_dist.backends import Backend
from seft_dist.backends.zeros import count_zeros_over_ranks
from seft_dist.config import SeftConfig
from seft_dist.kernels import bits
from seft_dist.optim.delta import Columns, Support, gather_supports, least_size
from seft_dist.optim.nm_groups import NMGroups
from seft_dist.optim.window import Window
from seft_dist.sparsity import scores
from seft_dist.sparsity.partition import Interval
from seft_dist.sparsity.schedule import fraction_of


def deltas_asked_for(backend: Backend, config: SeftConfig) -> list[int]:
    """Return how many deltas of each target the density asks for, whether or not so many of its weights are active."""
    return [fraction_of(config.density, partition.numel) for partition in backend.partitions]


@dataclass(frozen=True)
class LayerSparsity:
    """Counts of one target weight over all ranks."""

    name: str
    numel: int
    mask_size: int
    """Active positions wanted."""
    active: int
    """Active positions of the mask."""
    zeros: int
    """Weights that are exactly 0."""
    support: int
    """Deltas."""
    trial: int = 0
    """Active positions on trial, beyond ``mask_size`` (``reactivate: trial``)."""


@dataclass(frozen=True)
class LayerDelta:
    """This rank's part of one target (views, not copies)."""

    name: str
    shape: tuple[int, int]
    interval: Interval
    mask: Tensor
    """uint8, packed mask of the interval."""
    mask_size: int
    """Active positions wanted in the whole weight."""
    columns: Columns
    committed: Tensor
    """``Backend.position_dtype``, positions whose delta became part of the base once."""
    committed_values: Tensor
    """Weights at ``committed`` now, in the model's dtype."""
    trial: Tensor
    """``Backend.position_dtype``, positions on trial: they have a delta, and do not count in ``mask_size``."""
    window: Window | None
    """Statistics of a window that has begun; None outside one."""


@dataclass
class State:
    """Masks and deltas of this rank's intervals; lists have one item for each target."""

    columns: Columns
    lengths: list[int]
    """Number of own entries of each layer in ``columns``."""
    memory_indices: list[Tensor]
    """Index of the own entries of each layer in the backend's memory (``Backend.memory_indices``)."""
    masks: list[Tensor]
    """uint8, packed mask of the own interval."""
    mask_sizes: list[int]
    """Active positions wanted in each whole weight (under scope "global" only their sum is kept)."""
    budgets: list[int]
    """Most deltas each whole weight may carry."""
    supports: list[Support]
    """All ranks' positions."""
    committed: list[Tensor]
    """Own positions whose delta became part of the base once, ``Backend.position_dtype``.

    Beside masks and columns, they make the weights differ from the pruned model. They stay listed when they enter the
    support again.
    """
    trial: list[Tensor]
    """Own positions on trial, increasing, ``Backend.position_dtype`` (``reactivate: trial``).

    They are active beyond ``mask_sizes`` and have a delta over base 0; the next evolution decides about them.
    """
    fingerprints: list[int]
    """Hash of each whole weight as loaded, the same for every layout."""
    group_prints: list[int] = field(default_factory=list)
    """``NMGroups.fingerprints`` of each whole weight's active positions at the start; empty without a pattern."""

    def layers(self) -> Iterator[Columns]:
        """Yield the own entries of each layer (views)."""
        begin = 0
        for length in self.lengths:
            yield self.columns.take(slice(begin, begin + length))
            begin += length

    def set_entries(self, backend: Backend, entries: list[Columns]) -> None:
        """Replace the own entries, and let every rank know their positions. Collective.

        Args:
            backend: Knows the masks already.
            entries: Own entries of each layer.
        """
        self.columns = Columns.cat(entries)
        self.lengths = [len(layer) for layer in entries]
        self.memory_indices = [backend.memory_indices(i, layer.indices) for i, layer in enumerate(self.layers())]
        self.supports = gather_supports(backend.owners, self.columns.indices, self.lengths, backend.shapes)

    def write_weights(self, backend: Backend, weight: Tensor) -> None:
        """Put the weights of the support into the model, cast to its type. Collective for replicated weights.

        Where ranks hold whole weights, each writes what all of them own, not only its own part.

        Args:
            backend: Holds the weights; must be inside its ``writing()`` context.
            weight: fp32 [own], base + delta, layers one after another.
        """
        new, memory_indices = weight.to(backend.dtypes[0]), self.memory_indices
        if backend.replicates:
            sizes = [[support.sizes[rank] for support in self.supports] for rank in range(backend.owners.size)]
            parts = backend.owners.gather(new, list(map(sum, sizes)))  # known: no step waits for the device
            pieces = [part.split(of_rank) for part, of_rank in zip(parts, sizes, strict=True)]
            new = torch.cat([piece[i] for i in range(len(memory_indices)) for piece in pieces])
            memory_indices = [
                backend.memory_indices(i, support.positions().to(backend.position_dtype))
                for i, support in enumerate(self.supports)
            ]
        backend.store_all(memory_indices, new)

    @contextmanager
    def exact_zeros(self, backend: Backend) -> Iterator[None]:
        """Make the weights on trial 0, and all other active ones not 0, inside the context. Collective.

        In the step of an evolution positions that have just been reactivated are still 0.
        """
        weight = self.columns.weight()
        least = torch.full_like(weight, least_size(backend.dtypes[0]))
        shown = torch.where(weight.abs() < least, torch.copysign(least, weight), weight)
        for part, entries, trial in zip(shown.split(self.lengths), self.layers(), self.trial, strict=True):
            part[torch.searchsorted(entries.indices, trial)] = 0
        differs = torch.tensor(int(not torch.equal(shown, weight)))
        if not int(backend.owners.max(differs)):
            yield
            return
        with backend.writing():
            self.write_weights(backend, shown)
        try:
            yield
        finally:
            with backend.writing():
                self.write_weights(backend, self.columns.weight())

    def layer_deltas(self, backend: Backend, windows: Sequence[Window | None]) -> Iterator[LayerDelta]:
        """Yield what this rank owns of each target.

        Args:
            backend: Holds the weights.
            windows: Window of each target.
        """
        for i, entries in enumerate(self.layers()):
            committed = self.committed[i]
            yield LayerDelta(
                name=backend.names[i],
                shape=backend.shapes[i],
                interval=backend.interval(i),
                mask=self.masks[i],
                mask_size=self.mask_sizes[i],
                columns=entries,
                committed=committed,
                committed_values=backend.load(i, backend.memory_indices(i, committed)),
                trial=self.trial[i],
                window=windows[i],
            )

    def active(self, backend: Backend) -> list[int]:
        """Count the active positions of each whole weight, those on trial too. Collective."""
        return backend.owners.sum(torch.tensor([bits.popcount(mask) for mask in self.masks])).tolist()

    def on_trial(self, backend: Backend) -> list[int]:
        """Count the positions of each whole weight that are on trial. Collective."""
        return backend.owners.sum(torch.tensor(list(map(len, self.trial)))).tolist()

    def masks_without_trial(self, backend: Backend) -> list[Tensor]:
        """Return each own mask without the positions on trial, uint8, packed."""
        return [
            bits.with_bits(mask, len(interval), where.long() - interval.start, False) if len(where) else mask
            for mask, where, interval in zip(
                self.masks, self.trial, map(backend.interval, range(len(self.masks))), strict=True
            )
        ]

    def verify(self, backend: Backend, config: SeftConfig) -> str:
        """Check every promise about masks and supports on all ranks. Collective.

        Returns:
            A digest of all masks and supports that is the same for every layout.

        Raises:
            RuntimeError: Naming the layer and the ranks that broke a promise or differ.
        """
        broken, support_hashes, mask_hashes = self._gather_checks(backend)
        common = support_hashes.flatten(0, 1).mode(0).values
        _raise_for_ranks(backend.names, support_hashes != common, "another support")
        _raise_for_ranks(backend.names, mask_hashes != mask_hashes.mode(0).values, "another mask")
        # All replicas hold the same from here on: what comes raises on every rank or on none.
        self._check_counts(backend, config)
        what = "an active delta outside the mask, or a non-zero weight there"
        _raise_for_ranks(backend.names, broken != 0, what)
        whole = torch.cat([common, mask_hashes[0].sum(0)])
        return hashlib.sha256(whole.numpy().tobytes()).hexdigest()[:16]

    def _check_counts(self, backend: Backend, config: SeftConfig) -> None:
        """Check the numbers of active positions and of deltas, and the pattern. Collective."""
        active = torch.tensor(self.active(backend))
        wanted = torch.tensor(self.mask_sizes)
        if config.reactivate == "trial":
            wanted += torch.tensor(self.on_trial(backend))
        if config.scope == "global":
            active, wanted = active.sum().view(1), wanted.sum().view(1)
        if config.adapt != "none" and not torch.equal(active, wanted):
            off = int((active != wanted).nonzero()[0])
            where = backend.names[off] if config.scope == "layer" else "the model"
            raise RuntimeError(f"{where}: mask has {active[off]} active positions, needs exactly {wanted[off]}")
        if config.known_pattern:
            NMGroups(backend, config.known_pattern).check(self.masks_without_trial(backend), self.group_prints)
        for name, support, budget in zip(backend.names, self.supports, self.budgets, strict=True):
            if len(support) > budget:
                raise RuntimeError(f"{name}: {len(support)} deltas, needs at most {budget}")

    def _gather_checks(self, backend: Backend) -> Tensor:
        """Gather what every rank has found wrong, and its hashes. Collective.

        Returns:
            int64 [3, replicas, owners, layers], the same on every rank: numbers of own deltas outside the mask and of
            weights that are not 0 there; hashes of whole supports; hashes of the own part of the masks.
        """
        rows = []
        for i, entries in enumerate(self.layers()):
            interval = backend.interval(i)
            outside = (~bits.holds(self.masks[i], entries.indices.long() - interval.start)).sum()
            broken = outside + bits.count_outside(self.masks[i], backend.own(i))
            mask_hash = bits.hash_of_bits(self.masks[i], len(interval), interval.start)
            rows.append(torch.stack([broken, _hash(self.supports[i].positions()), mask_hash]))
        own = torch.stack(rows, 1).cpu()
        return backend.replicas.stack(backend.owners.stack(own)).permute(2, 0, 1, 3)

    def sparsity(self, backend: Backend) -> list[LayerSparsity]:
        """Count what is active, zero and trained in every target. Collective."""
        backend.drop_gathered()  # shards, not gathered copies, are counted
        zeros = [count.zeros for count in count_zeros_over_ranks(backend)]
        active, trial = self.active(backend), self.on_trial(backend)
        return [
            LayerSparsity(
                name,
                backend.partitions[i].numel,
                self.mask_sizes[i],
                active[i],
                zeros[i],
                len(self.supports[i]),
                trial[i],
            )
            for i, name in enumerate(backend.names)
        ]


def _hash(positions: Tensor) -> Tensor:
    """Hash a set of positions, whatever their order, int64 [] (wrapping)."""
    return scores.mix(positions.to(torch.int64)).sum()


def _raise_for_ranks(names: Sequence[str], wrong: Tensor, what: str) -> None:
    """Raise an error if any rank is wrong.

    Args:
        names: Names of the layers.
        wrong: bool [replicas, owners, layers], the same on every rank: so either all ranks raise the error or none.
        what: What the ranks hold that are wrong.
    """
    layers = wrong.any(0).any(0).nonzero().view(-1).tolist()
    if layers:
        ranks = wrong[:, :, layers[0]].flatten().nonzero().view(-1).tolist()
        raise RuntimeError(
            f"{names[layers[0]]}: ranks {ranks} hold {what} ({len(layers)} of {len(names)} layers affected); "
            "the run stops, its last checkpoint is intact"
        )
