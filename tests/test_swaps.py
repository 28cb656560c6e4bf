"""Pruned positions that come back at their parent's value: the same on every layout, exact counts, exact resumption."""

import dataclasses
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tests.preload  # noqa: F401
from seft_dist import ParentModel, SeftConfig, SeftOptimizer
from seft_dist.config import ModelConfig
from seft_dist.export.delta import apply_delta
from seft_dist.io import checkpoint
from seft_dist.io.checkpoint.reader import _check_method
from seft_dist.io.source import open_source
from seft_dist.optim.notices import SeftWarning
from seft_dist.optim.window import Needs
from seft_dist.results.page.record import read_records
from seft_dist.results.page.render import render
from tests.folders import model_folder
from tests.layouts import train_on
from tests.models import Parent, batch, prune_, prune_groups_, tiny_llama
from tests.runs import digests, ds_file, make_config, run_config, run_train

STEPS = 14
CONFIG = SeftConfig(density=0.05, interval=4, window=2, steps=STEPS, end=12, swap_fraction=0.03, swap_end=12)


def dense_parent() -> Parent:
    return Parent(tiny_llama())


def linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def steps_of(model: nn.Module, seft: SeftOptimizer, last: int) -> None:
    while seft.num_steps < last:
        model(**batch(seft.num_steps)).loss.backward()
        seft.step()
        seft.zero_grad()


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_counts_stay_exact_and_what_returns_has_the_parents_value(scope: Any) -> None:
    parent, model = dense_parent(), prune_(tiny_llama())
    before = {name: module.weight.detach().clone() for name, module in linears(model)}
    seft = SeftOptimizer(model, dataclasses.replace(CONFIG, scope=scope), lr=1e-2, parent=parent)
    zeros = sum(int((before[name] == 0).sum()) for name in seft.target_names)
    moved = 0
    for t in range(1, STEPS + 1):
        steps_of(model, seft, t)
        counts = seft.sparsity()
        assert sum(layer.zeros for layer in counts) == zeros
        if scope == "layer":
            assert all(layer.zeros == int((before[layer.name] == 0).sum()) for layer in counts)
        if seft.evolution:
            assert seft.evolution.reactivated == seft.evolution.pruned
            assert (seft.evolution.reactivated == 0) == seft.evolution.first
            moved += seft.evolution.reactivated
    assert moved > 0
    trained = {layer.name: layer.columns.indices.long() for layer in seft.deltas()}
    compared = 0
    for name, module in linears(model):
        if name in trained:
            now, was = module.weight.detach().view(-1), before[name].view(-1)
            back = ((was == 0) & (now != 0)).index_fill(0, trained[name], False)
            assert torch.equal(now[back], parent.weights[name].view(-1)[back])
            compared += int(back.sum())
    assert compared > 0


@pytest.mark.parametrize(("last", "swapping"), [(None, [4]), (8, [4, 8]), (11, [4, 8])])
def test_swaps_end_early(last: int | None, swapping: list[int]) -> None:
    seft = SeftOptimizer(
        prune_(model := tiny_llama()), dataclasses.replace(CONFIG, swap_end=last), parent=dense_parent()
    )
    found = []
    for t in range(1, STEPS + 1):
        steps_of(model, seft, t)
        if seft.evolution and "swap" in seft.evolution.phases:
            found.append(t)
            assert seft.evolution.reactivated > 0
        elif seft.evolution:
            assert seft.evolution.reactivated == 0
    assert found == swapping


def test_nothing_is_swapped_where_it_would_not_pay() -> None:
    """A parent of tiny values offers nothing; one without the pruned values, nothing at all."""
    for factor in (1e-6, 0.0):
        parent, model = dense_parent(), prune_(tiny_llama())
        masks = {name: module.weight.detach() != 0 for name, module in linears(model)}
        parent.weights = {name: weight * factor for name, weight in parent.weights.items()}
        seft = SeftOptimizer(model, CONFIG, lr=1e-2, parent=parent)
        steps_of(model, seft, STEPS)
        for name, module in linears(model):
            assert torch.equal(module.weight.detach() != 0, masks[name])


