"""Gradients that are exactly 0 and weights that round to 0: the number of zeros stays exact."""

import copy
import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from seft_dist import SeftOptimizer
from seft_dist.kernels import adamw
from seft_dist.kernels.adamw import AdamW
from seft_dist.optim.delta import Columns, least_size
from seft_dist.optim.notices import SeftWarning
from seft_dist.sparsity.bitmask import unpack
from seft_dist.sparsity.schedule import first_evolution
from seft_dist.training import trainer
from tests.layouts import build, snapshot
from tests.models import batch, moving, prune_, prune_groups_, tiny_llama
from tests.ranks import run_ranks
from tests.reference import DenseSeft
from tests.runs import make_config

CONFIG = moving(
    density=0.06, targets="q_proj|down_proj", interval=2, steps=8, end=7, drop_fraction=0.4, drop_schedule="constant"
)
DEAD, ALIVE = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"
FORMS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "half": {"reactivation": 0.5},
    "momentum": {"grow": "momentum"},
    "random": {"grow": "random"},
    "random_first": {"init": "random"},
    "bf16": {"window_store": "bf16", "window": 2},
    "candidates": {"window_store": "candidates", "window": 2},
    "factored": {"window_store": "factored"},
    "global": {"scope": "global"},
    "seeded": {"moments": "seeded"},
    "2:4": {"pattern": "2:4"},
}


@torch.no_grad()
def dead_model(pattern: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """A Llama whose first MLP always multiplies with 0: the input of its down_proj is 0, so is its gradient."""
    model = tiny_llama()
    model.get_submodule("model.layers.0.mlp.up_proj").weight.zero_()
    targets = "q_proj|down_proj"
    return (prune_groups_(model, pattern, targets) if pattern else prune_(model, pattern=targets)).to(dtype)


def train_(model: nn.Module, seft: Any, steps: int, called: Any = None, rank: int = 0) -> None:
    for t in range(steps):
        (called or model)(**batch(t, rank)).loss.backward()
        seft.step()
        seft.zero_grad()


@pytest.mark.filterwarnings("ignore:step 1. the gradient of 1 of 4 targets")
@pytest.mark.parametrize(
    ("form", "dtype"),
    [(form, torch.float32) for form in FORMS] + [(form, torch.bfloat16) for form in ("defaults", "random", "factored")],
)
def test_a_dead_layer_keeps_its_zeros(form: str, dtype: torch.dtype) -> None:
    config = dataclasses.replace(CONFIG, **FORMS[form])
    model = dead_model(config.known_pattern, dtype)
    seft = SeftOptimizer(model, config, lr=1e-2)
    weights = {name: model.get_submodule(name).weight for name in seft.target_names}
    before = {name: weight.clone() for name, weight in weights.items()}

    def zeros_of(found: dict[str, torch.Tensor]) -> list[int]:
        counts = [int((weight == 0).sum()) for weight in found.values()]
        return [sum(counts)] if config.scope == "global" else counts

    zeros = zeros_of(before)
    train_(model, seft, 7)
    assert zeros_of(weights) == zeros_of({name: weight.bfloat16() for name, weight in weights.items()}) == zeros
    layers = {layer.name: layer for layer in seft.sparsity()}
    assert all(layer.zeros == layer.numel - layer.mask_size == layer.numel - layer.active for layer in layers.values())
    assert layers[ALIVE].support > 0 and not torch.equal(before[ALIVE], weights[ALIVE])
    if form not in ("random", "random_first", "global"):  # where a score decides, it is 0 everywhere in the dead layer
        assert layers[DEAD].support == 0
        assert torch.equal(weights[DEAD], before[DEAD]), "nothing of it was moved"


@pytest.mark.filterwarnings("ignore:step 1. the gradient of 1 of 4 targets")
@pytest.mark.parametrize("form", ["defaults", "half", "momentum", "candidates", "factored", "2:4", "random_first"])
def test_the_reference_does_the_same(form: str) -> None:
    config = dataclasses.replace(CONFIG, **FORMS[form])
    model = dead_model(config.known_pattern)
    twin = copy.deepcopy(model)
    adam: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2}  # else the first deltas are all of one size, to rounding
    seft, dense = SeftOptimizer(model, config, **adam), DenseSeft(twin, config, **adam)
    for t in range(7):
        for net, optimizer in ((model, seft), (twin, dense)):
            net(**batch(t)).loss.backward()
            optimizer.step()
        seft.zero_grad()
        for layer in seft.deltas():
            oracle = dense.layers[layer.name]
            assert torch.equal(unpack(layer.mask, len(layer.interval)), oracle.mask.flatten()), (t, layer.name)
            assert torch.equal(layer.columns.indices.long(), oracle.support.flatten().nonzero().view(-1))


