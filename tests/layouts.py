"""The same run on every layout: backends x ranks, for tests that compare them."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from seft_dist import SeftConfig, SeftOptimizer
from tests.models import batch, prune_, tiny_llama
from tests.ranks import run_ranks

DS_BASE = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    "steps_per_print": 1 << 30,
}

LAYOUTS = ["single", "ddp", "fsdp", "zero0", "zero1", "zero2", "zero3"]


def shard_fsdp(model: Any, **options: Any) -> None:
    """fully_shard every decoder layer, then the root."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)


def ds_engine(model: nn.Module, seft: SeftOptimizer, stage: int, **over: Any) -> Any:
    """A DeepSpeed engine with the optimizer as its client optimizer, without compiling anything."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config: dict[str, Any] = copy.deepcopy(DS_BASE) | {"zero_optimization": {"stage": stage}}
    zero = over.pop("zero_optimization", {})
    config |= over
    config["zero_optimization"] |= zero
    deepspeed.init_distributed("gloo", verbose=False)
    engine, *_ = deepspeed.initialize(model=model, optimizer=seft, config=config)
    return engine


def build(
    layout: str, seft_config: SeftConfig, model: nn.Module | None = None, **options: Any
) -> tuple[nn.Module, SeftOptimizer, Callable[[torch.Tensor], None], Callable[[], None]]:
    """A model on a layout.

    Args:
        layout: One of ``LAYOUTS``, or "hsdp" (two replicas).
        seft_config: The method.
        model: The model to train; None: the tiny pruned Llama.
        options: Options of SeftOptimizer; ``ds`` adds to the ds_config, ``fsdp`` to the arguments of fully_shard.

    Returns:
        The module to call for a forward pass, the optimizer, a function that runs backward, and one that steps.
    """
    ds, fsdp = options.pop("ds", {}), options.pop("fsdp", {})
    model = model if model is not None else prune_(tiny_llama())
    seft = SeftOptimizer(model, seft_config, **({"lr": 1e-2, "max_grad_norm": 1.0} | options))
    called: Any = model
    if layout.startswith("zero"):
        engine = ds_engine(model, seft, int(layout[4]), **ds)
        return engine, seft, engine.backward, engine.step
    if layout == "fsdp":
        shard_fsdp(model, **fsdp)
    elif layout == "hsdp":
        mesh = dist.init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
        shard_fsdp(model, mesh=mesh, **fsdp)
    elif layout == "ddp":
        called = nn.parallel.DistributedDataParallel(model)

    def step() -> None:
        seft.step()
        seft.zero_grad()

    return called, seft, lambda loss: loss.backward(), step


def snapshot(model: nn.Module, seft: SeftOptimizer) -> dict[str, Any]:
    """Whole masks, supports and weights of the targets, the same form for every layout. Collective."""
    from seft_dist.sparsity.bitmask import unpack

    mine = {
        layer.name: (
            layer.interval.start,
            unpack(layer.mask, len(layer.interval)),
            layer.columns.indices.clone(),
            layer.columns.values.clone(),
        )
        for layer in seft.deltas()
    }
    world = dist.get_world_size() if dist.is_initialized() else 1
    every: list[Any] = [mine]
    if world > 1:
        every = [None] * world
        dist.all_gather_object(every, mine)
    out = {}
    seft.backend.drop_gathered()
    for i, name in enumerate(seft.target_names):
        parts = sorted({part[name][0]: part[name] for part in every if len(part[name][1])}.values(), key=lambda p: p[0])
        weight = seft.backend.full(seft.backend.holders[i].weight).float().view(-1).clone()
        out[name] = {
            "mask": torch.cat([part[1] for part in parts]),
            "support": torch.cat([part[2] for part in parts]),
            "values": torch.cat([part[3] for part in parts]),
            "weight": weight,
        }
    return out


def train(
    layout: str,
    world_size: int,
    seft_config: SeftConfig,
    steps: int,
    rank: int = 0,
    global_batch: int = 12,
    accumulate: int = 1,
    prepare: Callable[[nn.Module], Any] | None = None,
    between: Callable[[nn.Module], Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train the tiny model; every layout sees the same global batches. Collective.

    Args:
        prepare: Called with the model before it is sharded.
        between: Called after each step with what forward calls.
        options: Options of ``build``.

    Returns:
        losses (averaged over ranks), digests of the evolutions, snapshot, sparsity, trained norms and biases.
    """
    model = options.pop("model", None) or prune_(tiny_llama())
    if prepare:
        prepare(model)
    if layout.startswith("zero"):
        options["ds"] = {"gradient_accumulation_steps": accumulate} | options.get("ds", {})
    called, seft, backward, step = build(layout, seft_config, model, **options)
    losses, digests = [], []
    size = global_batch // world_size // accumulate
    for t in range(steps):
        data = batch(t, size=global_batch)
        mean = torch.zeros(())
        for micro in range(accumulate):
            begin = (rank * accumulate + micro) * size
            loss = called(**{key: value[begin : begin + size] for key, value in data.items()}).loss
            backward(loss if layout.startswith("zero") else loss / accumulate)
            mean += loss.detach().float() / accumulate
            if layout.startswith("zero") or micro + 1 == accumulate:
                step()
        if world_size > 1:
            dist.all_reduce(mean)
            mean /= world_size
        losses.append(mean.item())
        if seft.evolution:
            digests.append(seft.evolution.digest)
        if between:
            between(called)
    vectors = {name: seft.backend.full(model.get_parameter(name)).clone() for name in seft.vectors.names}
    return {
        "losses": losses,
        "digests": digests,
        "state": snapshot(model, seft),
        "sparsity": seft.sparsity(),
        "vectors": vectors,
    }


def train_on(layout: str, world_size: int, seft_config: SeftConfig, steps: int, **options: Any) -> dict[str, Any]:
    """``train`` in forked ranks; rank 0's result after checking that all ranks agree."""

    def on_rank(rank: int, world: int) -> dict[str, Any]:
        return train(layout, world, seft_config, steps, rank, **options)

    results = run_ranks(on_rank, world_size, timeout=120)
    assert all(result["losses"] == results[0]["losses"] for result in results)
    return results[0]
