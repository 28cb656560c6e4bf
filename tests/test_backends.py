"""Every way of holding weights, and every trap known of it, follows the single-process run or is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from seft_dist import SeftOptimizer, ds_optimizer_args
from seft_dist.backends.deepspeed import Zero3Backend
from seft_dist.config import AdamConfig
from seft_dist.io.models import checkpoint_activations
from tests.layouts import build, ds_engine, shard_fsdp, train, train_on
from tests.models import batch, moving, prune_, tiny_llama
from tests.ranks import return_freed_memory, run_ranks

STEPS = 10
CONFIG = moving(density=0.05, interval=3, window=2, steps=STEPS)


def follows(run: dict[str, Any], reference: dict[str, Any], tolerance: float = 2e-6) -> None:
    assert run["digests"] == reference["digests"]
    for name, layer in reference["state"].items():
        assert torch.allclose(run["state"][name]["weight"], layer["weight"], rtol=1e-4, atol=tolerance), name
    assert all(counts.zeros == counts.numel - counts.mask_size for counts in run["sparsity"])


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return train_on("single", 1, CONFIG, STEPS)


def evaluate(called: nn.Module) -> None:
    with torch.no_grad():
        called(**batch(99))


def checkpointing(reentrant: bool) -> Any:
    def prepare(model: Any) -> None:
        model.train()
        checkpoint_activations(model, use_reentrant=reentrant)
        if reentrant:
            model.enable_input_require_grads()

    return prepare


def never_persistent() -> dict[str, Any]:
    return {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def offload() -> dict[str, Any]:
    return {"zero_optimization": {"offload_param": {"device": "cpu", "pin_memory": False}}}


def fsdp_offload() -> dict[str, Any]:
    from torch.distributed.fsdp import CPUOffloadPolicy

    return {"offload_policy": CPUOffloadPolicy(pin_memory=False)}


VARIANTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "fsdp, evaluation leaves the root gathered": ("fsdp", 2, {"between": evaluate}),
    "zero3, evaluation between steps": ("zero3", 2, {"between": evaluate}),
    "zero3, nothing persistent": ("zero3", 2, {"ds": never_persistent()}),
    "zero3, offload_param": ("zero3", 2, {"ds": offload()}),
    "fsdp, offload": ("fsdp", 2, {"fsdp": fsdp_offload()}),
    "hsdp": ("hsdp", 4, {}),
    "hsdp, one rank a shard": ("hsdp", 2, {}),
    "fsdp, no reshard after forward": ("fsdp", 2, {"fsdp": {"reshard_after_forward": False}}),
    "accumulate": ("single", 1, {"accumulate": 3}),
    "zero0, accumulate": ("zero0", 2, {"accumulate": 3}),
    "zero2, accumulate": ("zero2", 2, {"accumulate": 3}),
    "zero3, accumulate": ("zero3", 2, {"accumulate": 3}),
    "fsdp, accumulate": ("fsdp", 2, {"accumulate": 3}),
    "checkpointing": ("single", 1, {"prepare": checkpointing(False)}),
    "fsdp, checkpointing": ("fsdp", 2, {"prepare": checkpointing(False)}),
    "zero3, checkpointing": ("zero3", 2, {"prepare": checkpointing(False)}),
    "zero3, reentrant checkpointing": ("zero3", 2, {"prepare": checkpointing(True)}),
    "ddp, checkpointing": ("ddp", 2, {"prepare": checkpointing(False)}),
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_follows_one_process(variant: str, reference: dict[str, Any]) -> None:
    layout, world_size, options = VARIANTS[variant]
    follows(train_on(layout, world_size, CONFIG, STEPS, **options), reference)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "world_size"), [("fsdp", 4), ("zero3", 4), ("ddp", 4)])
def test_ranks_that_own_nothing(layout: str, world_size: int) -> None:
    """Three rows on four ranks: FSDP2's last rank owns none, ZeRO-3's last chunk is mostly padding."""

    def small() -> nn.Module:
        return prune_(tiny_llama(intermediate_size=3))

    config = moving(density=0.05, interval=3, steps=STEPS)
    single = train_on("single", 1, config, STEPS, model=small())
    follows(train_on(layout, world_size, config, STEPS, model=small()), single)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["single", "zero0", "zero1", "zero2", "zero3", "fsdp"])
def test_bf16_weights_with_fp32_deltas(layout: str) -> None:
    options: dict[str, Any] = {"model": prune_(tiny_llama(dtype=torch.bfloat16))}
    if layout.startswith("zero"):
        options["ds"] = {"bf16": {"enabled": True}}
    run = train_on(layout, 1 if layout == "single" else 2, CONFIG, STEPS, **options)
    assert run["losses"][-1] < run["losses"][0]
    for counts in run["sparsity"]:
        assert counts.zeros == counts.numel - counts.mask_size
    for layer in run["state"].values():
        assert layer["values"].dtype == torch.float32
        # fp32 deltas: most are not representable in bf16
        assert (layer["values"].bfloat16().float() != layer["values"]).float().mean() > 0.5


@pytest.mark.parametrize("reshards", [True, False])
def test_fsdp_mixed_precision_keeps_fp32_shards(reshards: bool) -> None:
    """Also where weights stay gathered behind the backward pass, in bf16."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    def on_rank(rank: int, world_size: int) -> dict[str, Any]:
        model: Any = prune_(tiny_llama())
        shard_fsdp(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        model.set_reshard_after_backward(reshards)
        return train("single", world_size, CONFIG, STEPS, rank, model=model)

    run = run_ranks(on_rank, 2)[0]
    assert run["losses"][-1] < run["losses"][0]
    assert all(counts.zeros == counts.numel - counts.mask_size for counts in run["sparsity"])


def test_fsdp_optimizer_after_sharding(reference: dict[str, Any]) -> None:
    def on_rank(rank: int, world_size: int) -> dict[str, Any]:
        model = prune_(tiny_llama())
        shard_fsdp(model)
        return train("single", world_size, CONFIG, STEPS, rank, model=model)

    follows(run_ranks(on_rank, 2)[0], reference)


def test_zero3_leaves_no_weight_gathered() -> None:
    def on_rank(rank: int, world_size: int) -> list[str]:
        engine, seft, backward, step = build("zero3", CONFIG, ds=never_persistent())
        for t in range(4):
            backward(engine(**batch(t, rank)).loss)
            step()
        return [vars(module.weight)["ds_status"].name for module in seft.backend.holders]

    for states in run_ranks(on_rank, 2):
        assert set(states) == {"NOT_AVAILABLE"}


def test_hidden_write_is_never_silent() -> None:
    """Without freeing persistent copies a ZeRO-3 write is seen one step late: the first step must say so."""

    def on_rank(rank: int, world_size: int) -> str:
        engine, seft, backward, _ = build("zero3", CONFIG)
        backward(engine(**batch(0, rank)).loss)
        Zero3Backend.publish_write = lambda self: None  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="does not see the updates"):
            seft.step()  # engine.step() would free the copies before
        return "refused"

    assert run_ranks(on_rank, 2) == ["refused"] * 2


