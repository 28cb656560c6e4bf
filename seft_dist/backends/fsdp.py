"""Weights sharded by FSDP2 (``fully_shard``): whole rows for each rank, also under HSDP and CPU offload.

A fused weight of experts is cut between experts, so that a rank may own none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from seft_dist.backends.attachment import attachment_of
from seft_dist.backends.base import DenseBackend, Holder
from seft_dist.backends.gather import GatherSize, PackedAllGather
from seft_dist.backends.group import Group, shard_groups
from seft_dist.kernels.bits import popcount, unpack
from seft_dist.sparsity.partition import Partition


def reshard(model: nn.Module) -> None:
    """Free every gathered copy, so that parameters are shards (DTensors) again.

    An evaluation forward leaves the root group gathered; a write to the shard behind it would not be seen.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_fsdp(model: nn.Module) -> bool:
    """Return whether ``fully_shard`` was applied anywhere in the model."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def whole_value(parameter: Tensor) -> Tensor:
    """Return the whole value of a parameter, sharded or not. Collective if sharded."""
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


def pack_gathers(model: nn.Module) -> list[GatherSize]:
    """Let FSDP2 send pruned weights packed, unit by unit where that pays. Collective.

    Call it before ``SeftOptimizer`` attaches, and again if weights were changed other than by the optimizer. The
    resident shards stay dense; training is the same bit for bit. A unit whose parameters are of several types is sent
    as it is.

    Args:
        model: The root on which ``fully_shard`` was called.

    Returns:
        Bytes that each unit sends.

    Raises:
        ValueError: The model is not sharded by FSDP2.
    """
    if not is_fsdp(model):
        raise ValueError("pack_gathers needs a model sharded by FSDP2: call fully_shard(model) first")
    reshard(model)
    members = _members(model)
    gathers = []
    for name in members:
        unit = model.get_submodule(name)
        assert isinstance(unit, FSDPModule)
        gather = PackedAllGather(name)
        unit.set_custom_all_gather(gather)  # type: ignore[arg-type]  # has the two methods, needs no base class
        attachment_of(unit).gather = gather  # FsdpBackend looks there
        gathers.append(gather)
    owners, _ = shard_groups(next(iter(members.values()))[0].device_mesh)
    _agree_on_capacity(owners, gathers, [_most_values(of_unit, some_train=False) for of_unit in members.values()])
    sizes = []
    for gather, parameters in zip(gathers, members.values(), strict=True):
        if len({parameter.dtype for parameter in parameters}) > 1:
            gather.capacity = None
        sizes.append(gather.size(sum(map(_padded, parameters)), parameters[0].element_size()))
    return sizes


def _members(model: nn.Module) -> dict[str, list[DTensor]]:
    """Return the parameters that each unit gathers, by the unit's name."""
    modules = dict(model.named_modules())
    units = {module: name for name, module in modules.items() if isinstance(module, FSDPModule)}
    members: dict[str, list[DTensor]] = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            members.setdefault(units[_unit_of(modules, name.rpartition(".")[0])], []).append(parameter)
    return members


def _padded(parameter: DTensor) -> int:
    """Return the number of values in a rank's shard as FSDP2 sends it, padding included."""
    mesh = parameter.device_mesh
    return Partition.rows((parameter.shape[0], prod(parameter.shape[1:])), mesh.size(mesh.ndim - 1)).chunk


def _most_values(parameters: list[DTensor], some_train: bool) -> int:
    """Count the values of this rank's shards that may differ from 0 in a run.

    Of frozen parameters these are the non-zero ones, of those that may be trained all.

    Args:
        parameters: Parameters of a unit.
        some_train: False if only norms and biases may be trained (``train_norms``), True if parameters that need
            gradients are too.
    """
    may_change = [each.dim() == 1 or (some_train and each.requires_grad) for each in parameters]
    shards = [each.to_local().detach() for each in parameters]
    return sum(s.numel() if changes else _stored(s) for s, changes in zip(shards, may_change, strict=True))


def _stored(shard: Tensor) -> int:
    """Count the values with any bit set; -0.0 is one of them."""
    return int(torch.count_nonzero(shard.view(torch.int16 if shard.element_size() == 2 else torch.int32)))


def _agree_on_capacity(owners: Group, gathers: list[PackedAllGather], counts: list[int]) -> None:
    """Give each all-gather the size of the rank with most values: all must send equally much. Collective."""
    for gather, most in zip(gathers, owners.max(torch.tensor(counts)).tolist(), strict=True):
        gather.capacity = most


