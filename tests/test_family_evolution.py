"""Swaps of Conv1D and fused experts: as of the linears that they stand for, and the same on every layout."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import tests.preload  # noqa: F401
from seft_dist import ParentModel, SeftConfig, SeftOptimizer
from seft_dist.config import ModelConfig, PruneConfig
from seft_dist.io import checkpoint
from seft_dist.modules.experts import is_experts
from seft_dist.modules.targets import find_targets
from seft_dist.pruning.prune import prune_folder
from tests.families import family_folder, family_model
from tests.layouts import build
from tests.models import VOCAB, Parent, batch, prune_
from tests.ranks import run_ranks
from tests.runs import digests, ds_file, run_config, run_train
from tests.texts import text_jsonl

STEPS = 9
CONFIG = SeftConfig(
    density=0.0625, interval=4, window=2, steps=STEPS, end=8, swap_fraction=0.03125, swap_end=8, scope="global"
)
"""Shares that are whole numbers of positions in every weight here, in fused ones and in those of their experts."""
MOVING: dict[str, Any] = {"swap_fraction": 0.0, "reactivation": 1.0, "adapt": "curvature"}


class SeparateExperts(nn.Module):
    """What a module of fused experts computes, with one linear for each expert and projection."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.gate = [fused._apply_gate]  # a list, so that the fused module is no part of this one
        for key in ("gate_up_proj", "down_proj"):
            linears = []
            for weight in getattr(fused, key).detach():
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                linear.weight.data.copy_(weight)
                linears.append(linear)
            setattr(self, key, nn.ModuleList(linears))

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = hidden.new_zeros(*top_k_index.shape, hidden.shape[-1])
        linears: Any = (self.gate_up_proj, self.down_proj)
        for expert, (up, down) in enumerate(zip(*linears, strict=True)):
            tokens, slots = (top_k_index == expert).nonzero(as_tuple=True)
            out = out.index_put((tokens, slots), down(self.gate[0](up(hidden[tokens]))))
        return (out * top_k_weights.unsqueeze(-1)).sum(1)