def test_a_parent_whose_weights_pruning_has_changed_is_warned_of() -> None:
    model, compensated = prune_(tiny_llama()), prune_(tiny_llama())
    with torch.no_grad():
        for _, module in linears(compensated):
            module.weight.mul_(1.01)
    with pytest.warns(SeftWarning, match=r"100% of the active weights .*are not those of the parent"):
        SeftOptimizer(compensated, CONFIG, parent=dense_parent()).attach()
    with warnings.catch_warnings():
        warnings.simplefilter("error", SeftWarning)
        SeftOptimizer(model, CONFIG, parent=dense_parent()).attach()
        SeftOptimizer(prune_(tiny_llama()).bfloat16().float(), CONFIG, parent=dense_parent()).attach()


def test_a_pruned_weight_that_matters_takes_the_place_of_one_that_does_not() -> None:
    """And at its full size at once: no delta has to grow there."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 16, bias=False)
    model = nn.Sequential(layer)
    weight = layer.weight.data
    weight.copy_(weight.sign() * 0.2)
    weight[2, 5], weight[7, 1] = 3.0, 1e-6
    parent = Parent(model)
    weight[:, 8:] = 0
    weight[2, 5] = 0
    wanted = parent.weights["0"].clone()
    config = SeftConfig(density=0.1, interval=4, window=2, steps=6, swap_fraction=1 / 256, swap_end=4)
    seft = SeftOptimizer(model, config, lr=1e-4, parent=parent)
    zeros = int((weight == 0).sum())
    for _ in range(6):
        x = torch.randn(64, 16)
        (model(x) - x @ wanted.T).square().mean().backward()
        seft.step()
        seft.zero_grad()
    assert weight[2, 5] == pytest.approx(3.0, abs=1e-2) and weight[7, 1] == 0
    assert int((weight == 0).sum()) == zeros


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_of_equal_prices_the_smaller_position_leaves_and_comes(scope: Any) -> None:
    layer = nn.Linear(4, 1, bias=False)
    model = nn.Sequential(layer)
    layer.weight.data.copy_(torch.tensor([[1.0, 1.0, 4.0, 4.0]]))
    parent = Parent(model)
    layer.weight.data[0, 2:] = 0
    config = SeftConfig(
        density=0.25, interval=1, window=1, steps=3, swap_fraction=0.25, swap_end=1, scope=scope, init="random",
        grow="random", drop_fraction=0,
    )  # fmt: skip
    seft = SeftOptimizer(model, config, lr=0.0, parent=parent)
    model(torch.ones(1, 4)).sum().backward()
    seft.step()
    assert layer.weight.tolist() == [[0.0, 1.0, 4.0, 0.0]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "world_size", "scope"),
    [
        ("ddp", 3, "global"),
        ("fsdp", 2, "layer"),
        ("fsdp", 3, "global"),
        ("zero3", 2, "global"),
        pytest.param("zero2", 2, "layer", marks=pytest.mark.long),
        pytest.param("hsdp", 4, "global", marks=pytest.mark.long),
        pytest.param("zero3", 3, "layer", marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("selection", ["gather", pytest.param("radix", marks=pytest.mark.long)])
def test_every_layout_swaps_the_same(layout: str, world_size: int, scope: Any, selection: Any) -> None:
    config = dataclasses.replace(CONFIG, scope=scope, selection=selection)
    alone = train_on("single", 1, config, STEPS, parent=dense_parent())
    many = train_on(layout, world_size, config, STEPS, parent=dense_parent())
    assert many["digests"] == alone["digests"] and len(set(alone["digests"])) > 2
    for name, layer in alone["state"].items():
        assert torch.equal(many["state"][name]["mask"], layer["mask"])
        torch.testing.assert_close(many["state"][name]["weight"], layer["weight"], rtol=1e-3, atol=1e-5)


def test_a_checkpoint_between_two_swaps_goes_on_bit_for_bit(tmp_path: Path) -> None:
    models = [prune_(tiny_llama()) for _ in range(3)]
    whole, first, second = (SeftOptimizer(model, CONFIG, lr=1e-2, parent=dense_parent()) for model in models)
    steps_of(models[0], whole, STEPS)
    steps_of(models[1], first, 7)  # after the swaps of step 4, inside the window of step 8
    checkpoint.load(second, checkpoint.save(first, tmp_path, {}))
    steps_of(models[2], second, STEPS)
    for name, weight in models[0].state_dict().items():
        assert torch.equal(weight, models[2].state_dict()[name]), name


def test_random_supports_need_no_dense_gradient() -> None:
    """The price needs sums of rows and columns only, and Adapt has nothing to do."""
    config = dataclasses.replace(CONFIG, grow="random", init="random")
    assert not Needs.of_any_step(config).dense and Needs.of(config).outputs
    assert not Needs.of_any_step(dataclasses.replace(config, swap_fraction=0.0, adapt="curvature")).sums
    assert Needs.of(dataclasses.replace(config, swap_fraction=0.0, reactivation=1.0)).dense
    model = prune_(tiny_llama())
    seft = SeftOptimizer(model, config, lr=1e-2, parent=dense_parent())
    seft.counts_near_ties = True
    steps_of(model, seft, 4)
    assert seft.evolution is not None and seft.evolution.reactivated > 0


def test_near_ties_are_counted() -> None:
    model = prune_(tiny_llama())
    parent = dense_parent()
    for weight in parent.weights.values():
        weight.copy_(weight.sign() * 0.1)  # many prices that differ by rounding only
    seft = SeftOptimizer(model, CONFIG, lr=1e-2, parent=parent)
    seft.counts_near_ties = True
    steps_of(model, seft, 4)
    assert seft.evolution is not None and seft.evolution.near_ties is not None
    assert sum(seft.evolution.near_ties) > 0 and len(seft.evolution.near_ties) == len(seft.target_names)


def test_a_parent_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="swap_fraction=0.03 without a parent: needs the model before it was pruned"):
        SeftOptimizer(prune_(tiny_llama()), CONFIG)
    with pytest.raises(ValueError, match="swap_fraction=1e-09 lets no position swap"):
        SeftOptimizer(prune_(tiny_llama()), dataclasses.replace(CONFIG, swap_fraction=1e-9), parent=dense_parent())
    paired = SeftOptimizer(prune_groups_(tiny_llama(), "2:4"), CONFIG, parent=dense_parent())
    with pytest.raises(ValueError, match="the pattern 2:4 .*which swaps do not keep"):
        paired.attach()
    with pytest.raises(ValueError, match="a parent without swap_fraction: nothing would come back"):
        SeftOptimizer(prune_(tiny_llama()), SeftConfig(steps=100), parent=dense_parent())


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of ``inputs/pruned`` as it was before pruning."""
    return model_folder(tmp_path_factory.mktemp("parent") / "dense", sparsity=0)


