"""A model's targets packed at rest, and back: the way in and out of ``backends/packed.py``.

shards = pack_weights(model)                                     # each rank keeps its rows, zeros take a bit
fully_shard(model, ignored_params=shards.parameters)             # the rest of the model; or nothing
seft = SeftOptimizer(model, config)                              # as on any other model
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from seft_dist.backends.group import Group, world_group
from seft_dist.backends.packed import PackedShards, packed_of
from seft_dist.backends.shards import is_sharded, whole_shape
from seft_dist.modules.targets import ALL_LINEAR, ExpertWeight, Target, find_targets
from seft_dist.optim.linear import bind_forward

_BLOCK = re.compile(r"((?:.*?\.)?\d+)(?:\.|$)")


def pack_weights(
    model: nn.Module, targets: str = ALL_LINEAR, *, mesh: Any = None, device: torch.device | None = None
) -> PackedShards:
    """Keep this rank's rows of each target as bits and values, in place of the dense weight. Collective.

    What stays in the modules has shapes but no values: use ``unpack_weights`` before ``save_pretrained``,
    ``state_dict`` or ``deepcopy``. Weights on the meta device are given values later, by ``load_model``.

    Args:
        model: Before ``fully_shard`` and before ``SeftOptimizer``; the same on every rank.
        targets: As in ``SeftConfig.targets``; the optimizer's must be among them.
        mesh: DeviceMesh of the ranks that share the weights, as for ``fully_shard``: one axis, or replicas and shards.
            None: all ranks of the default group, or this process alone.
        device: Where the packed weights are; None: where the weights are.

    Returns:
        The shards; ``fully_shard`` must ignore their ``parameters``.

    Raises:
        ValueError: A target is sharded or packed already, or no target is found.
    """
    found = find_targets(model, targets)
    for name, target in found.items():
        if is_sharded(target.weight) or packed_of(target.weight) is not None:
            raise ValueError(f"{name} is sharded or packed already: call pack_weights on a plain model")
    first = next(iter(found.values())).weight
    shards = PackedShards(*_groups(mesh), device or first.device)
    for members in _units(found):
        outlines = shards.add_unit([(whole_shape(target.weight), target.weight.dtype) for target in members])
        for target, parameter in zip(members, outlines, strict=True):
            dense = target.weight.detach()
            _replace(target, parameter)
            bind_forward(target)
            weight = packed_of(parameter)
            assert weight is not None
            if dense.device.type != "meta":
                weight.put(dense.reshape(-1)[weight.interval.start : weight.interval.stop])
    if first.device.type != "meta":
        shards.settle()
    return shards


@torch.no_grad()
def unpack_weights(model: nn.Module, targets: str = ALL_LINEAR) -> None:
    """Give every packed target its whole dense weight again, on every rank. Collective.

    Args:
        model: From ``pack_weights``; a ``SeftOptimizer`` on it must have been detached.
        targets: As for ``pack_weights``.
    """
    for target in find_targets(model, targets).values():
        weight = packed_of(target.weight)
        if weight is not None:
            _replace(target, nn.Parameter(weight.dense().clone(), requires_grad=False))
            module = target.module if isinstance(target, ExpertWeight) else target
            module.__dict__.pop("forward", None)


def _groups(mesh: Any) -> tuple[Group, Group]:
    """Owners and replicas."""
    if mesh is None:
        return world_group(), Group(None)
    axis = mesh.ndim - 1
    owners = Group(mesh.get_group(axis) if mesh.size(axis) > 1 else None)
    return owners, Group(mesh.get_group(0) if mesh.ndim == 2 and mesh.size(0) > 1 else None)


def _units(found: dict[str, Target]) -> Iterable[list[Target]]:
    """Targets that are gathered together: those of one numbered block, e.g. a decoder layer."""
    units: dict[str, list[Target]] = {}
    for name, target in found.items():
        block = _BLOCK.match(name)
        units.setdefault(block[1] if block else name, []).append(target)
    return units.values()


def _replace(target: Target, parameter: Tensor) -> None:
    if isinstance(target, ExpertWeight):
        setattr(target.module, target.key, parameter)
    else:
        target.weight = parameter