def test_zero3_persistent_copies_see_the_write() -> None:
    """The engine still holds gathered copies when the optimizer is stepped directly."""

    def on_rank(rank: int, world_size: int) -> bool:
        engine, seft, backward, _ = build("zero3", CONFIG)
        for t in range(3):
            backward(engine(**batch(t, rank)).loss)
            held = any(vars(module.weight)["ds_status"].name == "AVAILABLE" for module in seft.backend.holders)
            seft.step()
            for i, entries in enumerate(seft.sparse_state.layers()):
                seen = seft.backend.read(i, entries.indices.long())
                assert torch.equal(seen, entries.weight())
        return held

    assert run_ranks(on_rank, 2) == [True, True]


def test_zero3_second_copy_is_refused() -> None:
    def on_rank(rank: int, world_size: int) -> str:
        model = prune_(tiny_llama())
        seft = SeftOptimizer(model, CONFIG)
        ds_engine(model, seft, 3, zero_optimization={"zero_hpz_partition_size": 2})
        with pytest.raises(ValueError, match="hpZ"):
            seft.attach()
        return "refused"

    assert run_ranks(on_rank, 2) == ["refused"] * 2


def test_other_shard_dimension_is_refused() -> None:
    from torch.distributed.tensor import Shard

    def on_rank(rank: int, world_size: int) -> str:
        model = prune_(tiny_llama())
        seft = SeftOptimizer(model, CONFIG)
        shard_fsdp(model, shard_placement_fn=lambda p: Shard(p.dim() - 1))
        with pytest.raises(ValueError, match="Shard\\(0\\)"):
            seft.attach()
        return "refused"

    assert run_ranks(on_rank, 2) == ["refused"] * 2


def test_partly_sharded_model_is_refused() -> None:
    def on_rank(rank: int, world_size: int) -> str:
        from torch.distributed.fsdp import fully_shard

        model: Any = prune_(tiny_llama())
        seft = SeftOptimizer(model, CONFIG)
        fully_shard(model.model.layers[0])
        with pytest.raises(ValueError, match="fully_shard\\(model\\) on the root"):
            seft.attach()
        return "refused"

    assert run_ranks(on_rank, 2) == ["refused"] * 2


def test_ranks_with_another_configuration_are_refused() -> None:
    def on_rank(rank: int, world_size: int) -> str:
        seft = SeftOptimizer(prune_(tiny_llama()), moving(density=0.02 if rank else 0.01))
        with pytest.raises(ValueError, match="another configuration"):
            seft.attach()
        return "refused"

    assert run_ranks(on_rank, 3) == ["refused"] * 3


def test_ranks_with_another_model_are_refused() -> None:
    def on_rank(rank: int, world_size: int) -> str:
        seft = SeftOptimizer(prune_(tiny_llama(seed=rank)), CONFIG)
        with pytest.raises(ValueError, match=r"ranks \[1\] differs from rank 0"):
            seft.attach()
        return "refused"

    assert run_ranks(on_rank, 2) == ["refused"] * 2