def with_separate_experts(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if is_experts(child):
                setattr(module, name, SeparateExperts(child))
    return model


def with_linears(model: nn.Module) -> nn.Module:
    """Replace every Conv1D by the linear that computes the same."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Conv1D):
                linear = nn.Linear(*child.weight.shape)
                linear.weight.data.copy_(child.weight.T)
                linear.bias.data.copy_(child.bias)
                setattr(module, name, linear)
    return model


def steps_of(model: nn.Module, seft: SeftOptimizer, last: int) -> None:
    while seft.num_steps < last:
        model(**batch(seft.num_steps)).loss.backward()
        seft.step()
        seft.zero_grad()


def as_linears(model: nn.Module) -> dict[str, Tensor]:
    """The weights of all targets as [out, in], those of experts one by one, by the names of ``SeparateExperts``."""
    weights = {}
    for name, target in find_targets(model).items():
        rows = target.as_rows()
        if target.num_experts == 1:
            weights[name] = rows
        else:
            weights |= {f"{name}.{e}": part for e, part in enumerate(rows.chunk(target.num_experts))}
    return weights


@pytest.mark.parametrize(("family", "split"), [("mixtral", with_separate_experts), ("gpt2", with_linears)])
def test_they_swap_as_the_linears_that_they_stand_for(family: str, split: Any) -> None:
    """With a learning rate of 0 the supports, which have other budgets, change no weight."""
    dense, model = family_model(family), prune_(family_model(family))
    before = {name: weight.clone() for name, weight in as_linears(model).items()}
    twin, twin_parent = split(prune_(family_model(family))), Parent(split(family_model(family)))
    for each, parent in ((model, Parent(dense)), (twin, twin_parent)):
        steps_of(each, SeftOptimizer(each, CONFIG, lr=0.0, parent=parent), STEPS)
    found, wanted = as_linears(model), as_linears(twin)
    assert found.keys() == wanted.keys() and any(not torch.equal(found[name], before[name]) for name in found)
    for name, weight in found.items():
        assert torch.equal(weight, wanted[name]), name


def silent_mixture() -> tuple[Any, str]:
    """A mixture whose third expert gets no token, and the start of its experts' names."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 1, "vocab_size": VOCAB}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", initializer_range=0.1, **sizes))
    router = model.model.layers[0].mlp.gate.weight.data
    router[1], router[2] = -router[0], 0
    return model, "model.layers.0.mlp.experts"


def test_an_expert_whose_tokens_the_loss_does_not_see_keeps_its_positions() -> None:
    model, experts = silent_mixture()
    parent = Parent(model)
    fused: Any = prune_(model).get_submodule(experts)
    before = (fused.down_proj != 0).clone()
    seft = SeftOptimizer(model, dataclasses.replace(CONFIG, targets="down_proj"), lr=0.0, parent=parent)
    chosen: list[Tensor] = []
    fused.register_forward_pre_hook(lambda _, args: chosen.append(args[1].flatten()))
    while seft.num_steps < 4:
        chosen.clear()
        tokens = batch(seft.num_steps)
        with torch.no_grad():
            model(**tokens)
        of_second = (chosen[0] == 1).view(tokens["labels"].shape)
        labels = tokens["labels"].clone()
        labels[:, 1:][of_second[:, :-1]] = -100  # what the second expert's tokens predict
        model(input_ids=tokens["input_ids"], labels=labels).loss.backward()
        seft.step()
        seft.zero_grad()
    after = fused.down_proj != 0
    assert torch.equal(after[1:], before[1:]) and not torch.equal(after[0], before[0])


def test_an_expert_whose_inputs_are_zero_is_not_without_tokens() -> None:
    """Its weights are worth nothing, so they leave first."""
    model, experts = silent_mixture()
    parent = Parent(model)
    fused: Any = prune_(model).get_submodule(experts)
    fused.gate_up_proj.data[0] = 0  # the first expert's second projection sees zeros
    before = (fused.down_proj != 0).sum((1, 2))
    seft = SeftOptimizer(model, dataclasses.replace(CONFIG, targets="down_proj"), lr=0.0, parent=parent)
    steps_of(model, seft, 4)
    after = (fused.down_proj != 0).sum((1, 2))
    assert after[0] < before[0] and after[2] == before[2] and after.sum() == before.sum()


@pytest.mark.parametrize(
    "over",
    [
        {},
        {"window_store": "factored"},
        MOVING,
        MOVING | {"adapt": "activation"},
    ],
)
def test_an_expert_without_tokens_keeps_its_positions(over: dict[str, Any]) -> None:
    model, experts = silent_mixture()
    parent = Parent(model)
    prune_(model)
    before = {name: weight.clone() for name, weight in as_linears(model).items()}
    config = dataclasses.replace(CONFIG, scope="layer", **over)
    seft = SeftOptimizer(model, config, lr=1e-2, parent=parent if config.swap_fraction else None)
    seft.counts_near_ties = True
    seft.attach()
    zeros = [layer.zeros for layer in seft.sparsity()]
    steps_of(model, seft, STEPS)
    assert [layer.zeros for layer in seft.sparsity()] == zeros
    for name, weight in as_linears(model).items():
        if name.startswith(experts):
            same = torch.equal(weight != 0, before[name] != 0)
            assert same == name.endswith(".2"), name


def test_sums_of_a_window_are_those_of_each_expert() -> None:
    model = prune_(family_model("mixtral"))
    twin = with_separate_experts(prune_(family_model("mixtral")))
    config = dataclasses.replace(CONFIG, **MOVING, init="random")  # a first support would be chosen in each weight
    fused, separate = (SeftOptimizer(each, config, lr=0.0) for each in (model, twin))
    for each, seft in ((model, fused), (twin, separate)):
        steps_of(each, seft, 3)  # the window of step 4 has begun
    windows = dict(zip(separate.target_names, separate._windows, strict=True))
    compared = 0
    for name, window in zip(fused.target_names, fused._windows, strict=True):
        assert window is not None and window.norms is not None and window.outputs is not None
        if "experts" in name:
            for expert, (norms, outputs) in enumerate(zip(window.norms.chunk(3), window.outputs.chunk(3), strict=True)):
                other = windows[f"{name}.{expert}"]
                assert other is not None and other.norms is not None and other.outputs is not None
                torch.testing.assert_close(norms, other.norms)
                torch.testing.assert_close(outputs, other.outputs)
                compared += 1
    assert compared == 12


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_sums_of_a_window_are_the_same_on_several_ranks(family: str) -> None:
    """Each of them, not only their product: a window may begin on one layout and end on another."""
    config = dataclasses.replace(CONFIG, init="random")

    def sums(rank: int, size: int) -> list[Tensor]:
        model, parent = prune_(family_model(family)), Parent(family_model(family))
        called, seft, backward, step = build("ddp" if size > 1 else "single", config, model, parent=parent, lr=0.0)
        for t in range(3):  # the window of step 4 has begun
            parts = [batch(t, rank)] if size > 1 else [batch(t, 0), batch(t, 1)]
            backward(called(**{key: torch.cat([part[key] for part in parts]) for key in parts[0]}).loss)
            step()
        return [window.summed(name) for window in seft._windows if window is not None for name in window.sums]

    alone, many = run_ranks(sums, 1)[0], run_ranks(sums, 2)[0]
    assert len(alone) == len(many) > 0
    for one, other in zip(alone, many, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("store", ["full", "factored"])
@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_a_checkpoint_inside_a_window_goes_on_bit_for_bit(family: str, store: Any, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, window_store=store)
    parent = Parent(family_model(family))
    models = [prune_(family_model(family)) for _ in range(3)]
    whole, first, second = (SeftOptimizer(model, config, lr=1e-2, parent=parent) for model in models)
    steps_of(models[0], whole, STEPS)
    steps_of(models[1], first, 7)  # inside the window of step 8
    checkpoint.load(second, checkpoint.save(first, tmp_path, {}))
    steps_of(models[2], second, STEPS)
    for name, weight in models[0].state_dict().items():
        assert torch.equal(weight, models[2].state_dict()[name]), name


@pytest.fixture(scope="module", params=["mixtral", "gpt2"])
def inputs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, its pruned form, and text."""
    folder = tmp_path_factory.mktemp(request.param)
    family_folder(folder / "dense", request.param)
    model = ModelConfig(path=str(folder / "dense"))
    prune_folder(PruneConfig(model=model, output=str(folder / "pruned"), method="magnitude"), progress=False)
    text_jsonl(folder / "text.jsonl")
    return folder


def test_parts_of_a_parent_are_read(inputs: Path) -> None:
    """Also of fused experts, which the files hold one by one."""
    parent = ParentModel.open(str(inputs / "dense"))
    model = AutoModelForCausalLM.from_pretrained(inputs / "dense")
    targets = find_targets(model)
    parent.check({name: tuple(target.weight.shape) for name, target in targets.items()})
    for name, target in targets.items():
        whole = target.weight.detach().view(-1)
        for start, stop in ((0, len(whole)), (5, 6), (31, len(whole) // 2 + 7)):
            assert torch.equal(parent.read(name, start, stop), whole[start:stop]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "world_size", "over"),
    [
        ("fsdp", 2, {"scope": "layer"}),
        ("fsdp", 4, {}),  # with three experts, one rank owns none
        ("fsdp", 2, {"packing": "resident"}),
        ("zero3", 3, {}),
        pytest.param("zero2", 2, {"window_store": "factored"}, marks=pytest.mark.long),
        pytest.param("fsdp", 2, MOVING, marks=pytest.mark.long),
        pytest.param("fsdp", 4, {"replicas": 2}, marks=pytest.mark.long),
        pytest.param("fsdp", 2, {"offload": True}, marks=pytest.mark.long),
    ],
)
def test_every_layout_chooses_the_same(
    inputs: Path, layout: str, world_size: int, over: dict[str, Any], tmp_path: Path
) -> None:
    of_the_layout = {key: over[key] for key in over if key in ("packing", "replicas", "offload")}
    seft = dataclasses.replace(CONFIG, steps=None, end=None, **{} if of_the_layout else over)
    given: dict[str, Any] = {"seft": seft, "steps": STEPS, "global_batch": 12}
    given["parent"] = str(inputs / "dense") if seft.swap_fraction else None
    stage = layout.removeprefix("zero")
    if stage != layout:
        of_the_layout["deepspeed"] = ds_file(tmp_path, {"zero_optimization": {"stage": int(stage)}})
    alone = run_train(run_config(inputs, tmp_path / "alone", **given, batch_size=12))
    of_the_layout["batch_size"] = 12 // world_size
    many = run_train(run_config(inputs, tmp_path / "many", **given, **of_the_layout), world_size)
    assert many["reactivated"] == alone["reactivated"] > 0
    assert many["sparsity"]["final"] == pytest.approx(alone["sparsity"]["target"], rel=1e-12)
    assert digests(tmp_path / "many") == digests(tmp_path / "alone")
    manifest = json.loads((tmp_path / "many" / "manifest.json").read_text())
    assert bool(manifest.get("parent")) == bool(given["parent"])
