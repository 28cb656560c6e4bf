"""Checks that a whole model can be trained by SEFT, beyond those of its targets one by one."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from seft_dist.backends.packed import packed_of
from seft_dist.backends.shards import find_fsdp1
from seft_dist.config import SeftConfig
from seft_dist.modules.kinds import Target


def check_is_model(model: object, config: object) -> None:
    """Refuse what other optimizers take instead of a model, or in the second place.

    Raises:
        TypeError: The first is not a module, or the second neither a ``SeftConfig`` nor None; says what is wanted.
    """
    if config is not None and not isinstance(config, SeftConfig):
        raise TypeError(
            f"SeftOptimizer got a {type(config).__name__} as config: needs a SeftConfig, or None for the defaults; the "
            "learning rate has a name: SeftOptimizer(model, SeftConfig(density=0.01), lr=1e-3)"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"SeftOptimizer got a {type(model).__name__} instead of a model: it chooses the weights itself, so pass "
            "the model, not its parameters: SeftOptimizer(model, SeftConfig(...), lr=...). In transformers.Trainer: "
            'optimizer_cls_and_kwargs=(SeftOptimizer, {"model": model, "config": SeftConfig(...), "lr": ...})'
        )


def check_no_adapters(model: nn.Module) -> None:
    """Refuse a model with adapters of PEFT: they would be taken for targets, or stay untrained.

    Raises:
        ValueError: Names the first adapter.
    """
    for name, module in model.named_modules():
        if any(kind.__module__.split(".")[0] == "peft" for kind in type(module).__mro__):
            where = f"{name} is a" if name else "the model is a"
            raise ValueError(
                f"{where} {type(module).__name__} of PEFT: SEFT trains the weights of the model itself, so adapters "
                "would neither be trained nor kept sparse. Merge them first (model = model.merge_and_unload()), or "
                "pass no peft_config"
            )


def check_not_flattened(model: nn.Module) -> None:
    """Refuse a model that FSDP1 has wrapped: it holds parts of one flat tensor in place of weights.

    Raises:
        ValueError: Names the first wrapped module, and what to use instead.
    """
    name = find_fsdp1(model)
    if name is not None:
        raise ValueError(
            f"{name or 'the model'} is flattened by FullyShardedDataParallel (FSDP1): needs FSDP2, "
            "torch.distributed.fsdp.fully_shard, or fsdp_version: 2 in the configuration of accelerate"
        )


def check_dtype(name: str, weight: Tensor) -> None:
    """Refuse fp16 weights.

    Args:
        name: Name of the weight, for the message.
        weight: The weight as it is held.

    Raises:
        ValueError: The weights are fp16.
    """
    if weight.dtype == torch.float16:
        raise ValueError(
            f"{name} is float16, whose range is too small for updates without loss scaling: load the model with "
            "dtype=torch.bfloat16 or torch.float32"
        )


def check_dtypes_unchanged(targets: Mapping[str, Target], dtypes: Sequence[torch.dtype]) -> None:
    """Refuse weights that were converted after the optimizer had read them.

    Args:
        targets: Targets by name.
        dtypes: Their dtypes when they were read.

    Raises:
        ValueError: Names the weight, and what to do instead.
    """
    for (name, target), dtype in zip(targets.items(), dtypes, strict=True):
        if target.weight.dtype != dtype and packed_of(target.weight) is None:
            raise ValueError(
                f"{target.weight_name(name)} was {dtype} when SeftOptimizer read it, and is {target.weight.dtype} now: "
                "convert the model before the first forward pass, or compute in another type with torch.autocast"
            )


def check_trainable(model: nn.Module, targets: Mapping[str, Target]) -> None:
    """Refuse adapters, fp16 weights, views, and weights that a hook fetches from elsewhere for each forward pass.

    Args:
        model: The root module.
        targets: Its targets by name.

    Raises:
        ValueError: Names the module or weight, and what to change.
    """
    check_no_adapters(model)
    for name, target in targets.items():
        weight = target.weight_name(name)
        check_dtype(weight, target.weight)
        if packed_of(target.weight) is None and not target.weight.is_contiguous():
            raise ValueError(
                f"{weight} is not contiguous in memory (a transposed view?): make it so first, "
                "weight.data = weight.data.contiguous()"
            )
        hook = getattr(target.module, "_hf_hook", None)
        if target.weight.is_meta and hook is not None:
            raise ValueError(
                f"{weight} is on the meta device and fetched for each forward pass (device_map with offloading to CPU "
                "or disk): there is nothing to write updates to. Load the model without device_map, and shard it with "
                "FSDP2 or ZeRO-3 (which can offload to the CPU)"
            )


def check_loaded(model: nn.Module, targets: Mapping[str, Target]) -> None:
    """Refuse weights that have no values when training begins, and what came after the optimizer that it cannot train.

    Args:
        model: The root module.
        targets: Its targets by name.

    Raises:
        ValueError: Names the weight or module.
    """
    check_not_flattened(model)
    check_no_adapters(model)
    for name, target in targets.items():
        target.check_stored(name)
        if not isinstance(target.weight, nn.Parameter):
            raise ValueError(
                f"{target.weight_name(name)} is a plain tensor while the model computes, and no parameter, as "
                "FullyShardedDataParallel (FSDP1) or torch.func.functional_call put there: needs FSDP2 "
                "(torch.distributed.fsdp.fully_shard; fsdp_version: 2 of accelerate), and calls of the model itself"
            )
        if target.weight.is_meta and packed_of(target.weight) is None:
            raise ValueError(
                f"{target.weight_name(name)} is on the meta device, without values: load the pruned weights before the "
                "first training step"
            )