def test_non_finite_gradient_on_one_rank_stops_all() -> None:
    def on_rank(rank: int, world_size: int) -> bool:
        called, seft, backward, step = build("fsdp", CONFIG)
        for t in range(4):
            backward(called(**batch(t, rank)).loss)
            step()
        before = [layer.columns.values.clone() for layer in seft.deltas()]
        backward(called(**batch(5, rank)).loss * (float("nan") if rank else 1.0))
        with pytest.raises(FloatingPointError, match=r"step 5: the gradient of model\.layers\.0"):
            step()
        seft.zero_grad()
        same = all(torch.equal(a, b.columns.values) for a, b in zip(before, seft.deltas(), strict=True))
        backward(called(**batch(6, rank)).loss)
        step()
        return same and seft.num_steps == 5

    assert run_ranks(on_rank, 2) == [True, True]


def test_gathered_entries_are_counted(reference: dict[str, Any]) -> None:
    """Bytes of a plain step: 4 for each delta of another rank, and two fp64 numbers a layer are summed."""

    def on_rank(rank: int, world_size: int) -> tuple[int, int]:
        called, seft, backward, step = build("fsdp", moving(density=0.05, interval=50))
        for t in range(2):
            sent = seft.backend.bytes_sent if t else 0
            backward(called(**batch(t, rank)).loss)
            step()
        layers = len(seft.target_names)
        own = len(seft.sparse_state.columns)
        total = sum(map(len, seft.sparse_state.supports))
        norms = 2 * (2 * layers * 8) * (world_size - 1) // world_size
        return seft.backend.bytes_sent - sent, 4 * (total - own) + norms

    for found, expected in run_ranks(on_rank, 2):
        assert found == expected


DS_REFUSED: dict[str, dict[str, Any]] = {
    "fp16.enabled": {"fp16": {"enabled": True}},
    "zero_hpz_partition_size": {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
    "zero_quantized_weights": {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
    "zero_quantized_nontrainable_weights": {"zero_optimization": {"zero_quantized_nontrainable_weights": True}},
    "nvme": {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
    "mics": {"zero_optimization": {"stage": 3, "mics_shard_size": 2}},
    "type Lamb": {"optimizer": {"type": "Lamb"}},
    "momentum": {"optimizer": {"type": "AdamW", "params": {"momentum": 0.9}}},
    "adam_w_mode": {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False, "weight_decay": 0.1}}},
    "bias_correction": {"optimizer": {"type": "AdamW", "params": {"bias_correction": False}}},
}


@pytest.mark.parametrize("match", DS_REFUSED)
def test_ds_config_that_cannot_be_honoured(match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ds_optimizer_args(DS_REFUSED[match])


def test_ds_config_optimizer_block_is_honoured(tmp_path: Path) -> None:
    block = {"type": "AdamW", "params": {"lr": 5e-4, "betas": [0.8, 0.9], "eps": "auto", "weight_decay": 0.1}}
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"optimizer": block, "gradient_clipping": 0.5}))
    args = ds_optimizer_args(str(file), AdamConfig(eps=1e-6))
    assert args == {"lr": 5e-4, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1, "max_grad_norm": 0.5}
    with pytest.raises(ValueError, match="needs a JSON file"):
        ds_optimizer_args(str(tmp_path / "missing.json"))


def train_linears(width: int, depth: int) -> None:
    """Three steps with one evolution on a stack of linears that exists as FSDP2 shards only."""
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(depth)])
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    model.to_empty(device="cpu")
    parameters: list[Any] = list(model.parameters())
    for local in (parameter.to_local().detach() for parameter in parameters):
        local.normal_(std=width**-0.5).masked_fill_(torch.rand_like(local) < 0.6, 0)
    seft = SeftOptimizer(model, moving(density=0.02, interval=2, window=1, steps=4))
    for _ in range(3):
        model(torch.randn(4, width)).square().mean().backward()
        seft.step()
        seft.zero_grad()


def peak_of_training(world_size: int, depth: int = 24) -> int:
    """Most memory that training ``depth`` layers of 4 MB in fp32 added to a rank, in bytes."""
    import resource

    def on_rank(rank: int, world: int) -> int:
        return_freed_memory()
        train_linears(64, 2)  # what a first step loads and compiles is not counted
        idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        train_linears(1024, depth)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle

    return max(run_ranks(on_rank, world_size, timeout=240)) * 1024


@pytest.mark.long
def test_memory_of_a_rank_falls_with_the_ranks() -> None:
    one, two, four = (peak_of_training(world_size) for world_size in (1, 2, 4))
    print(f"MB per rank on 1, 2, 4 ranks: {one >> 20}, {two >> 20}, {four >> 20}")
    assert two < 0.6 * one
    assert four < 0.35 * one


@pytest.mark.slow
def test_nothing_dense_outlives_its_layer() -> None:
    """Another layer costs one of four ranks only its shards of weight, window and deltas; a dense gradient has 4 MB."""
    shallow, deep = (peak_of_training(4, depth) for depth in (8, 24))
    print(f"MB of a rank per layer: {(deep - shallow) / 16 / 2**20:.2f}")
    assert deep - shallow < 16 * 3.5 * 2**20
