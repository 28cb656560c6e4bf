"""The part of any parameter that this rank stores, however it is sharded: for loading weights straight into shards."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from seft_dist.backends.deepspeed import is_zero3
from seft_dist.sparsity.partition import Partition


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the shape of the whole parameter, also where only a shard is present."""
    held: Any = parameter
    return tuple(held.ds_shape if is_zero3(held) else held.shape)


def is_sharded(parameter: Tensor) -> bool:
    """Return whether FSDP2 or ZeRO-3 holds a parameter."""
    return isinstance(parameter, DTensor) or is_zero3(parameter)


def find_fsdp1(model: nn.Module) -> str | None:
    """Return the name of the first module that FSDP1 has wrapped, "" for the model itself; None: there is none."""
    wrapped = (name for name, module in model.named_modules() if isinstance(module, FullyShardedDataParallel))
    return next(wrapped, None)


def stored_part(parameter: Tensor) -> tuple[Tensor, int]:
    """Return the stored part of a parameter, to be written before training begins.

    Args:
        parameter: Plain, sharded by FSDP2 (``fully_shard``) or partitioned by ZeRO-3; of any shape.

    Returns:
        The values as a flat view without padding, maybe empty, and the position of the first in the flattened whole.
    """
    if is_zero3(parameter):
        held: Any = parameter
        shard, group = held.ds_tensor.detach().view(-1), held.ds_process_group
        own = Partition(held.ds_numel, shard.numel(), dist.get_world_size(group)).interval(dist.get_rank(group))
        return shard[: len(own)], own.start
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        rows, width = parameter.shape[0], parameter[:1].numel() if parameter.dim() > 1 else 1
        own = Partition.rows((rows, width), mesh.size(mesh.ndim - 1)).interval(mesh.get_local_rank(mesh.ndim - 1))
        local = parameter.to_local().detach().view(-1)
        assert local.numel() == len(own)
        return local, own.start
    return parameter.detach().view(-1), 0


def store_whole(parameter: Tensor, values: Tensor) -> None:
    """Give a parameter new values, in the part that this rank stores and in a copy that ZeRO-3 may have gathered.

    Args:
        parameter: Plain, sharded by FSDP2 (not gathered now) or partitioned by ZeRO-3.
        values: [n], the whole value, the same on every rank; it is cast.
    """
    part, start = stored_part(parameter)
    part.copy_(values[start : start + len(part)])
    if is_zero3(parameter):
        held: Any = parameter
        if held.ds_status.name == "AVAILABLE":
            held.data.view(-1).copy_(values)


def zeros_beside(parameter: Tensor, other: Tensor) -> Tensor:
    """Return zeros in the form of a parameter without values, plain or sharded by FSDP2.

    Args:
        parameter: On the meta device.
        other: Tensor on whose device they are to be.
    """
    device = (other.to_local() if isinstance(other, DTensor) else other).device
    if not isinstance(parameter, DTensor):
        return torch.zeros_like(parameter, device=device)
    local = torch.zeros_like(parameter.to_local(), device=device)
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def shard_fsdp(
    model: nn.Module, layers: list[nn.Module], mesh: DeviceMesh, offload: bool, ignored: set[nn.Parameter]
) -> None:
    """Shard a model with FSDP2: each layer by itself, the rest with the root. Collective.

    Args:
        model: The root; its parameters may be on the meta device.
        layers: Modules that are gathered one after the other, if they have matrices that are not ignored.
        mesh: Mesh of the ranks.
        offload: Keep the shards in CPU memory.
        ignored: Parameters that are not FSDP2's.
    """
    policy = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    units = [layer for layer in layers if any(p.dim() > 1 and p not in ignored for p in layer.parameters())]
    # FSDP2 keeps the buffer of what it gathered until it gathers the next unit: there must be one beside the root.
    for layer in units or layers[:1]:
        fully_shard(layer, mesh=mesh, offload_policy=policy, ignored_params=ignored)
    fully_shard(model, mesh=mesh, offload_policy=policy, ignored_params=ignored)


def fsdp_mesh(device: torch.device, replicas: int) -> DeviceMesh:
    """Make a mesh of all ranks of the default group, as one shard group or as replicas of one (HSDP). Collective.

    Args:
        device: Device with which this rank computes.
        replicas: Number of groups of ranks that each hold a whole sharded copy; 1: one copy.

    Raises:
        ValueError: The ranks do not divide into that many replicas.
    """
    world_size = dist.get_world_size()
    if world_size % replicas:
        raise ValueError(f"replicas={replicas} with {world_size} ranks: needs a number that divides the ranks")
    if replicas > 1:
        return dist.init_device_mesh(
            device.type, (replicas, world_size // replicas), mesh_dim_names=("replicate", "shard")
        )
    return dist.init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))


@contextmanager
def zero3_construction(ds_config: dict[str, Any]) -> Iterator[None]:
    """Partition modules that are constructed inside by ZeRO-3, parameter by parameter, without values. Collective.

    Args:
        ds_config: The content of the ds_config, batch sizes filled in.
    """
    import deepspeed
    from transformers.initialization import no_init_weights

    context = deepspeed.zero.Init(config_dict_or_path=ds_config)
    arange = torch.arange

    def uncast(*args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("device") is None:
            kwargs["device"] = context.local_device
        return arange(*args, **kwargs)

    with no_init_weights(), context:
        # DeepSpeed's own makes every floating-point result the weights' type, rotary frequencies too; it puts
        # torch's back on leaving. transformers has such a context, but only in its newest versions.
        torch.arange = uncast
        yield
