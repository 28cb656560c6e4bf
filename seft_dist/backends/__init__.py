"""Backends, one for each way in which a model's weights are held, and the choice of the one that fits a model."""

from collections.abc import Mapping

import torch.distributed as dist
from torch import nn

from seft_dist.backends.base import Backend, Holder
from seft_dist.backends.deepspeed import Zero3Backend, is_zero3
from seft_dist.backends.fsdp import FsdpBackend, is_fsdp
from seft_dist.backends.group import Group
from seft_dist.backends.packed import PackedBackend, packed_of
from seft_dist.backends.replicated import ReplicatedBackend

__all__ = ["Backend", "Holder", "find_backend"]


def find_backend(model: nn.Module, targets: Mapping[str, Holder], group: dist.ProcessGroup | None) -> Backend:
    """Choose the backend that fits how the targets' weights are held now.

    Args:
        model: The root module that is trained.
        targets: Holders of the weights by name.
        group: Data-parallel ranks of replicated weights; None: all ranks of the default group if there is one.

    Raises:
        ValueError: The weights are held in a way that no backend can write safely.
    """
    if any(packed_of(holder.weight) is not None for holder in targets.values()):
        return PackedBackend(targets)
    if any(is_zero3(holder.weight) for holder in targets.values()):
        return Zero3Backend(targets)
    if is_fsdp(model):
        return FsdpBackend(model, targets)
    if group is None and dist.is_initialized() and dist.get_world_size() > 1:
        group = dist.group.WORLD
    return ReplicatedBackend(targets, Group(group))
