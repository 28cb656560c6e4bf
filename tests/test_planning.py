"""Plans: published sizes, terms that add up, real options, errors that say what to change."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seft_dist.config import ClusterConfig, PlanConfig, SeftConfig, TrainConfig
from seft_dist.planning.architectures import ARCHITECTURES, ModelShapes, find_architecture
from seft_dist.planning.commands import submit_line, train_options
from seft_dist.planning.hardware import Rates, gpu_rates, read_rates, write_rates
from seft_dist.planning.layout import Layout, possible_layouts
from seft_dist.planning.memory import seft_memory
from seft_dist.planning.model_trace import PassCost, _Meter, trace_pass
from seft_dist.planning.plan import ClusterPlan, estimate, make_plan
from seft_dist.planning.report import render, to_json
from seft_dist.session.cli import parse
from tests.families import family_model
from tests.models import moving, tiny_llama

ROOT = Path(__file__).parents[1]

PUBLISHED = {
    "Llama-2-7B": 6_738_415_616,
    "Llama-2-13B": 13_015_864_320,
    "Llama-2-70B": 68_976_648_192,
    "Llama-3-8B": 8_030_261_248,
    "Llama-3-70B": 70_553_706_496,
    "Mistral-7B": 7_241_732_096,
    "Qwen2.5-72B": 72_706_203_648,
    "DeepSeek-V3": 671_026_419_200 - 58 * 256,  # without the routers' biases, which are buffers
}
"""Parameters of the published checkpoints."""


@pytest.fixture(scope="module")
def plan70() -> ClusterPlan:
    return make_plan(PlanConfig(model="Llama-2-70B"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_architectures_have_their_published_size(name: str) -> None:
    assert set(PUBLISHED) == set(ARCHITECTURES)
    assert ModelShapes.of(find_architecture(name), "all-linear").numel == PUBLISHED[name]


def small(layers: int, **over: Any) -> Any:
    return tiny_llama(num_hidden_layers=layers, hidden_size=64, intermediate_size=160, vocab_size=512, **over)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trace_of_few_layers_is_what_all_layers_really_need(checkpoint: bool, dtype: torch.dtype) -> None:
    """The trace is compared with the same meter around real tensors of the whole model."""
    from seft_dist.io.models import checkpoint_activations
    from seft_dist.modules.targets import find_targets
    from seft_dist.optim.install import install

    model = small(7).to(dtype).train()
    kinds = ModelShapes.of(model.config, "all-linear").kinds
    expected = trace_pass(model.config, kinds, dtype, 2, 48, checkpoint)
    if checkpoint:
        checkpoint_activations(model)
    model.requires_grad_(False)
    for target in find_targets(model).values():
        install(target)
    ids = torch.zeros(2, 48, dtype=torch.long)
    meter = _Meter([*model.parameters(), *model.buffers(), ids])
    model.model.layers[-1].register_forward_hook(meter.watch("head"))
    model.model.layers[0].register_forward_hook(meter.watch("layers"))
    with meter:
        loss = model(input_ids=ids, labels=ids).loss
        saved = meter.live
        loss.backward()
    assert saved == pytest.approx(expected.saved, rel=0.01)
    assert meter.part["head"] == pytest.approx(expected.head, rel=0.01)
    assert max(*meter.part.values(), meter.peak) == pytest.approx(expected.peak, rel=0.01)
    assert meter.peak == pytest.approx(expected.first, rel=0.01)
    assert meter.matmul == pytest.approx(expected.matmul, rel=1e-6)
    assert meter.attention == pytest.approx(expected.attention, rel=1e-6)


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "qwen3_moe", "deepseek_v3"])
def test_other_families_can_be_planned(family: str, tmp_path: Path) -> None:
    family_model(family).config.save_pretrained(tmp_path)
    plan = make_plan(
        PlanConfig(model=str(tmp_path), seq_len=16, cluster=ClusterConfig(nodes=1), global_batch=None, steps=100)
    )
    assert plan.best is not None and plan.cost.saved > 0 and plan.best.time.hours > 0


def test_each_expert_has_sums_of_its_own() -> None:
    """Four experts of 2 x 16 and 32 outputs, two layers, and what is no expert."""
    model = family_model("qwen3_moe")
    shapes = ModelShapes.of(model.config, "experts")
    assert shapes.window_sums == 2 * 4 * ((2 * 16 + 32) + (32 + 16))
    whole = ModelShapes.of(model.config, "all-linear")
    others = sum(sum(weight.shape) for weight in whole.targets if len(weight.shape) == 2)
    assert whole.window_sums == shapes.window_sums + others


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["single", "ddp", "fsdp", "zero3", "zero2", "zero3_offload"]),
    ranks=st.one_of(st.sampled_from([1, 2, 4, 8]), st.integers(1, 700)),
    density=st.floats(1e-4, 0.3),
    window=st.integers(1, 3),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    work=st.builds(PassCost, *[st.floats(0, 1e10)] * 7),
)
def test_terms_add_up_and_grow_with_what_they_are_for(
    kind: Any, ranks: int, density: float, window: int, dtype: Any, work: PassCost
) -> None:
    shapes = ModelShapes.of(small(2).config, "all-linear")
    config = PlanConfig(model="x", dtype=dtype, seft=moving(density=density, interval=5, window=window))
    layout = Layout(kind, ranks, 8)
    memory = seft_memory(config, shapes, layout, work, 3e9)
    assert sum(memory.terms().values()) == pytest.approx(memory.total)
    assert all(size >= 0 for size in memory.terms().values())
    more = dataclasses.replace(config, seft=dataclasses.replace(config.seft, density=density + 0.05))
    assert seft_memory(more, shapes, layout, work, 3e9).total > memory.total
    if layout.sharded and ranks in (1, 2, 4, 8):  # with more ranks, or odd numbers, what pads a gathered layer may grow
        assert seft_memory(config, shapes, Layout(kind, 2 * ranks, 8), work, 3e9).total <= memory.total * 1.01


def test_the_plan_of_70b_names_every_term(plan70: ClusterPlan) -> None:
    fsdp = estimate(plan70, "fsdp", 64)
    terms = fsdp.memory.terms()
    assert terms["base weights"] == pytest.approx(2 * PUBLISHED["Llama-2-70B"] / 64, rel=1e-3)
    assert terms["masks"] == pytest.approx(68_451_041_280 / 64 / 8, rel=1e-3)
    assert terms["own deltas, moments, ages"] == pytest.approx(24 * 684_510_413 / 64, rel=1e-3)
    assert terms["gathered embeddings, head"] == pytest.approx(2 * 2 * 32000 * 8192, rel=1e-3)
    assert 30e9 < fsdp.memory.total < 33e9
    assert plan70.best is not None and plan70.best.fits
    assert not estimate(plan70, "ddp", 64).fits


def test_the_printed_options_are_real(plan70: ClusterPlan) -> None:
    """`seft train`'s own parser reads them, and they say what was planned."""
    seft = moving(density=0.02, interval=10, window=3, static=False, reactivation=0.25, pattern="2:4")
    config = dataclasses.replace(plan70.config, seft=seft)
    seen = set()
    for size in (1, 8, 16, 64):
        for layout in possible_layouts(config.cluster, size):
            read = parse(TrainConfig, [*train_options(config, layout), "--output", "runs/x"])
            assert read.seft == seft
            assert (read.steps, read.global_batch, read.data.seq_len) == (1000, 128, 4096)
            assert read.model.activation_checkpointing and read.model.dtype == "bfloat16"
            assert read.replicas == layout.replicas
            assert read.deepspeed is None or (ROOT / read.deepspeed).is_file()
            seen.add(layout.kind)
    assert len(seen) == 9
    line = submit_line(config, Layout("fsdp", 16, 8))
    assert line.startswith("sbatch --nodes 2 --gpus-per-node 8 slurm/train_srun.sbatch --model.path ")
    assert (ROOT / "slurm" / "train_srun.sbatch").is_file()