def test_a_parent_of_another_shape_is_refused_by_name(dense: Path, tmp_path: Path) -> None:
    wide = model_folder(tmp_path / "wide", sparsity=0, intermediate_size=64)
    with pytest.raises(ValueError, match=r"parent=.*mlp.gate_proj has the shape \[48, 32\] in the pruned model"):
        SeftOptimizer(prune_(tiny_llama()), CONFIG, parent=ParentModel.open(str(wide)))
    shallow = model_folder(tmp_path / "shallow", sparsity=0, num_hidden_layers=1)
    with pytest.raises(ValueError, match="layers.1.*the parent has no such weight: needs the model that was pruned"):
        SeftOptimizer(prune_(tiny_llama()), CONFIG, parent=ParentModel.open(str(shallow)))
    with pytest.raises(ValueError, match="parent=.*nowhere"):
        ParentModel.open(str(tmp_path / "nowhere"))


def test_parts_of_a_parent_are_read(dense: Path) -> None:
    parent, wanted = ParentModel.open(str(dense)), Parent(tiny_llama())
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        whole = wanted.weights[name].view(-1)
        for start, stop in ((0, len(whole)), (5, 6), (31, 97), (7, 7)):
            assert torch.equal(parent.read(name, start, stop), whole[start:stop])


def test_a_parent_in_fp16_is_read(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "half", dtype=torch.float16, sparsity=0)
    name = "model.layers.0.mlp.up_proj"
    wanted = Parent(tiny_llama(dtype=torch.float16)).weights[name].view(-1)[3:90]
    assert torch.equal(ParentModel.open(str(folder)).read(name, 3, 90), wanted)


