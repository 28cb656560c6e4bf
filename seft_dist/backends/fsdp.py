"""Weights sharded by FSDP2 (``fully_shard``): whole rows for each rank, also under HSDP and CPU offload.

A fused weight of experts is cut between experts, so that a rank may own none.
"""

from collections.abc import Mapping
from math import prod

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from seft_dist.backends.base import DenseBackend, Holder
from seft_dist.backends.group import Group
from seft_dist.sparsity.partition import Partition


def reshard(model: nn.Module) -> None:
    """Free every gathered copy, so that parameters are shards (DTensors) again. Local.

    An evaluation forward leaves the root group gathered; a write to the shard behind it would not be seen.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_fsdp(model: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied anywhere in the model. Local."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


class FsdpBackend(DenseBackend):
    """DTensors sharded by rows; a rank may own no row of a weight."""

    name = "fsdp"

    def __init__(self, model: nn.Module, targets: Mapping[str, Holder]) -> None:
        """Args:
        model: The root on which ``fully_shard`` was called.
        targets: Name to what has the weight.

        Raises:
            ValueError: A target is not sharded, or not by rows over one mesh.
        """
        self._model = model
        reshard(model)
        meshes = {_mesh_of(name, module.weight) for name, module in targets.items()}
        if len(meshes) > 1:
            raise ValueError(f"targets are sharded over {len(meshes)} different device meshes: needs one mesh for all")
        mesh = meshes.pop()
        axis = mesh.ndim - 1
        owners = Group(mesh.get_group(axis) if mesh.size(axis) > 1 else None)
        replicas = Group(mesh.get_group(0) if mesh.ndim == 2 and mesh.size(0) > 1 else None)
        self._unit = {name: _unit_of(model, name) for name in targets}
        super().__init__(targets, owners, replicas)

    def _weight(self, i: int) -> DTensor:
        weight = self.modules[i].weight
        assert isinstance(weight, DTensor), f"{self.names[i]} is gathered"
        return weight

    def _shape(self, i: int) -> tuple[int, int]:
        return self._matrix(self._weight(i).shape)

    def _partition(self, i: int) -> Partition:
        shape = self._weight(i).shape
        partition = Partition.rows((shape[0], prod(shape[1:])), self.owners.size)
        assert self.local(i).numel() == partition.sizes()[self.owners.rank], self.names[i]
        return partition

    def local(self, i: int) -> Tensor:
        return self._weight(i).to_local().detach().view(-1)

    def prepare_write(self) -> None:
        reshard(self._model)

    def publish_write(self) -> None:
        pass  # the next forward gathers from the shard that was written

    def read(self, i: int, positions: Tensor) -> Tensor:
        unit = self._unit[self.names[i]]
        unit.unshard()
        values = self.modules[i].weight.detach().view(-1)[positions.to(self.modules[i].weight.device)].clone()
        unit.reshard()
        return values

    def full(self, parameter: Tensor) -> Tensor:
        return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


def _mesh_of(name: str, weight: Tensor):  # type: ignore[no-untyped-def]  # DeviceMesh
    if not isinstance(weight, DTensor):
        raise ValueError(
            f"{name}.weight is not sharded although parts of the model are: call fully_shard(model) on the root"
        )
    *outer, last = weight.placements
    if last != Shard(0) or any(placement != Replicate() for placement in outer) or len(outer) > 1:
        raise ValueError(
            f"{name}.weight has placements {weight.placements}: needs Shard(0), or (Replicate(), Shard(0)) for HSDP; "
            "tensor parallelism and other shard dimensions are not supported"
        )
    return weight.device_mesh


def _unit_of(model: nn.Module, name: str) -> FSDPModule:
    modules, parts = dict(model.named_modules()), name.split(".")
    for depth in range(len(parts), -1, -1):
        module = modules.get(".".join(parts[:depth]))  # none for the last part of a fused parameter's name
        if isinstance(module, FSDPModule):
            return module
    raise ValueError(
        f"{name} is not inside a module on which fully_shard was called: call fully_shard(model) on the root"
    )