def test_tables_and_json_of_a_plan(plan70: ClusterPlan) -> None:
    from rich.console import Console

    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(plan70))
    text = console.export_text()
    assert "…" not in text and "hsdp x2" in text and "LoRA r=16" in text
    assert "never run on a GPU" in " ".join(text.split())
    content = json.loads(to_json(plan70))
    assert content["recommended"] == content["layouts"][0] == content["methods"]["SEFT"]
    assert len(content["layouts"]) == len(plan70.estimates)


def test_full_fine_tuning_needs_more_than_lora_and_seft_less_traffic(plan70: ClusterPlan) -> None:
    full, lora, seft = (estimate(plan70, "fsdp", 64, method) for method in ("full", "LoRA", "SEFT"))
    assert full.memory.total > lora.memory.total
    assert full.time.seconds > seft.time.seconds
    assert full.memory.resident["optimizer states"] == pytest.approx(12 * PUBLISHED["Llama-2-70B"] / 64)


def test_only_peers_keep_the_inputs_of_their_linears() -> None:
    """A Llama keeps the outputs of two norms and the gated product; the input of o_proj is kept by attention anyway."""
    config = PlanConfig(model="Llama-2-7B", seq_len=512, batch_size=2, activation_checkpointing=False)
    plan = make_plan(config)
    inputs = 2 * 2 * 512 * 32 * (2 * 4096 + 11008)
    assert plan.peer_cost.saved - plan.cost.saved == pytest.approx(inputs, rel=0.05)
    assert plan.peer_cost.matmul == plan.cost.matmul
    checkpointed = make_plan(dataclasses.replace(config, activation_checkpointing=True))
    assert checkpointed.peer_cost == checkpointed.cost


