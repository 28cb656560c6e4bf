"""Pruned weights that are stored packed, and dense only while one of them is computed with.

    rank 0                       rank 1                      the layer in use, on both
    bits 1 0 1 1 | 0 1 ..        bits 0 1 1 0 | ..           bits and values of all ranks   (the unit's, gathered)
    values a b c | d ..          values e f   | ..           a 0 b c 0 e f 0                (one weight, decoded)

Each rank keeps whole rows, as FSDP2 cuts them, so that the results are FSDP2's bit for bit. The weights of one unit (a decoder
layer) are gathered in one collective, packed; only the unit in use stays gathered, and the one that followed it last time
is asked for ahead. The parameter itself stays in the module as an outline on the meta device: shape and type, no values.
Whoever uses it by mistake gets an error, not zeros.
"""

from collections.abc import Mapping, Sequence
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
    """The own rows of one weight, as bits and values, and the way to the whole of it."""

    def __init__(self, shards: "PackedShards", unit: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Args:
        shards: All packed weights of the model.
        unit: Number of the unit it is gathered with.
        shape: Whole shape; rows are counted along the first dimension.
        dtype: The model's type.
        """
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
        """Bytes that this rank keeps of it."""
        return self.bits.nbytes + self.values.nbytes

    def put(self, own: Tensor, bits: Tensor | None = None) -> None:
        """Replace the own rows; ``PackedShards.settle`` once after all.

        Args:
            own: [len(interval)], flat.
            bits: Positions to store, packed; None: those that are not 0.
        """
        assert own.numel() == len(self.interval)
        own = own.to(self.bits.device, self.dtype).contiguous()
        self.bits = pack(own != 0) if bits is None else bits
        self.values = encode(own, self.bits)

    def own(self) -> Tensor:
        """The own rows, flat, a new tensor."""
        out = torch.empty(len(self.interval), dtype=self.dtype, device=self.bits.device)
        return decode(self.bits, self.values, out)

    def dense(self) -> Tensor:
        """The whole weight, in memory that the next call for any weight uses again. Collective.

        All ranks must ask for the weights of a model in the same order.
        """
        return self.shards.decode(self._unit, self)

    def places(self, positions: Tensor) -> Tensor:
        """Index into ``values`` of flat positions in the mask, int32; int64 of 2^31 own positions or more."""
        kind = position_dtype(len(self.interval))
        if not positions.numel():
            return positions.to(kind)
        offsets = positions.long() - self.interval.start
        table = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.int32, device=self.bits.device)
        counts = table[self.bits.int()]
        byte, bit = offsets >> 3, (offsets & 7).to(torch.int32)
        at = self.bits[byte].to(torch.int32)
        assert bool((at >> bit & 1).all()), "a position outside the mask has no place"
        before = counts.cumsum(0, dtype=kind) - counts
        return before[byte] + table[at & ((1 << bit) - 1)]


def packed_of(parameter: Tensor) -> PackedWeight | None:
    """The packed weight behind a parameter's outline; None for an ordinary parameter."""
    return getattr(parameter, "seft_packed", None)


def outline(weight: PackedWeight) -> nn.Parameter:
    """What stands in a module in a packed weight's place: shape and type without values."""
    parameter = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype, device="meta"), requires_grad=False)
    parameter.seft_packed = weight  # type: ignore[attr-defined]
    return parameter