@pytest.mark.slow
def test_weights_that_zero3_has_divided_already_swap(inputs: Path, dense: Path, tmp_path: Path) -> None:
    """``seft train --deepspeed`` loads straight into shards, before the optimizer looks at the shapes."""
    given: dict[str, Any] = {"seft": dataclasses.replace(CONFIG, steps=None, end=None), "parent": str(dense)}
    ds = ds_file(tmp_path, {"zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": True})
    found = [
        run_train(run_config(inputs, tmp_path / "zero3", steps=STEPS, deepspeed=ds, **given), 2),
        run_train(run_config(inputs, tmp_path / "alone", steps=STEPS, **given)),
    ]
    assert found[0]["reactivated"] == found[1]["reactivated"] > 0
    assert digests(tmp_path / "zero3") == digests(tmp_path / "alone")


def test_a_parent_that_differs_between_ranks_is_refused(inputs: Path, dense: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"seft": dataclasses.replace(CONFIG, steps=None, end=None), "parent": str(dense)}

    def before() -> None:
        if os.environ.get("RANK") == "1":
            ParentModel.fingerprint = lambda self, names: "another"  # type: ignore[method-assign]

    with pytest.raises(AssertionError, match="rank 1 reads another parent than rank 0"):
        run_train(run_config(inputs, tmp_path / "run", steps=STEPS, **given), 2, before=before)


def test_seft_train_swaps_resumes_and_exports(inputs: Path, dense: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    given: dict[str, Any] = {"seft": dataclasses.replace(CONFIG, steps=None, end=None), "parent": str(dense)}
    run_train(make_config(inputs, output, steps=STEPS, save_every=5, **given))
    result = json.loads((output / "result.json").read_text())
    assert result["sparsity"]["final"] == result["sparsity"]["target"] and result["reactivated"] > 0
    manifest = json.loads((output / "manifest.json").read_text())
    assert len(manifest["parent"]) == 16
    page = render(read_records([output]), draws=False)
    assert f"and {result['reactivated']} pruned positions came back with the parent&#39;s value." in page
    assert "every target has as many zeros as before" in page
    told = (output / "config.yaml").read_text()
    (output / "config.yaml").write_text(told.replace("scope: layer", "scope: global"))
    assert "the model as a whole has as many zeros as before" in render(read_records([output]), draws=False)
    (output / "config.yaml").write_text(told)
    trained = load_file(output / "model" / "model.safetensors")
    pruned = load_file(inputs / "pruned" / "model.safetensors")
    apply_delta(
        open_source(ModelConfig(path=str(inputs / "pruned"))), output / "delta.safetensors", tmp_path / "applied"
    )
    applied = load_file(tmp_path / "applied" / "model.safetensors")
    assert all(torch.equal(applied[name], value) for name, value in trained.items())
    assert any(((pruned[name] == 0) & (value != 0)).any() for name, value in trained.items())
    # a run whose checkpoints were made with another parent
    for made in ("result.json", "delta.safetensors"):
        (output / made).unlink()
    other = model_folder(tmp_path / "other", sparsity=0)
    weights = load_file(other / "model.safetensors")
    save_file({name: value * 2 for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(AssertionError, match="made with a parent of fingerprint"):
        run_train(make_config(inputs, output, steps=STEPS, save_every=5, **(given | {"parent": str(other)})))


@pytest.mark.slow
def test_packed_ranks_swap_the_same(inputs: Path, dense: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"seft": dataclasses.replace(CONFIG, steps=None, end=None, scope="global")}
    given |= {"parent": str(dense), "steps": STEPS}
    models = {}
    for packing in ("none", "gather", "resident"):
        run_train(run_config(inputs, tmp_path / packing, packing=packing, **given), 2)
        models[packing] = (tmp_path / packing / "model" / "model.safetensors").read_bytes()
    assert models["gather"] == models["none"] and models["resident"] == models["none"]


def test_checkpoints_with_the_price_of_before_are_refused(tmp_path: Path) -> None:
    """Until swaps had an end, their price had the gradient in it."""
    seft = SeftOptimizer(prune_(tiny_llama()), CONFIG, parent=dense_parent())
    written = dataclasses.asdict(CONFIG)
    manifest: Any = {"method": written, "window_steps": None}
    _check_method(seft, manifest, tmp_path)
    del written["swap_end"]
    with pytest.raises(ValueError, match="earlier version, whose evolutions had another price"):
        _check_method(seft, manifest, tmp_path)
