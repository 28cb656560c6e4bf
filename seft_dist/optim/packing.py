"""Packing a model's targets at rest, and unpacking them again (``backends/packed.py`` holds them in between).

shards = pack_weights(model)                                     # each rank keeps its rows, zeros take a bit
fully_shard(model, ignored_params=shards.parameters)             # the rest of the model; or nothing
seft = SeftOptimizer(model, config)                              # as on any other model
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from seft_dist.backends.group import Group, shard_groups, world_group
from seft_dist.backends.packed import PackedShards, packed_of
from seft_dist.backends.shards import is_sharded, whole_shape
from seft_dist.modules.kinds import Target
from seft_dist.modules.targets import ALL_LINEAR, find_targets
from seft_dist.optim.linear import SAMPLED_FORWARDS

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
    chosen = find_targets(model, targets)
    for name, target in chosen.items():
        if is_sharded(target.weight) or packed_of(target.weight) is not None:
            raise ValueError(f"{name} is sharded or packed already: call pack_weights on a plain model")
    first = next(iter(chosen.values())).weight
    shards = PackedShards(*_groups(mesh), device or first.device)
    for members in _units(chosen):
        placeholders = shards.add_unit([(whole_shape(target.weight), target.weight.dtype) for target in members])
        for target, placeholder in zip(members, placeholders, strict=True):
            dense = target.weight.detach()
            target.weight = placeholder
            target.bind_forward(SAMPLED_FORWARDS)
            weight = placeholder.packed
            if dense.device.type != "meta":
                weight.put(dense.reshape(-1)[weight.interval.start : weight.interval.stop])
    if first.device.type != "meta":
        shards.sync_mask_counts()
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
            target.weight = nn.Parameter(weight.dense().clone(), requires_grad=False)
            target.unbind_forward()


def _groups(mesh: Any) -> tuple[Group, Group]:
    """Return owners and replicas."""
    if mesh is None:
        return world_group(), Group(None)
    return shard_groups(mesh)


def _units(targets: dict[str, Target]) -> Iterable[list[Target]]:
    """Return the targets that are gathered together: those of one numbered block, e.g. a decoder layer."""
    units: dict[str, list[Target]] = {}
    for name, target in targets.items():
        block = _BLOCK.match(name)
        units.setdefault(block[1] if block else name, []).append(target)
    return units.values()
