"""Weights of 2^31 positions and more: what is behind that border is as what is before it, in 64 bits instead of 32.

Without their memory: the last rows of a large weight alone, against the same rows as a weight of their own; tiny
weights with a border that was moved to 64 positions; shapes without values. With it: tests/test_large_memory.py.
"""

import dataclasses
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

from seft_dist import SeftOptimizer
from seft_dist.backends import find_backend
from seft_dist.backends.group import Group
from seft_dist.backends.replicated import ReplicatedBackend
from seft_dist.config import PlanConfig
from seft_dist.export.delta import DeltaWriter, read_delta
from seft_dist.io import checkpoint
from seft_dist.io.checkpoint import reader
from seft_dist.io.checkpoint.schema import check_manifest
from seft_dist.modules.targets import find_targets
from seft_dist.optim import install as installing
from seft_dist.optim import optimizer, slot
from seft_dist.optim.delta import Support
from seft_dist.optim.packing import pack_weights
from seft_dist.planning.architectures import ModelShapes, ParameterShape, find_architecture
from seft_dist.planning.layout import Layout
from seft_dist.planning.memory import seft_memory
from seft_dist.planning.model_trace import PassCost
from seft_dist.sparsity import partition, scores
from seft_dist.sparsity.partition import Interval, Partition, position_dtype
from tests.layouts import build, snapshot, train
from tests.models import batch, moving, prune_, tiny_llama
from tests.ranks import run_ranks

ROWS, COLUMNS, BEFORE = 2, 1 << 14, (1 << 17) + 5
"""Shape of the part that exists, and the number of rows before it that do not."""
SHIFT, NUMEL, DELTAS, STEPS = BEFORE * COLUMNS, (BEFORE + ROWS) * COLUMNS, 300, 7
CONFIG = moving(interval=3, window=2, steps=20, reactivation=0.5, drop_fraction=0.5, pattern=None)


def lazy_zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take memory where they are written only."""
    size = torch.Size(shape).numel() * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class Tail(Partition):
    """Its one rank owns the end of the weight; nobody the rest."""

    def interval(self, rank: int) -> Interval:
        return Interval(SHIFT, NUMEL)


class FarBackend(ReplicatedBackend):
    """A weight whose last rows are all that exists."""

    def _shape(self, i: int) -> tuple[int, int]:
        return BEFORE + ROWS, COLUMNS

    def _partition(self, i: int) -> Partition:
        return Tail(NUMEL, NUMEL, 1)

    def stored(self, i: int) -> Interval:
        return self.interval(i)

    def read(self, i: int, positions: Tensor) -> Tensor:
        return self.local(i)[positions - SHIFT]

    def reduce_dense(self, i: int, grad: Tensor) -> Tensor:
        return grad.view(-1)[SHIFT:].clone()


class Rows(nn.Module):
    """A pruned linear of which 2 of 4 consecutive weights are active."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer = nn.Linear(COLUMNS, ROWS, bias=False)
        order = torch.rand(ROWS * COLUMNS // 4, 4, generator=generator).argsort(1)
        values = torch.randn(ROWS, COLUMNS, generator=generator)
        self.layer.weight.data.copy_(values.masked_fill(order.view_as(values) < 2, 0.0))

    def forward(self, t: int) -> Tensor:
        generator = torch.Generator().manual_seed(1 + t)
        return self.layer(torch.randn(4, COLUMNS, generator=generator)).square().sum()


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """New optimizers see their weight as the end of a large one."""
    install = installing.install

    def installed(target: Any) -> Any:
        anchor, slot = install(target)
        record = slot.record
        monkeypatch.setattr(slot, "record", lambda x, grad: record(x, nn.functional.pad(grad, (BEFORE, 0))))
        return anchor, slot

    def dense(x: Tensor, grad: Tensor) -> Tensor:
        whole = lazy_zeros(BEFORE + ROWS, COLUMNS, dtype=torch.float32)
        whole[BEFORE:] = grad[:, BEFORE:].T @ x
        return whole

    monkeypatch.setattr(optimizer, "install", installed)
    monkeypatch.setattr(optimizer, "find_backend", lambda model, targets, group: FarBackend(targets, Group(None)))
    monkeypatch.setattr(slot, "dense_grad", dense)
    monkeypatch.setattr(reader, "Partition", Tail)
    yield monkeypatch


def new(over: dict[str, Any], numel: int) -> tuple[Rows, SeftOptimizer]:
    model = Rows()
    config = dataclasses.replace(CONFIG, density=DELTAS / numel, **over)
    seft = SeftOptimizer(model, config, lr=1e-2, max_grad_norm=1.0)
    seft.attach()
    seft.counts_near_ties = True
    return model, seft


def steps(model: nn.Module, seft: SeftOptimizer, begin: int = 0, end: int = STEPS) -> list[list[int] | None]:
    """Train; return the near-ties of each evolution."""
    near_ties = []
    for t in range(begin, end):
        model(t).backward()
        seft.step()
        seft.zero_grad()
        if seft.evolution is not None:
            near_ties.append(seft.evolution.near_ties)
    return near_ties


def state(seft: SeftOptimizer, shift: int) -> dict[str, Tensor]:
    """All that training has changed; positions less ``shift``."""
    (layer,) = seft.deltas()
    found = {key: getattr(layer.columns, key) for key in ("base", "values", "exp_avg", "exp_avg_sq", "age")}
    positions = {"indices": layer.columns.indices, "committed": layer.committed}
    if layer.window is not None and layer.window.positions is not None:
        positions["window"] = layer.window.positions
    found |= {key: value.long() - shift for key, value in positions.items()}
    assert {value.dtype for value in positions.values()} == {torch.int64 if shift else torch.int32}
    assert seft.sparse_state.supports[0].positions().tolist() == layer.columns.indices.tolist()
    found |= {"mask": layer.mask, "weight": seft.backend.own(0), "norm": torch.tensor(seft.grad_norm)}
    return {key: value.clone() for key, value in found.items()}


METHODS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "seeded": {"moments": "seeded", "drop": "movement", "on_drop": "keep", "reactivation": 1.0},
    "momentum": {"grow": "momentum", "adapt": "activation", "window_store": "bf16"},
    "factored": {"window_store": "factored", "adapt": "magnitude"},
    "candidates": {"window_store": "candidates"},
    "random": {"grow": "random", "drop": "random", "init": "random", "adapt": "magnitude", "scope": "global"},
    "2:4": {"pattern": "2:4", "reactivation": 1.0},
}


