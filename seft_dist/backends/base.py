"""The interface between the method and whatever holds the weights.

    world_size 2, weight [4, 3]         FSDP2 / ZeRO-3                 replicated (DDP, ZeRO-0/1/2)
    position  0 .. 5 | 6 .. 11          rank 0 stores and owns 0..5    both store 0..11, rank 0 owns 0..5

Every weight is seen as a matrix [rows, columns]: a linear's [out, in], a Conv1D's [in, out], and the fused weight of E
experts as [E * out, in], one expert below the other.

A backend knows nothing of deltas. It knows which interval of a weight this rank owns and which it stores, reads and
writes values there, makes writes visible to the next forward pass, and brings a dense gradient to the owners. It is
given every new mask, because a backend may store active positions only.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from seft_dist.backends.group import Group
from seft_dist.kernels.scatter import scatter_
from seft_dist.sparsity.partition import Interval, Partition, position_dtype


class Holder(Protocol):
    """The part of a target that backends use; ``seft_dist.modules.kinds.Target`` is one."""

    module: Any
    """Module that has the parameter."""

    @property
    def weight(self) -> Tensor:
        """The parameter as it is held now; while it is sharded, maybe only a part of it."""

    @property
    def num_experts(self) -> int:
        """Number of experts whose weights are in the parameter; 1 for an ordinary weight."""

    @property
    def is_stored_transposed(self) -> bool:
        """True where the parameter is stored as [in, out]."""

    def weight_name(self, name: str) -> str:
        """Return the name of the parameter in the model, given the target's name."""