class PackedShards:
    """All packed weights of a model: who owns what, what is gathered now."""

    def __init__(self, owners: Group, replicas: Group, device: torch.device) -> None:
        """Args:
        owners: The ranks that divide each weight among themselves.
        replicas: The ranks that own the same rows as this one (HSDP).
        device: Where the weights are stored and computed with.
        """
        self.owners, self.replicas, self.device = owners, replicas, device
        self.parameters: set[nn.Parameter] = set()
        """The outlines, for ``fully_shard(..., ignored_params=shards.parameters)``."""
        self.bytes_gathered = 0
        """Bytes this rank has sent to gather weights, as a ring would."""
        self._units: list[list[PackedWeight]] = []
        self._counts: list[list[int]] = []
        self._offsets: dict[int, tuple[int, int]] = {}
        self._scratch: dict[torch.dtype, Tensor] = {}
        self._forget_gathered()
        self._followers: dict[tuple[int | None, int | None], int] = {}

    def _forget_gathered(self) -> None:
        self._gathered: tuple[int, Tensor] | None = None
        self._coming: tuple[int, Tensor, dist.Work] | None = None
        self._recent: tuple[int | None, int | None] = (None, None)

    @property
    def nbytes(self) -> int:
        """Bytes that this rank keeps of all packed weights."""
        return sum(weight.nbytes for unit in self._units for weight in unit)

    @property
    def numel(self) -> int:
        """Weights of the whole model that are packed, zeros included."""
        return sum(prod(weight.shape) for unit in self._units for weight in unit)

    def add_unit(self, outlines: Sequence[tuple[Sequence[int], torch.dtype]]) -> list[nn.Parameter]:
        """Add weights that are gathered together; they have no values yet.

        Args:
            outlines: Whole shape and type of each.

        Returns:
            What stands in their place in the modules.
        """
        weights = [PackedWeight(self, len(self._units), shape, dtype) for shape, dtype in outlines]
        offset = 0
        for weight in weights:
            size = -(-weight.partition.chunk // 8)
            self._offsets[id(weight)] = (len(self._offsets), offset)
            offset = _aligned(offset + size)
        self._units.append(weights)
        parameters = [outline(weight) for weight in weights]
        self.parameters.update(parameters)
        return parameters

    def settle(self) -> None:
        """Tell all ranks how many values each has of each weight; forget what is gathered. Collective."""
        self.invalidate()
        counts = [weight.values.numel() for unit in self._units for weight in unit]
        self._counts = self.owners.stack(torch.tensor(counts, dtype=torch.int64)).tolist()

    def invalidate(self) -> None:
        """Forget what is gathered, because values have changed. All ranks together, but nothing is sent."""
        if self._coming is not None:
            self._coming[2].wait()
        self._forget_gathered()

    def decode(self, unit: int, weight: PackedWeight) -> Tensor:
        """The whole of a unit's weight, in memory that the next call uses again. Collective."""
        numel = prod(weight.shape)
        scratch = self._scratch.get(weight.dtype)
        if scratch is None:
            largest = max(prod(w.shape) for unit_ in self._units for w in unit_ if w.dtype == weight.dtype)
            scratch = self._scratch[weight.dtype] = torch.empty(largest, dtype=weight.dtype, device=self.device)
        out = scratch[:numel]
        if self.owners.size == 1:
            return decode(weight.bits, weight.values, out).view(weight.shape)
        rows = self._fetch(unit).view(self.owners.size, -1)
        for rank, row in enumerate(rows):
            interval = weight.partition.interval(rank)
            if len(interval):
                decode(*self._slices(unit, weight, rank, row), out[interval.start : interval.stop])
        return out.view(weight.shape)

    def _slices(self, unit: int, weight: PackedWeight, rank: int, row: Tensor) -> tuple[Tensor, Tensor]:
        """One weight's bits and values in what a rank sent of a unit."""
        number, at_bits = self._offsets[id(weight)]
        bits = row[at_bits : at_bits + -(-len(weight.partition.interval(rank)) // 8)]
        at = self._end_of_bits(unit)
        for other in self._units[unit]:
            if other is weight:
                break
            at += _aligned(self._counts[rank][self._offsets[id(other)][0]] * other.dtype.itemsize)
        return bits, row[at : at + self._counts[rank][number] * weight.dtype.itemsize].view(weight.dtype)

    def _end_of_bits(self, unit: int) -> int:
        last = self._units[unit][-1]
        return _aligned(self._offsets[id(last)][1] + -(-last.partition.chunk // 8))

    def unit_bytes(self, unit: int) -> int:
        """Bytes that each rank sends of a unit: those of the rank with most values, after ``settle``."""
        weights = self._units[unit]
        return self._end_of_bits(unit) + max(
            sum(_aligned(counts[self._offsets[id(weight)][0]] * weight.dtype.itemsize) for weight in weights)
            for counts in self._counts
        )

    def _fetch(self, unit: int) -> Tensor:
        """Every rank's bytes of a unit; asks for the unit that came next the last time. Collective."""
        if unit == self._recent[1]:
            assert self._gathered is not None
            return self._gathered[1]
        self._followers[self._recent] = unit
        self._recent = (self._recent[1], unit)
        self._gathered = None  # its memory can be used again
        coming, self._coming = self._coming, None
        if coming is not None:
            coming[2].wait()
        if coming is None or coming[0] != unit:
            coming = (unit, *self._start(unit))
            coming[2].wait()
        self._gathered = (unit, coming[1])
        following = self._followers.get(self._recent)
        if following is not None and following != unit:
            self._coming = (following, *self._start(following))
        return coming[1]

    def _start(self, unit: int) -> tuple[Tensor, dist.Work]:
        assert self._counts, "settle() comes first"
        size = self.unit_bytes(unit)
        own = torch.zeros(size, dtype=torch.uint8, device=self.device)
        for weight in self._units[unit]:
            bits, values = self._slices(unit, weight, self.owners.rank, own)
            bits.copy_(weight.bits)
            values.copy_(weight.values)
        every = torch.empty(self.owners.size * size, dtype=torch.uint8, device=self.device)
        work = all_gather_single(every, own, group=self.owners.group, async_op=True)
        assert work is not None
        self.bytes_gathered += size * (self.owners.size - 1)
        return every, work


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class PackedBackend(Backend):
    """Weights held by ``PackedShards``; whole rows for each rank."""

    name = "packed"

    def __init__(self, targets: Mapping[str, Holder]) -> None:
        """Args:
        targets: Name to what has the weight.

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

    def places(self, i: int, positions: Tensor) -> Tensor:
        return self._weights[i].places(positions)

    def memory(self, i: int) -> tuple[Tensor, int]:
        return self._weights[i].values, 0

    def remask(self, i: int, mask: Tensor, removed: Tensor) -> None:
        weight = self._weights[i]
        if torch.equal(mask, weight.bits):
            weight.bits = mask  # one memory for both
        else:
            weight.put(weight.own(), mask)

    def put_own(self, i: int, values: Tensor, mask: Tensor) -> None:
        self._weights[i].put(values, mask)

    def settle(self) -> None:
        self._shards.settle()

    def prepare_write(self) -> None:
        pass  # what is gathered is a copy that publish_write forgets

    def publish_write(self) -> None:
        self._shards.invalidate()

    def read(self, i: int, positions: Tensor) -> Tensor:
        return self._weights[i].dense().view(-1)[positions.to(self._shards.device)]

    def full(self, parameter: Tensor) -> Tensor:
        i = self._parameters.get(id(parameter))
        return whole_value(parameter) if i is None else self._weights[i].dense().clone()