@pytest.mark.parametrize("method", METHODS)
def test_the_end_of_a_large_weight_is_trained_as_if_it_were_alone(
    method: str, far: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    over = METHODS[method]
    far.setattr(FarBackend, "replicates", method in ("seeded", "2:4"))  # as if others had to be told
    model, seft = new(over, NUMEL)
    ties = steps(model, seft)
    (layer,) = seft.deltas()
    assert seft.evolution is None and layer.window is not None and len(layer.committed)
    assert int(layer.columns.indices.min()) >= SHIFT > 2**31
    found = state(seft, SHIFT)

    saved = checkpoint.save(seft, tmp_path, {})
    steps(model, seft, STEPS, STEPS + 3)
    again, resumed = new(over, NUMEL)
    checkpoint.load(resumed, saved)
    steps(again, resumed, STEPS, STEPS + 3)
    assert seft.evolution is None and same(state(resumed, SHIFT), state(seft, SHIFT))

    far.undo()
    uniform = scores.uniform
    far.setattr(scores, "uniform", lambda positions, *keys: uniform(positions + SHIFT, *keys))
    model, seft = new(over, ROWS * COLUMNS)
    assert steps(model, seft) == ties
    assert same(state(seft, 0), found)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


BORDER = 64
"""Positions from which on int64 is used, of tiny weights."""
TINY = moving(density=0.05, targets="q_proj|down_proj", interval=3, window=2, steps=20, window_store="candidates")


def moved(border: int = BORDER) -> None:
    partition._END_OF_INT32 = border  # in a process of its own


def equal(one: dict[str, Any], other: dict[str, Any], indices: torch.dtype) -> bool:
    """Losses, digests, masks, supports, values and weights, bit for bit; the other run's positions are of a type."""
    assert one["losses"] == other["losses"] and one["digests"] == other["digests"] and len(one["digests"]) > 1
    for name, layer in one["state"].items():
        assert other["state"][name]["support"].dtype == indices
        assert all(torch.equal(value, other["state"][name][key]) for key, value in layer.items())
    return one["state"].keys() == other["state"].keys()


def test_positions_of_64_bits_give_the_same_on_every_layout(tmp_path: Path) -> None:
    def on_rank(rank: int, world: int) -> dict[str, Any]:
        for layout in ("ddp", "fsdp"):
            moved(1 << 31)
            narrow = train(layout, world, TINY, 5, rank)
            moved()
            wide = train(layout, world, TINY, 5, rank)
            assert equal(narrow, wide, torch.int64)
        called, seft, backward, step = build("fsdp", TINY)
        for t in range(5):  # the first step of a window
            backward(called(**batch(t, rank)).loss)
            step()
        checkpoint.save(seft, tmp_path, {})
        return snapshot(called, seft)

    def alone(rank: int, world: int) -> dict[str, Any]:
        narrow = train("single", 1, TINY, 5)
        moved()
        assert equal(narrow, train("single", 1, TINY, 5), torch.int64)
        assert equal(narrow, train("single", 1, TINY, 5, prepare=pack_weights), torch.int64)
        packed = prune_(tiny_llama())
        pack_weights(packed)
        seft = SeftOptimizer(packed, dataclasses.replace(TINY, init="random"))
        seft.attach()
        assert all(len(indices) and indices.dtype == torch.int64 for indices in seft.sparse_state.memory_indices)
        model = prune_(tiny_llama())
        seft = SeftOptimizer(model, TINY)
        latest = checkpoint.latest(tmp_path)
        assert latest
        checkpoint.load(seft, latest)
        for layer in seft.deltas():
            assert layer.window is not None and layer.window.positions is not None
            types = {each.dtype for each in (layer.columns.indices, layer.committed, layer.window.positions)}
            assert types == {torch.int64} and layer.columns.age.dtype == torch.int32
        return snapshot(model, seft)

    on_two, on_one = run_ranks(on_rank, 2)[0], run_ranks(alone, 1)[0]
    for name, layer in on_two.items():
        assert all(torch.equal(value, on_one[name][key]) for key, value in layer.items())


def test_a_delta_file_holds_positions_of_64_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base = torch.tensor([0.0, 1.0, 2.0, 0.0] * 20).bfloat16()
    repaired = base.clone()
    repaired[[0, 1, 78]] = torch.tensor([3.0, 0.0, 4.0]).bfloat16()
    for border, kind in ((1 << 31, torch.int32), (BORDER, torch.int64)):
        monkeypatch.setattr(partition, "_END_OF_INT32", border)
        writer, file = DeltaWriter(torch.bfloat16), tmp_path / str(border)
        writer.add("a", base, repaired)
        writer.close(file)
        delta, weight = read_delta(file), base.clone()
        assert {delta.tensors[f"a.{what}"].dtype for what in ("changed", "reactivated", "pruned")} == {kind}
        delta.change("a", weight)
        assert torch.equal(weight, repaired)
        delta.change("a", weight)
        assert torch.equal(weight, base)


def test_the_border_and_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [position_dtype(numel) for numel in (2**31 - 1, 2**31)] == [torch.int32, torch.int64]
    monkeypatch.setattr(partition, "_END_OF_INT32", 5)
    positions = torch.tensor([0, 1, 2, 9, 10], dtype=torch.int32)
    whole, few = Support((3, 4), [positions]), Support((3, 4), [positions[:4]])
    assert (whole.crow.dtype, few.crow.dtype, whole.col.dtype) == (torch.int64, torch.int32, torch.int32)
    assert all(block.crow.dtype == torch.int32 for block in whole.blocks(3))  # of experts, which are smaller
    assert torch.equal(whole.crow, torch.tensor([0, 3, 3, 5])) and torch.equal(whole.positions(), positions.long())
    monkeypatch.setattr(partition, "_END_OF_INT32", 48)
    with pytest.raises(ValueError, match="down_proj.weight has 48 columns: needs fewer than 2.31; leave the layer out"):
        SeftOptimizer(prune_(tiny_llama())).attach()


EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


def test_ranks_of_a_layer_of_deepseek_v3_without_values() -> None:
    config = find_architecture("DeepSeek-V3")
    config.num_hidden_layers, config.first_k_dense_replace = 1, 0
    numel, chunk = 256 * 4096 * 7168, 256 * 4096 * 7168 // 64
    assert numel > 2**32
    for packed in (False, True):
        dist.init_process_group("fake", rank=63, world_size=64, store=FakeStore())
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            targets = find_targets(model)
            if packed:
                pack_weights(model)
            else:
                fully_shard(model)
            backend = find_backend(model, targets, None)
        finally:
            dist.destroy_process_group()
        i = backend.names.index(EXPERTS)
        assert backend.position_dtype == torch.int64 and backend.partitions[i] == Partition(numel, chunk, 64)
        assert backend.interval(i) == Interval(numel - chunk, numel)
        assert packed or backend.own(i).shape == (chunk,)
        target = {"name": EXPERTS, "shape": list(backend.shapes[i]), "chunk": chunk, "target": numel, "fingerprint": 1}
        manifest = {"format_version": 1, "num_steps": 1, "method": {}, "world_size": 64, "backend": "fsdp", "dtype": ""}
        manifest |= {"window_steps": None, "targets": [target], "extra": {}, "sha256": [""] * 64}
        assert check_manifest(manifest, "checkpoint.json")["targets"] == [target]


def test_plans_count_positions_of_64_bits() -> None:
    def terms(rows: int) -> dict[str, float]:
        shapes = ModelShapes(
            tiny_llama().config, [ParameterShape("a", (rows, 1 << 16), (rows, 1 << 16), 0)], [()], 0, 0
        )
        config = PlanConfig(model="x", seft=moving(density=0.01, window=2, window_store="candidates"))
        memory = seft_memory(config, shapes, Layout("fsdp", 1, 1, packing="resident"), PassCost(*[0.0] * 8), 0.0)
        numel = rows << 16
        found = memory.resident | memory.phases["window of candidates"]
        names = ("own deltas, moments, ages", "memory indices of own deltas", "positions of all deltas")
        return {name: found[name] / numel * 100 for name in (*names, "window: candidates, own sums")}

    small, large = terms((1 << 15) - 1), terms(1 << 15)
    assert list(small.values()) == pytest.approx([24, 4, 4, 3 * 12], rel=0.01)
    assert list(large.values()) == pytest.approx([28, 8, 4, 3 * 16], rel=0.01)