@pytest.mark.filterwarnings("ignore:step 1. the gradient of 1 of 4 targets")
def test_both_forms_of_selection_on_two_ranks_are_the_single_process() -> None:
    def on_rank(rank: int, world: int, layout: str, selection: Any) -> dict[str, Any]:
        model = dead_model()
        called, seft, _, _ = build(layout, dataclasses.replace(CONFIG, selection=selection), model, lr=1e-2)
        for t in range(5):
            data = {key: value[rank::world] for key, value in batch(t).items()}
            called(**data).loss.backward()
            seft.step()
            seft.zero_grad()
        return snapshot(model, seft)

    whole = run_ranks(on_rank, 1, "single", "auto")[0]
    assert not len(whole[DEAD]["support"]) and len(whole[ALIVE]["support"])
    for layout, selection in (("fsdp", "gather"), ("fsdp", "radix"), ("ddp", "radix")):
        found = run_ranks(on_rank, 2, layout, selection)[0]
        for name, layer in whole.items():
            for key in ("mask", "support"):
                assert torch.equal(layer[key], found[name][key]), (layout, selection, name, key)


class Unused(nn.Module):
    """A linear that no forward pass calls, beside one that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(16, 8, bias=False), nn.Linear(16, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x).square().sum()


@pytest.mark.filterwarnings("ignore:step 1. the gradient of 1 of 2 targets")
@pytest.mark.parametrize(
    "over", [FORMS[form] for form in ("defaults", "momentum", "random", "candidates", "factored", "seeded")]
)
def test_a_layer_that_is_never_called_keeps_its_zeros(over: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = prune_(Unused(), 0.5)
    config = dataclasses.replace(CONFIG, targets="all-linear", density=0.2, **over)
    seft = SeftOptimizer(model, config, lr=1e-2)
    for _ in range(7):
        model(torch.randn(4, 16)).backward()
        seft.step()
        seft.zero_grad()
    assert [layer.zeros for layer in seft.sparsity()] == [64, 64]


def columns_of(base: list[float], values: list[float]) -> Columns:
    columns = Columns.grown(torch.arange(len(base)), torch.tensor(base))
    columns.values = torch.tensor(values)
    return columns


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_update_leaves_an_active_weight_at_0(
    dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below bf16's smallest number (9.2e-41), at it, cancelled out, and ordinary ones, which keep their bits."""
    if not compiled:
        monkeypatch.setattr(adamw, "library", lambda: None)
    base = [0.0, 0.0, 0.0, 0.5, -3e-3, 1e-33, 0.25, 2e-38, 1e-35]
    values = [0.0, 2e-41, -2e-41, -0.5, 3e-3, -1e-33, 1e-3, -2e-38, -1e-35]
    columns, rule = columns_of(base, values), AdamW(1e-2, (0.9, 0.99), 1e-8, 0.0, True, oldest=0)
    least = least_size(dtype)
    assert least == 2.0**-126
    yes, nothing = torch.tensor(True), torch.zeros(len(base))
    before = torch.tensor(values)
    weight = columns.update_(nothing, torch.tensor(1.0), ~yes, rule, least)
    assert torch.equal(columns.values, before), "a step that is refused changes nothing"
    assert float(weight[0]) == 0
    weight = columns.update_(nothing, torch.tensor(1.0), yes, rule, least)
    assert torch.equal(weight, columns.base + columns.values)
    assert (weight.to(dtype) != 0).all() and (weight.bfloat16() != 0).all()
    assert weight[:3].tolist() == [least, least, -least]
    assert float(weight[3].abs()) < 1e-7 and float(weight[4].abs()) < 1e-9
    assert weight[5] == least and columns.values[6] == before[6]


