"""Pruned weights that are stored packed, and dense only while one of them is computed with.

    rank 0                       rank 1                      the layer in use, on both
    bits 1 0 1 1 | 0 1 ..        bits 0 1 1 0 | ..           bits and values of all ranks   (the unit's, gathered)
    values a b c | d ..          values e f   | ..           a 0 b c 0 e f 0                (one weight, decoded)

Each rank keeps whole rows, as FSDP2 cuts them, so that the results are FSDP2's bit for bit. The weights of one unit (a
decoder layer) are gathered in one collective, packed; beside the unit in use, the one that is expected next is on its
way (``PackedShards``). In the module a placeholder on the meta device takes the parameter's place: shape and type, no
values. Code that uses it by mistake gets an error, not zeros.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seft_dist.backends.base import Backend, Holder
from seft_dist.backends.fsdp import whole_value
from seft_dist.backends.group import Group, all_gather_single
from seft_dist.kernels.bits import pack
from seft_dist.kernels.packing import decode, encode
from seft_dist.sparsity.partition import Partition, position_dtype

_ALIGNMENT = 16  # bytes: where a weight's bits or values begin in a gathered buffer


class PackedWeight:
    """One weight: this rank's rows as bits and values, and how to get the whole of it."""

    def __init__(
        self,
        shards: "PackedShards",
        unit: int,
        number: int,
        bits_at: int,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        """Args:
        shards: All packed weights of the model.
        unit: Number of the unit it is gathered with.
        number: Its number among all packed weights of the model.
        bits_at: Byte at which its bits begin in every rank's message of the unit.
        shape: Whole shape; rows are counted along the first dimension.
        dtype: The model's type.
        """
        self.number, self.bits_at = number, bits_at
        self.shape, self.dtype = tuple(shape), dtype
        self.partition = Partition.rows((shape[0], prod(shape[1:])), shards.owners.size)
        self.interval = self.partition.interval(shards.owners.rank)
        self.bits = torch.zeros(-(-len(self.interval) // 8), dtype=torch.uint8, device=shards.device)
        """uint8, packed mask of the own rows: the optimizer's own, once there is one."""
        self.values = torch.empty(0, dtype=dtype, device=shards.device)
        """[set bits], in the model's type."""
        self.shards, self._unit = shards, unit

    @property
    def nbytes(self) -> int:
        """Bytes that this rank keeps of the weight."""
        return self.bits.nbytes + self.values.nbytes

    def put(self, own: Tensor, bits: Tensor | None = None) -> None:
        """Replace the own rows; ``PackedShards.sync_mask_counts`` once after all.

        Args:
            own: [len(interval)], flat.
            bits: Positions to store, packed; None: those that are not 0.
        """
        assert own.numel() == len(self.interval)
        own = own.to(self.bits.device, self.dtype).contiguous()
        self.bits = pack(own != 0) if bits is None else bits
        self.values = encode(own, self.bits)

    def own(self) -> Tensor:
        """Return the own rows, flat, as a new tensor."""
        out = torch.empty(len(self.interval), dtype=self.dtype, device=self.bits.device)
        return decode(self.bits, self.values, out)

    def dense(self) -> Tensor:
        """Return the whole weight, in memory that the next call for any weight uses again. Collective.

        All ranks must ask for the weights of a model in the same order.
        """
        return self.shards.decode(self._unit, self)

    def value_indices(self, positions: Tensor) -> Tensor:
        """Return the index in ``values`` of flat positions in the mask: int32, from 2^31 own positions on int64."""
        kind = position_dtype(len(self.interval))
        if not positions.numel():
            return positions.to(kind)
        offsets = positions.long() - self.interval.start
        table = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.int32, device=self.bits.device)
        counts = table[self.bits.int()]
        byte, bit = offsets >> 3, (offsets & 7).to(torch.int32)
        at = self.bits[byte].to(torch.int32)
        assert bool((at >> bit & 1).all()), "a position outside the mask has no value"
        before = counts.cumsum(0, dtype=kind) - counts
        return before[byte] + table[at & ((1 << bit) - 1)]


class MetaPlaceholder(nn.Parameter):
    """The parameter in a packed weight's place in a module: shape and type, on the meta device, no values."""

    packed: PackedWeight


def meta_placeholder(weight: PackedWeight) -> MetaPlaceholder:
    """Make the parameter that stands in a module in a packed weight's place."""
    placeholder = MetaPlaceholder(torch.empty(weight.shape, dtype=weight.dtype, device="meta"), requires_grad=False)
    placeholder.packed = weight
    return placeholder


def packed_of(parameter: Tensor) -> PackedWeight | None:
    """Return the packed weight behind a placeholder; None for an ordinary parameter."""
    return getattr(parameter, "packed", None) if isinstance(parameter, MetaPlaceholder) else None


@dataclass(frozen=True)
class _Unit:
    """Weights that are gathered together."""

    weights: list[PackedWeight]
    values_at: int
    """Byte of a message at which the values begin, behind the bits of all weights."""


@dataclass(frozen=True)
class _Gather:
    """The all-gather of one unit, on its way or complete."""

    unit: int
    messages: Tensor
    """uint8 [ranks * bytes of a message], messages in rank order."""
    work: dist.Work
    """Handle to wait for before the messages are read."""


@dataclass(frozen=True)
class _Recent:
    """The two units that were asked for last, the later one second; None: none since the weights changed."""

    before: int | None = None
    last: int | None = None


class PackedShards:
    """All packed weights of a model: who owns which rows, and which unit is gathered.

    A rank's message of a unit, every part aligned to 16 bytes:

        bits of weight 0 | bits of weight 1 | ..   values of weight 0 | values of weight 1 | ..   unused
        at the same bytes on every rank            at bytes that each rank's numbers of values decide

    So the bits' offsets follow from shapes alone, and the values' from ``_counts``, which all ranks know. Messages are
    as long as the longest of them, since an all-gather of different lengths does not exist everywhere.

    Prefetch. While a unit computes, the next one is already on its way. Which one that is, is learnt and not
    configured: after units (4, 5) came 6, after (6, 5) came 4. A pair is needed because forward and backward pass a
    unit in opposite directions, and it covers activation checkpointing, which walks forward inside of backward. At most
    two units are in memory, the one in use and the one on its way. A wrong guess costs one gather; results do not
    depend on it. Every rank takes the same decisions, since all of them ask in the same order: this is why
    ``_followers`` may never be changed by one rank alone.
    """

    def __init__(self, owners: Group, replicas: Group, device: torch.device) -> None:
        """Args:
        owners: The ranks that divide each weight among themselves.
        replicas: The ranks that own the same rows as this one (HSDP).
        device: Where the weights are stored and computed with.
        """
        self.owners, self.replicas, self.device = owners, replicas, device
        self.parameters: set[nn.Parameter] = set()
        """The placeholders, for ``fully_shard(..., ignored_params=shards.parameters)``."""
        self.bytes_gathered = 0
        """Bytes this rank has sent to gather weights, as a ring would."""
        self._units: list[_Unit] = []
        self._counts: list[list[int]] = []
        """Number of values of each rank and each weight, by ``PackedWeight.number``."""
        self._scratch: dict[torch.dtype, Tensor] = {}
        """Memory for one dense weight of each type."""
        self._followers: dict[_Recent, int] = {}
        """The unit that was asked for after two others, the last time."""
        self._forget_gathered()

    def _forget_gathered(self) -> None:
        self._gathered: _Gather | None = None
        self._coming: _Gather | None = None
        self._recent = _Recent()

    @property
    def _weights(self) -> list[PackedWeight]:
        return [weight for unit in self._units for weight in unit.weights]

    @property
    def nbytes(self) -> int:
        """Bytes that this rank keeps of all packed weights."""
        return sum(weight.nbytes for weight in self._weights)

    @property
    def numel(self) -> int:
        """Weights of the whole model that are packed, zeros included."""
        return sum(prod(weight.shape) for weight in self._weights)

    def add_unit(self, kinds: Sequence[tuple[Sequence[int], torch.dtype]]) -> list[MetaPlaceholder]:
        """Add weights that are gathered together; they have no values yet.

        Args:
            kinds: Whole shape and type of each.

        Returns:
            The parameters that stand in their place in the modules.
        """
        weights: list[PackedWeight] = []
        offset, number = 0, len(self._weights)
        for shape, dtype in kinds:
            weight = PackedWeight(self, len(self._units), number + len(weights), offset, shape, dtype)
            weights.append(weight)
            offset = _aligned(offset + -(-weight.partition.chunk // 8))
        self._units.append(_Unit(weights, offset))
        placeholders = [meta_placeholder(weight) for weight in weights]
        self.parameters.update(placeholders)
        return placeholders

    def sync_mask_counts(self) -> None:
        """Let all ranks know how many values each has of each weight; forget what is gathered. Collective."""
        self.invalidate()
        counts = [weight.values.numel() for weight in self._weights]
        self._counts = self.owners.stack(torch.tensor(counts, dtype=torch.int64)).tolist()

    def invalidate(self) -> None:
        """Forget what is gathered, because values have changed. All ranks together, but nothing is sent."""
        if self._coming is not None:
            self._coming.work.wait()
        self._forget_gathered()

    def decode(self, unit: int, weight: PackedWeight) -> Tensor:
        """Return the whole of a unit's weight, in memory that the next call uses again. Collective."""
        numel = prod(weight.shape)
        scratch = self._scratch.get(weight.dtype)
        if scratch is None:
            largest = max(prod(other.shape) for other in self._weights if other.dtype == weight.dtype)
            scratch = self._scratch[weight.dtype] = torch.empty(largest, dtype=weight.dtype, device=self.device)
        out = scratch[:numel]
        if self.owners.size == 1:
            return decode(weight.bits, weight.values, out).view(weight.shape)
        messages = self._fetch(unit).view(self.owners.size, -1)
        for rank, message in enumerate(messages):
            interval = weight.partition.interval(rank)
            if len(interval):
                decode(*self._slices(unit, weight, rank, message), out[interval.start : interval.stop])
        return out.view(weight.shape)

    def _slices(self, unit: int, weight: PackedWeight, rank: int, message: Tensor) -> tuple[Tensor, Tensor]:
        """View one weight's bits and values in a rank's message of a unit."""
        bits_end = weight.bits_at + -(-len(weight.partition.interval(rank)) // 8)
        counts, at = self._counts[rank], self._units[unit].values_at
        for other in self._units[unit].weights:
            if other is weight:
                break
            at += _aligned(counts[other.number] * other.dtype.itemsize)
        values_end = at + counts[weight.number] * weight.dtype.itemsize
        return message[weight.bits_at : bits_end], message[at:values_end].view(weight.dtype)

    def unit_bytes(self, unit: int) -> int:
        """Bytes that each rank sends of a unit: those of the rank with most values, after ``sync_mask_counts``."""
        weights, values_at = self._units[unit].weights, self._units[unit].values_at
        return values_at + max(
            sum(_aligned(counts[weight.number] * weight.dtype.itemsize) for weight in weights)
            for counts in self._counts
        )

    def _fetch(self, unit: int) -> Tensor:
        """Return every rank's message of a unit, and start to gather the unit that is expected next. Collective."""
        if unit == self._recent.last:
            assert self._gathered is not None
            return self._gathered.messages
        self._followers[self._recent] = unit
        self._recent = _Recent(self._recent.last, unit)
        self._gathered = None  # its memory can be used again
        coming, self._coming = self._coming, None
        if coming is not None:
            coming.work.wait()  # also of a wrong guess: its memory must not be freed under the collective
        if coming is None or coming.unit != unit:
            coming = self._start(unit)
            coming.work.wait()
        self._gathered = coming
        following = self._followers.get(self._recent)
        if following is not None and following != unit:
            self._coming = self._start(following)
        return coming.messages

    def _start(self, unit: int) -> _Gather:
        """Start to gather a unit. Collective, without waiting."""
        assert self._counts, "sync_mask_counts() comes first"
        size = self.unit_bytes(unit)
        own = torch.zeros(size, dtype=torch.uint8, device=self.device)
        for weight in self._units[unit].weights:
            bits, values = self._slices(unit, weight, self.owners.rank, own)
            bits.copy_(weight.bits)
            values.copy_(weight.values)
        messages = torch.empty(self.owners.size * size, dtype=torch.uint8, device=self.device)
        work = all_gather_single(messages, own, group=self.owners.group, async_op=True)
        assert work is not None
        self.bytes_gathered += size * (self.owners.size - 1)
        return _Gather(unit, messages, work)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class PackedBackend(Backend):
    """Weights held by ``PackedShards``; whole rows for each rank."""

    name = "packed"

    def __init__(self, targets: Mapping[str, Holder]) -> None:
        """Args:
        targets: Holders of the weights by name.

        Raises:
            ValueError: A target is not packed although others are.
        """
        dense = [name for name, holder in targets.items() if packed_of(holder.weight) is None]
        if dense:
            raise ValueError(
                f"{dense[0]} is not packed although other targets are: pack with the targets that are trained "
                "(pack_weights(model, targets=...))"
            )
        self._parameters = {id(holder.weight): i for i, holder in enumerate(targets.values())}
        self._weights = [self._packed(holder) for holder in targets.values()]
        self._shards = self._weights[0].shards
        super().__init__(targets, self._shards.owners, self._shards.replicas)

    @staticmethod
    def _packed(holder: Holder) -> PackedWeight:
        weight = packed_of(holder.weight)
        assert weight is not None
        return weight

    def _kind(self, i: int) -> tuple[torch.dtype, torch.device]:
        return self._weights[i].dtype, self._shards.device

    def _shape(self, i: int) -> tuple[int, int]:
        return self._matrix(self._weights[i].shape)

    def _partition(self, i: int) -> Partition:
        return self._weights[i].partition

    def own(self, i: int) -> Tensor:
        return self._weights[i].own()

    def memory_indices(self, i: int, positions: Tensor) -> Tensor:
        return self._weights[i].value_indices(positions)

    def memory(self, i: int) -> tuple[Tensor, int]:
        return self._weights[i].values, 0

    def remask(self, i: int, mask: Tensor, pruned: Tensor) -> None:
        weight = self._weights[i]
        if torch.equal(mask, weight.bits):
            weight.bits = mask  # one memory for both
        else:
            weight.put(weight.own(), mask)

    def put_own(self, i: int, values: Tensor, mask: Tensor) -> None:
        self._weights[i].put(values, mask)

    def sync_mask_counts(self) -> None:
        self._shards.sync_mask_counts()

    def drop_gathered(self) -> None:
        pass  # what is gathered is a copy that publish_write forgets

    def publish_write(self) -> None:
        self._shards.invalidate()

    def read(self, i: int, positions: Tensor) -> Tensor:
        return self._weights[i].dense().view(-1)[positions.to(self._shards.device)]

    def full(self, parameter: Tensor) -> Tensor:
        i = self._parameters.get(id(parameter))
        return whole_value(parameter) if i is None else self._weights[i].dense().clone()
