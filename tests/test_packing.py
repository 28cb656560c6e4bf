"""Packed weights, in messages and at rest: the same bits as without packing, and as few bytes as promised."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from seft_dist import SeftConfig, SeftOptimizer, pack_gathers, pack_weights, unpack_weights
from seft_dist.backends.group import Group
from seft_dist.backends.packed import PackedBackend, PackedShards, packed_of
from seft_dist.config.inputs import ModelConfig
from seft_dist.io import checkpoint
from seft_dist.io.models import checkpoint_activations, load_model
from seft_dist.io.source import open_source
from seft_dist.modules.kinds import LinearWeight
from seft_dist.optim.evolution import Evolution
from seft_dist.sparsity.bitmask import pack
from tests.families import family_model
from tests.layouts import shard_fsdp
from tests.models import batch, moving, prune_, prune_groups_, tiny_llama
from tests.ranks import run_ranks

STEPS = 8
CONFIG = moving(density=0.05, interval=2, window=2, steps=STEPS)


def sharded(packing: str, model: Any, replicas: int = 1) -> Any:
    """Hold a model as a packing says; gives what holds the packed weights or says what is sent."""
    from torch.distributed.fsdp import fully_shard

    world_size, mesh = (dist.get_world_size() if dist.is_initialized() else 1), None
    if replicas > 1:
        names = ("replicate", "shard")
        mesh = dist.init_device_mesh("cpu", (replicas, world_size // replicas), mesh_dim_names=names)
    options: dict[str, Any] = {} if mesh is None else {"mesh": mesh}
    if packing == "resident":
        shards = pack_weights(model, mesh=mesh)
        if world_size > 1:
            fully_shard(model, ignored_params=shards.parameters, **options)
        return shards
    if world_size > 1:
        shard_fsdp(model, **options)
    return pack_gathers(model) if packing == "gather" else None


def run(packing: str, rank: int, *, replicas: int = 1, config: SeftConfig = CONFIG, **over: Any) -> dict[str, Any]:
    """Train a tiny model, evaluate and generate in between; every float that came out, exactly."""
    pattern = config.known_pattern
    checkpointed = over.pop("checkpointed", False)
    model: Any = tiny_llama(**over)
    model = prune_groups_(model, pattern) if pattern else prune_(model)
    if checkpointed:
        model.train()
        checkpoint_activations(model)
    sharded(packing, model, replicas)
    seft = SeftOptimizer(model, config, lr=1e-2, max_grad_norm=1.0)
    seen: list[Any] = []
    seft.attach()
    wire = count_gathered_bytes()
    for t in range(STEPS):
        loss = model(**batch(t, rank)).loss
        loss.backward()
        seft.step()
        seft.zero_grad()
        seen.append(loss.item())
        if seft.evolution:
            seen.append(seft.evolution.digest)
        if t % 3 == 1:
            with torch.no_grad():
                seen.append(model(**batch(99)).loss.item())
    seft.backend.drop_gathered()
    weights = [seft.backend.full(holder.weight).clone() for holder in seft.backend.holders]
    held = bytes_held(seft) if packing == "resident" else None
    return {"seen": seen, "weights": weights, "held": held, "wire": sum(wire)}


def count_gathered_bytes() -> list[int]:
    """Grows by the bytes that this process gives to each all-gather, FSDP2's and ours; for a process that ends soon."""
    wire: list[int] = []
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # before torch 2.13
    plain = getattr(dist, name)

    def counted(out: Tensor, sent: Tensor, *args: Any, **options: Any) -> Any:
        wire.append(sent.nbytes)
        return plain(out, sent, *args, **options)

    setattr(dist, name, counted)
    return wire


def bytes_held(seft: SeftOptimizer) -> tuple[int, int]:
    """Bytes of all memory of packed weights and masks, each counted once; and bytes of the own rows in dense bf16."""
    backend = seft.backend
    assert isinstance(backend, PackedBackend)
    parts = [packed_of(holder.weight) for holder in backend.holders]
    assert all(holder.weight.device.type == "meta" for holder in backend.holders)
    tensors: list[Tensor] = [tensor for part in parts if part for tensor in (part.bits, part.values)]
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*tensors, *seft.sparse_state.masks]
    }
    return sum(storages.values()), sum(2 * len(backend.interval(i)) for i in range(len(parts)))