def test_smallest_sizes() -> None:
    assert least_size(torch.bfloat16) == least_size(torch.float32) == 2.0**-126
    assert least_size(torch.float16) == 2.0**-24


# What ends well and does nothing is said


def test_a_gradient_of_0_everywhere_is_said_once() -> None:
    config = dataclasses.replace(CONFIG, targets="all-linear")
    cases: list[dict[str, Any]] = [{}, {"init": "random"}, {"window_store": "factored"}, {"grow": "random"}]
    for over in cases:
        model = prune_(tiny_llama())
        zeros = sum(int((p == 0).sum()) for p in model.parameters())
        seft = SeftOptimizer(model, dataclasses.replace(config, **over), lr=1e-2)
        with pytest.warns(UserWarning, match="step 1: the gradient of every target is exactly 0.*labels") as caught:
            for t in range(3):
                (model(**batch(t)).loss * 0).backward()
                seft.step()
                seft.zero_grad()
        assert len(caught) == 1, over
        assert sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1) == zeros


def test_a_layer_without_gradient_is_named() -> None:
    model = dead_model()
    with pytest.warns(UserWarning, match=f"step 1: the gradient of 1 of 4 targets is exactly 0 .e.g. {DEAD}"):
        train_(model, SeftOptimizer(model, CONFIG, lr=1e-2), 2)


@pytest.mark.parametrize(
    ("schedule", "first"),
    [
        ({"interval": 60, "steps": 50}, None),
        ({"interval": 60, "steps": 75}, 60),
        ({"interval": 10, "begin": 11, "end": 19, "steps": 100}, None),
        ({"interval": 10, "begin": 11, "end": 20, "steps": 100}, 20),
        ({"interval": 10, "begin": 90, "steps": 100}, None),
        ({"interval": 7}, 7),
        ({"interval": 7, "begin": 7}, 7),
        ({"interval": 7, "begin": 8, "end": 13}, None),
    ],
)
def test_a_schedule_without_evolution_is_said(schedule: dict[str, Any], first: int | None) -> None:
    config = moving(density=0.05, **schedule)
    assert first_evolution(config) == first
    seft = SeftOptimizer(prune_(tiny_llama()), config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seft.attach()
    said = [str(each.message) for each in caught if "no evolution will happen" in str(each.message)]
    assert len(said) == (first is None)
    if said:
        assert f"interval={config.interval}" in said[0] and "set static" in said[0]
    still = SeftOptimizer(prune_(tiny_llama()), dataclasses.replace(config, static=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        still.attach()


def test_one_rank_says_it() -> None:
    def on_rank(rank: int, world: int) -> list[str]:
        model = prune_(tiny_llama())
        called, seft, _, _ = build("ddp", moving(density=0.05, interval=60, steps=50), model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for t in range(2):
                (called(**batch(t, rank)).loss * 0).backward()
                seft.step()
                seft.zero_grad()
        return [str(each.message) for each in caught if each.category is SeftWarning]

    main, other = run_ranks(on_rank, 2)
    assert [text.split(":")[0].split("(")[0].strip() for text in main] == ["no evolution will happen", "step 1"]
    assert not other


def test_a_run_says_once_that_it_has_no_evolution(inputs: Path, tmp_path: Path) -> None:
    config = make_config(inputs, tmp_path / "run", seft=moving(density=0.05, interval=60), steps=2, backend="fsdp")

    def on_rank(rank: int, world: int) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")  # what a new process has
            trainer.train(config)
        return [str(each.message) for each in caught if "no evolution will happen" in str(each.message)]

    main, other = run_ranks(on_rank, 2)
    assert len(main) == 1 and not other
