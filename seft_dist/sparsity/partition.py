"""The division of a weight among ranks, described by two integers.

Every supported way of sharding cuts a flattened weight of N positions into equal chunks, one for each rank in rank
order; the last ranks may get a short chunk or none. The order of ranks is therefore the order of positions.

    N = 10, 4 ranks, chunk 3:   rank 0 [0, 3)   rank 1 [3, 6)   rank 2 [6, 9)   rank 3 [9, 10)
"""

from dataclasses import dataclass

import torch

_END_OF_INT32 = 1 << 31


def position_dtype(numel: int) -> torch.dtype:
    """Return the dtype for positions in something with ``numel`` entries: int32, from 2^31 entries on int64."""
    return torch.int32 if numel < _END_OF_INT32 else torch.int64


@dataclass(frozen=True)
class Interval:
    """Positions start <= i < stop of a flattened weight."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        assert 0 <= self.start <= self.stop, self

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Partition:
    """A flattened weight of ``numel`` positions in chunks of ``chunk``, one for each of ``world_size`` ranks."""

    numel: int
    chunk: int
    world_size: int

    def __post_init__(self) -> None:
        assert self.chunk * self.world_size >= self.numel, self

    @classmethod
    def even(cls, numel: int, world_size: int) -> "Partition":
        """Divide into equal flat chunks of ceil(numel / world_size) positions (ZeRO-3, replicated weights)."""
        return cls(numel, -(-numel // world_size), world_size)

    @classmethod
    def rows(cls, shape: tuple[int, int], world_size: int) -> "Partition":
        """Divide into whole rows, ceil(rows / world_size) for each rank (FSDP2's Shard(0))."""
        rows, columns = shape
        return cls(rows * columns, -(-rows // world_size) * columns, world_size)

    def interval(self, rank: int) -> Interval:
        """Return the positions that a rank owns; empty behind the end."""
        return Interval(min(rank * self.chunk, self.numel), min((rank + 1) * self.chunk, self.numel))

    def sizes(self) -> list[int]:
        """Return the number of positions of each rank, in rank order."""
        return [len(self.interval(rank)) for rank in range(self.world_size)]