def test_errors_say_what_to_change(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model=Lama-2-70B is neither.*Llama-2-70B"):
        make_plan(PlanConfig(model="Lama-2-70B"))
    with pytest.raises(ValueError, match="reads at most 4096 tokens"):
        make_plan(PlanConfig(model="Llama-2-7B", seq_len=8192))
    with pytest.raises(ValueError, match="cluster.gpu=B300 is neither one of H100-80GB"):
        make_plan(PlanConfig(model="Llama-2-7B", cluster=ClusterConfig(gpu="B300")))
    with pytest.raises(ValueError, match="cluster.nodes=0"):
        ClusterConfig(nodes=0)
    with pytest.raises(ValueError, match="no more deltas than active weights"):
        PlanConfig(model="Llama-2-7B", sparsity=0.995)
    with pytest.raises(ValueError, match="last evolution"):
        make_plan(PlanConfig(model="Llama-2-7B", steps=60, seft=moving(end=60)))
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(ValueError, match="knows no model_type 'unheard-of'"):
        make_plan(PlanConfig(model=str(tmp_path)))


def test_what_fits_nowhere_says_what_would() -> None:
    plan = make_plan(PlanConfig(model="Llama-3-70B", cluster=ClusterConfig(nodes=1, gpu="A100-40GB")))
    assert plan.best is None
    assert "GB too many" in plan.advice[0]
    nodes = next(int(text.split()[1]) for text in plan.advice if text.startswith("--cluster.nodes"))
    bigger = make_plan(PlanConfig(model="Llama-3-70B", cluster=ClusterConfig(nodes=nodes, gpu="A100-40GB")))
    assert bigger.best is not None


def test_advice_counts_a_shared_memory_once_and_offers_only_what_is_possible() -> None:
    cpu = Rates("cpu", 8e9, 1e9, 1e12, 1e12, 1e12, 1e12, 1e10, 1e-5, 1e10, 1e-9, 1e-9, 1e9, 1e9, 1e9, False, True, True)
    small = ClusterConfig(nodes=1, gpu="cpu", gpus_per_node=2)
    for seft in (SeftConfig(density=0.05), SeftConfig(density=0.05, grow="momentum")):  # needs the gradient itself
        config = PlanConfig(model="Llama-3-8B", cluster=small, seft=seft, dtype="float32")
        plan = make_plan(config, cpu)
        assert plan.best is None and "GB too many" in plan.advice[0] and ": -" not in plan.advice[0]
        assert not any("would fit" in text for text in plan.advice if not text.startswith("--cluster.nodes"))
        assert seft.grow != "momentum" or not any("factored" in text for text in plan.advice)


def test_a_first_support_by_gradient_is_planned_for() -> None:
    random: dict[str, Any] = {"grow": "random", "drop": "random", "adapt": "magnitude"}
    plans = {
        init: make_plan(PlanConfig(model="Llama-2-7B", seft=SeftConfig(**random, init=init), steps=200))
        for init in ("random", "gradient")
    }
    phases = {init: plan.estimates[0].memory.phases for init, plan in plans.items()}
    assert "window" in phases["gradient"] and "window" not in phases["random"]
    assert (plans["gradient"].estimates[0].time.windows, plans["random"].estimates[0].time.windows) == (1, 0)


def test_a_mask_that_moves_is_planned_twice_for_packed_weights() -> None:
    shapes, work = ModelShapes.of(small(2).config, "all-linear"), PassCost(*[0.0] * 8)
    extra = {}
    for reactivation in (0.0, 0.5):
        config = PlanConfig(model="x", seft=moving(interval=5, reactivation=reactivation))
        for packing in ("none", "resident"):
            memory = seft_memory(config, shapes, Layout("fsdp", 2, 8, packing=packing), work, 0.0)
            extra[reactivation, packing] = memory.phases["evolution"].get("masks before the evolution", 0.0)
    assert extra.pop((0.5, "resident")) == memory.resident["masks"] > 0
    assert set(extra.values()) == {0}


def test_measured_rates_are_kept_and_shared_by_ranks(tmp_path: Path) -> None:
    rates = Rates(
        "cpu", 8e9, 1e9, 1e12, 1e12, 1e12, 1e12, 1e10, 1e-5, 1e10, 1e-9, 1e-9, 1e9, 1e9, 1e9, False, True, True
    )
    file = tmp_path / "rates.json"
    write_rates(str(file), {"float32": rates, "bfloat16": rates})
    assert read_rates(str(file))["float32"] == rates
    assert rates.per_rank(4).matmul == rates.matmul / 4 and rates.per_rank(4).evolve == 4 * rates.evolve
    with pytest.raises(ValueError, match="needs a file written by"):
        read_rates(__file__)


def test_a_gradient_at_the_deltas_takes_at_most_the_time_of_the_dense_one() -> None:
    rates = gpu_rates(ClusterConfig(), "bfloat16", 0.01)
    assert rates.dense == rates.matmul == 989e12 * 0.4  # on tensor cores, as the products of a pass
    assert gpu_rates(ClusterConfig(), "float32", 0.01).dense == 67e12 * 0.4
    equal_at_2_percent = dataclasses.replace(rates, sampled=0.02 * rates.dense)
    times = {}
    for density in (0.01, 0.02, 0.05):
        config = PlanConfig(model="Llama-2-7B", seft=SeftConfig(density=density))
        times[density] = make_plan(config, equal_at_2_percent).estimates[0].time
    sampled = {density: time.step["sampled gradients"] for density, time in times.items()}
    assert sampled[0.02] == pytest.approx(2 * sampled[0.01], rel=1e-3)
    assert sampled[0.05] == pytest.approx(sampled[0.02], rel=1e-3)
