"""Plans against what really happens: bytes counted, shards made by fully_shard, memory of ranks that train."""

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, LlamaConfig

from seft_dist.backends.shards import fsdp_mesh, shard_fsdp, stored_part
from seft_dist.config import ClusterConfig, PlanConfig, SeftConfig
from seft_dist.io.models import decoder_layers
from seft_dist.optim.optimizer import SeftOptimizer
from seft_dist.planning.architectures import Shapes, find_architecture
from seft_dist.planning.hardware import Rates
from seft_dist.planning.layout import Held, Layout
from seft_dist.planning.plan import choose, make_plan
from tests.models import batch, prune_, tiny_llama
from tests.ranks import return_freed_memory, run_ranks

RATES = Rates("test", 1e18, 0, 1e12, 1e12, 1e12, 1e12, None, 0.0, 1e9, 1e-9, 1e-9, 1e9, 1e9, 1e9, False, False, True)


def planned(folder: Path, model: Any, ranks: int, **over: Any) -> PlanConfig:
    model.config.save_pretrained(folder)
    settings: dict[str, Any] = {"seq_len": 16, "batch_size": 2, "steps": 8, "global_batch": None, "dtype": "float32"}
    cluster = ClusterConfig(nodes=1, gpus_per_node=ranks, fragmentation=0)
    return PlanConfig(model=str(folder), activation_checkpointing=False, cluster=cluster, **(settings | over))


@pytest.mark.parametrize("held", ["fsdp", "ddp"])
def test_planned_bytes_are_those_that_are_sent(held: Held, tmp_path: Path) -> None:
    seft_config = SeftConfig(density=0.05, interval=3, window=1, steps=8, end=3, selection="radix")
    config = planned(tmp_path, tiny_llama(hidden_size=64, intermediate_size=128), 2, seft=seft_config)
    time = choose(make_plan(config, RATES), held, 2).time

    def on_rank(rank: int, world: int) -> list[list[int]]:
        model = prune_(tiny_llama(hidden_size=64, intermediate_size=128))
        if held == "fsdp":
            shard_fsdp(model, decoder_layers(model), fsdp_mesh(torch.device("cpu"), 1), False, set())
        seft = SeftOptimizer(model, seft_config)
        found = []
        for step in range(4):
            before = seft.backend.bytes_sent if step else 0
            model(**batch(step, rank)).loss.backward()
            seft.step()
            seft.zero_grad()
            phases = {} if seft.evolution is None else seft.evolution.phases
            ranked = sum(phase.bytes_sent for name, phase in phases.items() if name != "window")
            found.append([seft.backend.bytes_sent - before, phases["window"].bytes_sent if phases else 0, ranked])
        return found

    steps = run_ranks(on_rank, 2)[0]
    ordinary, evolving = steps[1], steps[2]
    sent = {sent.what: sent.intra + sent.inter for sent in (*time.sent_step, *time.sent_window, *time.sent_evolution)}
    step = sent["gradients of deltas"] + sent.get("new weights", 0)
    assert ordinary[0] == pytest.approx(step, rel=0.05, abs=2000)  # norms, and whether every gradient is finite
    assert evolving[1] == pytest.approx(sent["dense gradients"], rel=0.01)
    evolution = sent["rankings"] + sent["positions of all deltas"] + sent.get("changes of weights", 0)
    assert evolving[2] == pytest.approx(evolution, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [8, 64, 768])
def test_shards_of_the_whole_70b_are_the_planned_ones(ranks: int) -> None:
    shapes = Shapes.of(find_architecture("Llama-2-70B"), "all-linear")
    layout, seen = Layout("fsdp", ranks, 8), {}
    for rank in (0, ranks // 2, ranks - 1):
        dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(shapes.config)
            shard_fsdp(model, decoder_layers(model), fsdp_mesh(torch.device("cpu"), 1), False, set())
            held = {name: p.to_local().numel() for name, p in model.named_parameters() if isinstance(p, DTensor)}
        finally:
            dist.destroy_process_group()
        seen[rank] = sum(held[weight.name] for weight in shapes.targets)
        assert all(held[weight.name] <= layout.own(weight) for weight in shapes.weights)
    assert seen[0] == sum(map(layout.own, shapes.targets))
    assert (seen[ranks - 1] == 0) == (layout.empty_ranks(shapes) > 0)
    assert layout.skew(shapes) == pytest.approx(seen[0] * ranks / shapes.target_numel)


def peak_of(config: PlanConfig, held: Held, ranks: int) -> float:
    """Largest growth of a rank's resident set, in bytes."""

    def train(settings: LlamaConfig, length: int, rank: int) -> None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
        if held == "fsdp":
            shard_fsdp(model, decoder_layers(model), fsdp_mesh(torch.device("cpu"), 1), False, set())
        model.to_empty(device="cpu")
        model.model.rotary_emb.inv_freq.copy_(type(model.model.rotary_emb)(settings).inv_freq)
        for parameter in model.parameters():
            part, _ = stored_part(parameter)
            for chunk in part.detach().split(1 << 18):
                chunk.normal_(std=0.02).masked_fill_(torch.rand_like(chunk) < config.sparsity, 0)
        model.config.use_cache = False
        seft = SeftOptimizer(model, config.seft)
        for _ in range(config.steps):
            ids = torch.randint(0, settings.vocab_size, (config.batch_size, length))
            model(input_ids=ids, labels=ids).loss.backward()
            seft.step()
            seft.zero_grad()

    def on_rank(rank: int, world: int) -> float:
        return_freed_memory()
        whole = LlamaConfig.from_pretrained(config.model)
        small = LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2
        )
        train(small, 16, rank)  # what a first step loads is not counted
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        train(whole, config.seq_len, rank)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - pages * resource.getpagesize()

    return max(run_ranks(on_rank, ranks, timeout=280))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("held", "ranks"), [("ddp", 1), ("fsdp", 2)])
def test_planned_memory_is_within_a_tenth_of_a_real_run(held: Held, ranks: int, tmp_path: Path) -> None:
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=8000, **shape))
    config = planned(
        tmp_path, model, ranks, batch_size=1, seq_len=128, steps=3, seft=SeftConfig(interval=2, window=2, end=2)
    )
    expected = choose(make_plan(config, RATES), "single" if ranks == 1 else held, ranks).memory.total
    measured = peak_of(config, held, ranks)
    print(f"planned {expected / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB")
    assert measured == pytest.approx(expected, rel=0.1)