class Backend(ABC):
    """The weights of the target linears as this rank sees them; targets are numbered in their order."""

    name: str

    def __init__(self, targets: Mapping[str, Holder], owners: Group, replicas: Group) -> None:
        """Args:
        targets: Holders of the weights by name.
        owners: The ranks that divide each weight among themselves.
        replicas: The ranks that own the same intervals as this one (HSDP); one rank otherwise.
        """
        self.names = list(targets)
        self.holders = list(targets.values())
        self.owners = owners
        self.replicas = replicas
        # Read once: while a layer is computed, its weight is gathered and no longer shows how it is sharded.
        self.shapes = [self._shape(i) for i in range(len(self.names))]
        """Whole shape [rows, columns] of each weight."""
        self.experts = [holder.num_experts for holder in self.holders]
        """Number of experts in each weight, all with the same number of rows; 1 for an ordinary weight."""
        self.transposed = [holder.is_stored_transposed for holder in self.holders]
        """True for each weight that is stored as [in, out]."""
        self.position_dtype = position_dtype(max(map(prod, self.shapes)))
        """Type of flat positions, one for all targets, so that they can be kept and sent in one vector."""
        self.partitions = [self._partition(i) for i in range(len(self.names))]
        kinds = [self._kind(i) for i in range(len(self.names))]
        self.device = kinds[0][1]
        """Device of the shards."""
        self.dtypes = [dtype for dtype, _ in kinds]
        """Dtype of each weight."""

    @property
    def world_size(self) -> int:
        """Number of data-parallel ranks, over which gradients are averaged."""
        return self.owners.size * self.replicas.size

    @property
    def bytes_sent(self) -> int:
        """Bytes this rank has sent through the backend's groups so far."""
        return self.owners.bytes_sent + self.replicas.bytes_sent

    @property
    def replicates(self) -> bool:
        """True if a rank stores more than it owns, so that every rank must apply the writes of all ranks."""
        return False

    def _matrix(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return a weight's shape as rows and columns."""
        return prod(shape[:-1]), shape[-1]

    @abstractmethod
    def _shape(self, i: int) -> tuple[int, int]:
        """Return the whole shape [rows, columns] of weight i."""

    @abstractmethod
    def _partition(self, i: int) -> Partition:
        """Return how weight i is divided among its owners."""

    def _kind(self, i: int) -> tuple[torch.dtype, torch.device]:
        """Return dtype and device of weight i's shard."""
        return self.own(i).dtype, self.own(i).device

    @abstractmethod
    def own(self, i: int) -> Tensor:
        """Return the owned interval of weight i, flat, in the model's dtype.

        It is only to be read, since it may be a copy.
        """

    @abstractmethod
    def memory_indices(self, i: int, positions: Tensor) -> Tensor:
        """Translate positions into the indices that ``load``, ``store`` and ``store_all`` take.

        They index ``memory(i)``, and hold until the weight's mask changes.

        Args:
            i: Number of the target.
            positions: int32 or int64, flat positions inside ``stored(i)`` and in the mask.

        Returns:
            Indices, of the positions' shape; may be the positions themselves.
        """

    @abstractmethod
    def memory(self, i: int) -> tuple[Tensor, int]:
        """Return the memory of weight i, and the index that its first value has in ``memory_indices``.

        The memory is flat, in the model's dtype.
        """

    def load(self, i: int, memory_indices: Tensor) -> Tensor:
        """Return the weights at ``memory_indices``, in the model's dtype."""
        memory, start = self.memory(i)
        return memory[memory_indices.long() - start]

    def store(self, i: int, memory_indices: Tensor, values: Tensor) -> None:
        """Put values, in the model's dtype, at ``memory_indices``; inside ``writing()``."""
        memory, start = self.memory(i)
        memory[memory_indices.long() - start] = values

    def store_all(self, memory_indices: Sequence[Tensor], values: Tensor) -> None:
        """Put values into every weight, as ``store``.

        Args:
            memory_indices: Those of each weight.
            values: Values in the model's dtype, one weight's after another.
        """
        memories, starts = zip(*map(self.memory, range(len(memory_indices))), strict=True)
        scatter_(memories, starts, memory_indices, values)

    @abstractmethod
    def remask(self, i: int, mask: Tensor, pruned: Tensor) -> None:
        """Set a new mask of weight i, and 0 where positions left it; inside ``writing()``.

        Call ``sync_mask_counts`` once after all weights.

        Args:
            i: Number of the target.
            mask: uint8, packed mask of the own interval; not to be changed afterwards.
            pruned: int64, offsets in the own interval that left the mask.
        """

    @abstractmethod
    def put_own(self, i: int, values: Tensor, mask: Tensor) -> None:
        """Replace the whole own interval of weight i; inside ``writing()``. Collective if replicated.

        Call ``sync_mask_counts`` once after all weights.

        Args:
            i: Number of the target.
            values: [len(interval(i))], in the model's dtype, 0 outside the mask.
            mask: uint8, packed; not to be changed afterwards.
        """

    @abstractmethod
    def sync_mask_counts(self) -> None:
        """Agree on the sizes that depend on the masks, after ``remask`` or ``put_own``.

        Collective where there are any such sizes.
        """

    @abstractmethod
    def drop_gathered(self) -> None:
        """Drop gathered copies, which would hide a write to the shards."""

    @abstractmethod
    def publish_write(self) -> None:
        """Make writes to the shards visible to the next forward."""

    @abstractmethod
    def read(self, i: int, positions: Tensor) -> Tensor:
        """Return weights as the next forward pass will see them. Collective.

        Args:
            i: Number of the target.
            positions: int64, flat positions; each rank may ask for others.

        Returns:
            Values in the model's dtype.
        """

    @abstractmethod
    def full(self, parameter: Tensor) -> Tensor:
        """Return the whole value of any parameter of the model, e.g. to export one after the other. Collective."""

    def interval(self, i: int) -> Interval:
        """Return the interval of weight i that this rank owns."""
        return self.partitions[i].interval(self.owners.rank)

    def stored(self, i: int) -> Interval:
        """Return the interval of weight i whose values this rank holds, and in which it must apply all writes."""
        return Interval(0, prod(self.shapes[i])) if self.replicates else self.interval(i)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Open the only context in which weights may be written."""
        self.drop_gathered()
        with torch.no_grad():
            yield
        self.publish_write()

    def reduce_dense(self, i: int, grad: Tensor) -> Tensor:
        """Average the dense gradient of weight i over all ranks; each keeps its own interval. Collective.

        Args:
            i: Number of the target.
            grad: fp32 [rows, columns], this rank's; may be overwritten.

        Returns:
            fp32 [len(interval(i))].
        """
        own = self.owners.sum_to_owners(grad.reshape(-1), self.partitions[i].sizes())
        own = self.replicas.sum(own)
        return own.div_(self.world_size) if self.world_size > 1 else own


class DenseBackend(Backend):
    """Weights that are stored as they are, zeros included."""

    @abstractmethod
    def local(self, i: int) -> Tensor:
        """Return the stored interval of weight i, flat, in the model's dtype: the memory itself, to be written."""

    def own(self, i: int) -> Tensor:
        interval = self.interval(i)
        offset = self.stored(i).start
        return self.local(i)[interval.start - offset : interval.stop - offset]

    def memory_indices(self, i: int, positions: Tensor) -> Tensor:
        return positions

    def memory(self, i: int) -> tuple[Tensor, int]:
        return self.local(i), self.stored(i).start

    def remask(self, i: int, mask: Tensor, pruned: Tensor) -> None:
        self.own(i)[pruned] = 0

    def put_own(self, i: int, values: Tensor, mask: Tensor) -> None:
        """See ``Backend``. Collective for replicated weights."""
        if self.replicates:
            self.local(i).copy_(torch.cat(self.owners.gather(values)))
        else:
            self.own(i).copy_(values)

    def sync_mask_counts(self) -> None:
        pass  # zeros take as much room as other values
