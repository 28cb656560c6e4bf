"""Weights that every rank holds whole: one process, DDP, ZeRO stages 0 to 2.

Ownership of deltas is an even flat split all the same, so optimizer state shrinks with the number of ranks.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from seft_dist.backends.base import DenseBackend, Holder
from seft_dist.backends.group import Group
from seft_dist.kernels.fingerprint import hash_of_weight
from seft_dist.sparsity.partition import Partition


class ReplicatedBackend(DenseBackend):
    """Plain tensors; every rank applies the writes of all ranks."""

    def __init__(self, targets: Mapping[str, Holder], owners: Group) -> None:
        """Args:
        targets: Holders of the weights by name.
        owners: All data-parallel ranks.
        """
        self.name = "single" if owners.size == 1 else "ddp"
        super().__init__(targets, owners, replicas=Group(None))

    @property
    def replicates(self) -> bool:
        return self.owners.size > 1

    def _shape(self, i: int) -> tuple[int, int]:
        return self._matrix(self.holders[i].weight.shape)

    def _partition(self, i: int) -> Partition:
        return Partition.even(self.holders[i].weight.numel(), self.owners.size)

    def local(self, i: int) -> Tensor:
        return self.holders[i].weight.detach().view(-1)

    def drop_gathered(self) -> None:
        pass  # forward reads the very tensor that is written

    def publish_write(self) -> None:
        pass

    def read(self, i: int, positions: Tensor) -> Tensor:
        return self.local(i)[positions]

    def full(self, parameter: Tensor) -> Tensor:
        return parameter.detach()

    def check_replicas(self, i: int) -> None:
        """Refuse a weight that is not the same on every rank. Collective.

        Raises:
            ValueError: Naming the weight and the ranks that differ from rank 0.
        """
        if self.owners.size == 1:
            return
        rows = self.owners.stack(hash_of_weight(self.local(i), 0).view(1))
        other = [rank for rank in range(self.owners.size) if not torch.equal(rows[rank], rows[0])]
        if other:
            raise ValueError(
                f"{self.names[i]}.weight on ranks {other} differs from rank 0: replicated training needs the same "
                "model on every rank; load the same checkpoint, or pass group= with the ranks that share this model"
            )