def same(packing: str, world_size: int, **options: Any) -> list[dict[str, Any]]:
    """Train with and without packing; every rank must see the same bits and send less."""

    def on_rank(rank: int, _: int, kind: str) -> dict[str, Any]:
        return run(kind, rank, **options)

    dense, packed = (run_ranks(on_rank, world_size, kind, timeout=200) for kind in ("none", packing))
    for one, other in zip(dense, packed, strict=True):
        assert one["seen"] == other["seen"]
        assert all(map(torch.equal, one["weights"], other["weights"]))
        other["wire_dense"] = one["wire"]
    return packed


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 40), st.floats(0, 1), st.integers(0, 1 << 30))
def test_indices_find_what_a_dense_weight_holds(rows: int, columns: int, share: float, seed: int) -> None:
    """Read, write and change the mask of one packed weight beside a dense one."""
    generator = torch.Generator().manual_seed(seed)

    def some(share: float) -> Tensor:
        return torch.rand(rows * columns, generator=generator) < share

    shards = PackedShards(Group(None), Group(None), torch.device("cpu"))
    holder = nn.Linear(columns, rows, bias=False)
    (holder.weight,) = shards.add_unit([((rows, columns), torch.float32)])
    weight = packed_of(holder.weight)
    assert weight is not None
    mask = some(share)
    dense = torch.randn(rows * columns, generator=generator) * mask * some(0.9)  # an active weight may be 0
    weight.put(dense, pack(mask))
    backend = PackedBackend({"linear": LinearWeight(holder)})
    positions = (mask & some(0.5)).nonzero().view(-1)
    indices = backend.memory_indices(0, positions)
    assert torch.equal(backend.load(0, indices), dense[positions])
    dense[positions] += 1
    backend.store(0, indices, dense[positions])
    assert torch.equal(backend.own(0), dense)
    moved = some(share)
    with backend.writing():
        backend.remask(0, pack(moved), (mask & ~moved).nonzero().view(-1))
        backend.sync_mask_counts()
    assert torch.equal(weight.dense().view(-1), dense * moved)
    assert weight.values.numel() == int(moved.sum())


VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "three uneven ranks": (3, {}),
    "ranks that own nothing": (4, {"intermediate_size": 3, "config": moving(density=0.1, interval=2, steps=STEPS)}),
    "hsdp": (4, {"replicas": 2}),
    "hsdp, one rank a shard": (2, {"replicas": 2}),
    "checkpointed": (2, {"checkpointed": True, "dtype": torch.bfloat16}),
    "pattern": (2, {"config": moving(density=0.05, interval=2, steps=STEPS, pattern="2:4")}),
    "random start, random criteria": (
        2,
        {
            "config": moving(
                density=0.05, interval=2, steps=STEPS, init="random", grow="random", drop="random", adapt="magnitude"
            )
        },
    ),
    "seeded, global, activation": (
        2,
        {
            "config": moving(
                density=0.05,
                interval=2,
                steps=STEPS,
                moments="seeded",
                scope="global",
                adapt="activation",
                reactivation=0.3,
            )
        },
    ),
    "kept, momentum, movement": (
        2,
        {"config": moving(density=0.05, interval=2, steps=STEPS, on_drop="keep", grow="momentum", drop="movement")},
    ),
}


def test_at_rest_in_one_process() -> None:
    held, dense = same("resident", 1, dtype=torch.bfloat16, checkpointed=True)[0]["held"]
    assert held <= 0.5 * dense


