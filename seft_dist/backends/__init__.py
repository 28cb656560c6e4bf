"""Which backend holds a model's weights, found by looking at them."""

import torch.distributed as dist
from torch import nn

from seft_dist.backends.base import Backend
from seft_dist.backends.deepspeed import Zero3Backend, is_zero3
from seft_dist.backends.fsdp import FsdpBackend, is_fsdp
from seft_dist.backends.group import Group
from seft_dist.backends.replicated import ReplicatedBackend

__all__ = ["Backend", "find_backend"]


def find_backend(model: nn.Module, targets: dict[str, nn.Linear], group: dist.ProcessGroup | None) -> Backend:
    """Choose the backend that fits how the targets' weights are held now. Local.

    Args:
        model: The root module that is trained.
        targets: Module name to linear.
        group: Data-parallel ranks of replicated weights; None: all ranks of the default group if there is one.

    Raises:
        ValueError: The weights are held in a way that no backend can write safely.
    """
    if any(is_zero3(module.weight) for module in targets.values()):
        return Zero3Backend(targets)
    if is_fsdp(model):
        return FsdpBackend(model, targets)
    if group is None and dist.is_initialized() and dist.get_world_size() > 1:
        group = dist.group.WORLD
    return ReplicatedBackend(targets, Group(group))