@dataclass(frozen=True)
class _PackedUnit:
    """A unit whose parameters are sent packed, and how many values this rank has of them."""

    gather: PackedAllGather
    other_values: int
    """Values of parameters that are no targets."""
    values_of: dict[int, int]
    """Number of a target to the values of its weight."""


class FsdpBackend(DenseBackend):
    """DTensors sharded by rows; a rank may own no row of a weight."""

    name = "fsdp"

    def __init__(self, model: nn.Module, targets: Mapping[str, Holder]) -> None:
        """Args:
        model: The root on which ``fully_shard`` was called.
        targets: Holders of the weights by name.

        Raises:
            ValueError: A target is not sharded, or not by rows over one mesh.
        """
        self._model = model
        reshard(model)
        meshes = {_mesh_of(name, holder.weight) for name, holder in targets.items()}
        if len(meshes) > 1:
            raise ValueError(f"targets are sharded over {len(meshes)} different device meshes: needs one mesh for all")
        mesh = meshes.pop()
        owners, replicas = shard_groups(mesh)
        # Names may have changed since the targets were found: checkpoint wrappers and torch.compile add parts to them.
        modules = dict(model.named_modules())
        names = {id(module): name for name, module in modules.items()}
        self._unit = {name: _unit_of(modules, names[id(target.module)]) for name, target in targets.items()}
        super().__init__(targets, owners, replicas)
        self._packed_units = self._find_packed_units()

    def _find_packed_units(self) -> list[_PackedUnit]:
        """Return the units that are sent packed."""
        units = []
        for name, parameters in _members(self._model).items():
            unit = self._model.get_submodule(name)
            gather = attachment_of(unit).gather
            if gather is not None and gather.capacity is not None:
                unit_of: dict[str, object] = dict(self._unit)
                targets = [i for i, target in enumerate(self.names) if unit_of[target] is unit]
                inside = {i: _stored(self.own(i)) for i in targets}
                units.append(
                    _PackedUnit(gather, _most_values(parameters, some_train=True) - sum(inside.values()), inside)
                )
        return units

    def remask(self, i: int, mask: Tensor, pruned: Tensor) -> None:
        super().remask(i, mask, pruned)
        self._count(i, mask)

    def put_own(self, i: int, values: Tensor, mask: Tensor) -> None:
        super().put_own(i, values, mask)
        self._count(i, mask)

    def _count(self, i: int, mask: Tensor) -> None:
        for unit in self._packed_units:
            if i in unit.values_of:
                # An active position may be 0 now and not after the next update; -0.0 may lie outside the mask.
                outside = self.own(i).masked_fill(unpack(mask, len(self.interval(i))), 0)
                unit.values_of[i] = popcount(mask) + _stored(outside)

    def sync_mask_counts(self) -> None:
        """See ``Backend``. Collective."""
        if self._packed_units:
            counts = [unit.other_values + sum(unit.values_of.values()) for unit in self._packed_units]
            _agree_on_capacity(self.owners, [unit.gather for unit in self._packed_units], counts)

    def _weight(self, i: int) -> DTensor:
        weight = self.holders[i].weight
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

    def drop_gathered(self) -> None:
        reshard(self._model)

    def publish_write(self) -> None:
        pass  # the next forward gathers from the shard that was written

    def read(self, i: int, positions: Tensor) -> Tensor:
        unit = self._unit[self.names[i]]
        unit.unshard()
        values = self.holders[i].weight.detach().view(-1)[positions.to(self.holders[i].weight.device)].clone()
        unit.reshard()
        return values

    def full(self, parameter: Tensor) -> Tensor:
        return whole_value(parameter)


def _mesh_of(name: str, weight: Tensor) -> DeviceMesh:
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


def _unit_of(modules: Mapping[str, nn.Module], name: str) -> FSDPModule:
    """Return the innermost module with ``fully_shard`` that a module is in.

    Args:
        modules: All modules of the model by name.
        name: Name of the module.
    """
    parts = name.split(".")
    for depth in range(len(parts), -1, -1):
        module = modules.get(".".join(parts[:depth]))
        if isinstance(module, FSDPModule):
            return module
    raise ValueError(
        f"{name} is not inside a module on which fully_shard was called: call fully_shard(model) on the root"
    )