@pytest.mark.parametrize("reactivation", [0.0, 1.0])
def test_masks_are_copied_only_where_they_change(reactivation: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = prune_(tiny_llama())
    pack_weights(model)
    seft = SeftOptimizer(model, moving(density=0.05, interval=2, steps=STEPS, reactivation=reactivation), lr=1e-2)
    copied: list[float] = []
    apply = Evolution.apply

    def count(evolution: Evolution, betas: tuple[float, float]) -> None:
        backend: Any = evolution.work.backend
        pairs = zip(evolution.work.state.masks, backend._weights, strict=True)
        copies = [mask.data_ptr() != weight.bits.data_ptr() for mask, weight in pairs]
        copied.append(sum(copies) / len(copies))
        apply(evolution, betas)

    monkeypatch.setattr(Evolution, "apply", count)
    for t in range(4):
        model(**batch(t, 0)).loss.backward()
        seft.step()
        seft.zero_grad()
    assert len(copied) == 3 and copied == ([0.0] * 3 if reactivation == 0 else [copied[0], 1.0, 1.0])


@pytest.mark.parametrize("packing", ["gather", "resident"])
def test_two_ranks(packing: str) -> None:
    for result in same(packing, 2, dtype=torch.bfloat16, vocab_size=128, hidden_size=64, intermediate_size=192):
        assert result["wire"] < 0.7 * result["wire_dense"]  # embeddings, supports and masks travel as before
        if packing == "resident":
            held, dense = result["held"]
            assert held <= 0.5 * dense


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["gather", "resident"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(variant: str, packing: str) -> None:
    world_size, options = VARIANTS[variant]
    same(packing, world_size, **options)


def test_checkpoints_go_from_packed_to_dense_and_back(tmp_path: Path) -> None:
    """Two packed ranks, then one dense process, then three packed ranks: masks and supports of each saved step."""

    def on_rank(rank: int, world_size: int, packing: str, first: int, last: int) -> list[Any]:
        model = prune_(tiny_llama())
        sharded(packing, model)
        seft = SeftOptimizer(model, CONFIG, lr=1e-2)
        if first:
            checkpoint.load(seft, tmp_path / f"step-{first:08d}")
        for t in range(first, last):
            data = batch(t, size=6)
            begin, size = rank * 6 // world_size, 6 // world_size
            model(**{key: value[begin : begin + size] for key, value in data.items()}).loss.backward()
            seft.step()
            seft.zero_grad()
        if last > first:
            checkpoint.save(seft, tmp_path, {})
        return [seft.backend.full(holder.weight).clone() for holder in seft.backend.holders]

    plan = [("resident", 2, 0, 3), ("none", 1, 3, 5), ("resident", 3, 5, 8)]
    for packing, world_size, first, last in plan:
        saved = run_ranks(on_rank, world_size, packing, first, last)[0]
        for other, ranks in (("none", 1), ("resident", 1), ("resident", 2)):
            loaded = run_ranks(on_rank, ranks, other, last, last)[0]
            assert all(map(torch.equal, saved, loaded)), (packing, other, ranks)


def test_unpacked_again() -> None:
    """Weights that are unpacked again work without an optimizer, also with gradients, and have the original bits."""
    model: Any = prune_(tiny_llama())
    before: dict[str, Tensor] = {key: value.clone() for key, value in model.state_dict().items()}
    inputs = batch(0)
    loss = model(**inputs).loss
    embeddings = model.get_input_embeddings().weight
    (wanted,) = torch.autograd.grad(loss, embeddings)
    pack_weights(model)
    assert model(**inputs).loss == loss
    (found,) = torch.autograd.grad(model(**inputs).loss, embeddings)
    assert torch.equal(found, wanted)
    model.generation_config.pad_token_id = 0
    tokens = model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False)
    seft = SeftOptimizer(model, CONFIG)
    seft.attach()
    seft.detach()
    assert model(**inputs).loss == loss
    unpack_weights(model)
    assert torch.equal(tokens, model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False))
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_loaded_straight_into_packed_shards(tmp_path: Path, sharding: Any) -> None:
    model: Any = prune_(tiny_llama(dtype=torch.bfloat16))
    model.save_pretrained(tmp_path / "model")

    def on_rank(rank: int, world_size: int) -> bool:
        source = open_source(ModelConfig(path=str(tmp_path / "model")))
        plain, packed = (load_model(source, sharding=sharding, resident=kind) for kind in (None, "all-linear"))
        assert packed_of(packed.get_submodule("model.layers.1.mlp.up_proj").weight) is not None
        # beside the root, whose gathered buffer would live until the end of forward if no other unit followed
        units = [name for name, module in packed.named_modules() if isinstance(module, FSDPModule)]
        assert units == (["", "model.layers.0"] if sharding == "fsdp" else [])
        with torch.no_grad():
            return torch.equal(plain(**batch(0)).logits, packed(**batch(0)).logits)

    assert all(run_ranks(on_rank, 2 if sharding == "fsdp" else 1))


def test_every_kind_of_target() -> None:
    """Fused experts and GPT-2's transposed linears are packed too."""

    def on_rank(rank: int, world_size: int, family: str) -> list[Any]:
        seen: list[Any] = []
        for packing in ("none", "resident"):
            model = prune_(family_model(family))
            sharded(packing, model)
            seft = SeftOptimizer(model, CONFIG, lr=1e-2)
            seen.append([])
            for t in range(4):
                loss = model(**batch(t, rank)).loss
                loss.backward()
                seft.step()
                seft.zero_grad()
                seen[-1].append(loss.item())
        return seen

    for family in ("mixtral", "gpt2"):
        for plain, packed in run_ranks(on_rank, 1, family):
            assert plain == packed, family


def test_what_cannot_be_packed_is_refused() -> None:
    model = prune_(tiny_llama())
    with pytest.raises(ValueError, match="fully_shard"):
        pack_gathers(model)
    pack_weights(model, "mlp")
    with pytest.raises(ValueError, match="packed already"):
        pack_weights(model)
    with pytest.raises(ValueError, match="not packed although other targets are"):
        SeftOptimizer(model, CONFIG).attach()


def test_a_gather_that_does_not_pay_is_dense_and_says_so() -> None:
    def on_rank(rank: int, world_size: int) -> list[tuple[str, bool]]:
        model = prune_(tiny_llama(), pattern="layers.0")
        return [(size.unit, size.pays) for size in sharded("gather", model)]

    for found in run_ranks(on_rank, 2):
        assert dict(found) == {"": False, "model.layers.0": True, "model.layers.1": False}
