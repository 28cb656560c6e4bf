"""Norms and biases that train beside the deltas (``train_norms``); tests/test_method.py compares whole runs."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from seft_dist import SeftOptimizer
from seft_dist.backends.fsdp import pack_gathers
from seft_dist.config import ModelConfig
from seft_dist.export.delta import apply_delta, remove_delta
from seft_dist.io import checkpoint
from seft_dist.io.source import open_source
from seft_dist.modules.vectors import find_vectors
from seft_dist.optim.notices import SeftWarning
from tests.layouts import build, train_on
from tests.models import VOCAB, batch, moving, prune_, tiny_llama
from tests.ranks import run_ranks
from tests.runs import run_config, run_train

STEPS = 10
CONFIG = moving(density=0.05, interval=4, window=2, steps=STEPS, train_norms=True)
EPS = 1e-4
"""The gradient of a key's bias is only rounding, which a smaller eps would blow up."""


def biased_llama() -> nn.Module:
    """A pruned Llama whose linears have biases, all 0 as they are made."""
    return prune_(tiny_llama(attention_bias=True))


def gpt2() -> nn.Module:
    """A pruned GPT-2: layer norms with shifts, linears stored transposed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, **sizes))
    return prune_(model.eval())  # without dropout


@pytest.mark.parametrize("make", [biased_llama, gpt2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_autograd(make: Any, checkpointing: bool) -> None:
    model = make()
    twin = copy.deepcopy(model)
    seft = SeftOptimizer(model, CONFIG)
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    for micro in range(2):
        model(**batch(micro)).loss.backward()
        twin(**batch(micro)).loss.backward()
    names = {name for name, parameter in twin.named_parameters() if parameter.dim() == 1}
    assert set(seft.vectors.names) == names
    for name, part in zip(seft.vectors.names, seft.vectors.take_grad().split(seft.vectors.lengths), strict=True):
        wanted = twin.get_parameter(name).grad
        assert wanted is not None
        torch.testing.assert_close(part, wanted, rtol=1e-4, atol=1e-6)


def test_only_norms_and_biases_of_linears_are_vectors() -> None:
    mlp = nn.ModuleDict({"router": nn.Linear(4, 2), "experts": nn.ModuleList([nn.Linear(4, 4)])})
    model = nn.ModuleDict({"norm": nn.LayerNorm(4), "linear": nn.Linear(4, 4), "conv": nn.Conv1d(4, 4, 2), "mlp": mlp})
    found = find_vectors(model)
    assert list(found) == ["norm.weight", "norm.bias", "linear.bias", "mlp.experts.0.bias"]


def test_a_vector_of_two_modules_sums_their_gradients() -> None:
    model = tiny_llama()
    model.model.layers[1].input_layernorm.weight = model.model.layers[0].input_layernorm.weight
    twin = copy.deepcopy(prune_(model))
    seft = SeftOptimizer(model, CONFIG)
    model(**batch(0)).loss.backward()
    twin(**batch(0)).loss.backward()
    index = seft.vectors.names.index("model.layers.0.input_layernorm.weight")
    wanted = twin.get_parameter("model.layers.0.input_layernorm.weight").grad
    assert wanted is not None
    torch.testing.assert_close(seft.vectors.take_grad().split(seft.vectors.lengths)[index], wanted)


_oracle: dict[str, Any] = {}


def run(layout: str, world_size: int, **options: Any) -> dict[str, Any]:
    return train_on(layout, world_size, CONFIG, STEPS, model=biased_llama(), eps=EPS, **options)


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["digests"] == other["digests"]
    assert torch.allclose(torch.tensor(one["losses"]), torch.tensor(other["losses"]), rtol=1e-5)
    assert one["vectors"].keys() == other["vectors"].keys() and one["vectors"]
    for name, value in other["vectors"].items():
        torch.testing.assert_close(one["vectors"][name], value, rtol=1e-4, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "world_size"),
    [
        ("ddp", 2),
        ("fsdp", 3),
        ("zero3", 2),
        pytest.param("hsdp", 4, marks=pytest.mark.long),
        pytest.param("zero2", 2, marks=pytest.mark.long),
        pytest.param("zero0", 2, marks=pytest.mark.long),
    ],
)
def test_every_layout_follows_one_process(layout: str, world_size: int) -> None:
    if not _oracle:
        _oracle.update(run("single", 1))
        start = biased_llama()
        moved = [not torch.equal(value, start.get_parameter(name)) for name, value in _oracle["vectors"].items()]
        assert all(moved), "a vector did not train"
    assert_same(run(layout, world_size), _oracle)


@pytest.mark.slow
def test_packed_gathers_have_room_for_biases_that_begin_as_zeros() -> None:
    def on_rank(rank: int, world: int) -> list[float]:
        called, _, backward, step = build("fsdp", CONFIG, biased_llama(), eps=EPS)
        if packs[0]:
            assert any(size.packed < size.dense for size in pack_gathers(called))
        losses = []
        for t in range(STEPS):
            loss = called(**batch(t, rank)).loss
            backward(loss)
            step()
            losses.append(loss.item())
        return losses

    packs = [True]
    packed = run_ranks(on_rank, 2, timeout=120)
    packs = [False]
    assert packed == run_ranks(on_rank, 2, timeout=120)


def trained(folder: Path, first: int, last: int, layout: str, world_size: int) -> dict[str, Tensor]:
    """Train steps first to last - 1 from the newest checkpoint, save, and return the vectors' states."""

    def on_rank(rank: int, world: int) -> dict[str, Tensor]:
        model = biased_llama()
        called, seft, backward, step = build(layout, CONFIG, model, eps=EPS)
        if first:
            newest = checkpoint.latest(folder)
            assert newest is not None
            checkpoint.load(seft, newest)
        size = 4 // world
        for t in range(first, last):
            data = {key: value[rank * size : (rank + 1) * size] for key, value in batch(t, size=4).items()}
            backward(called(**data).loss)
            step()
        checkpoint.save(seft, folder, {})
        held = {f"{name}.held": seft.backend.full(model.get_parameter(name)).clone() for name in seft.vectors.names}
        return held | {
            f"{name}.{key}": value.clone() for name, state in seft.vectors.states() for key, value in state.items()
        }

    return run_ranks(on_rank, world_size, timeout=120)[0]


@pytest.mark.slow
@pytest.mark.parametrize("then", [("single", 1), ("fsdp", 2), pytest.param(("zero3", 2), marks=pytest.mark.long)])
def test_a_run_goes_on_from_a_checkpoint(then: tuple[str, int], tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", 0, 8, *then)
    trained(tmp_path / "parts", 0, 5, *then)
    again = trained(tmp_path / "parts", 5, 8, *then)
    for key, value in whole.items():
        assert torch.equal(again[key], value), key


@pytest.mark.slow
def test_a_checkpoint_fits_any_layout(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", 0, 8, "single", 1)
    trained(tmp_path / "parts", 0, 5, "zero3", 2)
    again = trained(tmp_path / "parts", 5, 8, "fsdp", 2)
    for key, value in whole.items():
        torch.testing.assert_close(again[key], value, rtol=1e-4, atol=2e-6)


def _stepped(steps: int = 1, **over: Any) -> SeftOptimizer:
    model = biased_llama()
    seft = SeftOptimizer(model, dataclasses.replace(CONFIG, **over), lr=1e-2)
    for t in range(steps):
        model(**batch(t)).loss.backward()
        seft.step()
        seft.zero_grad()
    return seft


def test_states_that_training_cannot_leave_are_refused() -> None:
    seft = _stepped()
    good = {name: {key: value.clone() for key, value in state.items()} for name, state in seft.vectors.states()}
    name = seft.vectors.names[0]
    other: dict[str, Any] = {
        "missing": {key: value for key, value in good[name].items() if key != "exp_avg"},
        "needs fp32 [32]": good[name] | {"values": torch.zeros(31)},
        "not finite": good[name] | {"values": good[name]["values"] / 0},
        "squares below 0": good[name] | {"exp_avg_sq": good[name]["exp_avg_sq"] - 1},
    }
    for message, state in other.items():
        with pytest.raises(ValueError, match=f"{name}.*{message.replace('[', '.').replace(']', '.')}"):
            seft.vectors.check_state(good | {name: state})
    seft.vectors.check_state(good)


def test_a_checkpoint_without_vectors_is_of_another_method(tmp_path: Path) -> None:
    saved = checkpoint.save(_stepped(train_norms=False), tmp_path, {})
    with pytest.raises(ValueError, match="train_norms=False there, True here"):
        checkpoint.load(_stepped(0), saved)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    seft = _stepped()
    before = seft.vectors.values.clone()
    model = seft._model
    model(**batch(1)).loss.backward()
    seft.vectors._slots[-1].grad = torch.full((32,), torch.nan)
    with pytest.raises(FloatingPointError, match=r"model\.norm\.weight is not finite"):
        seft.step()
    assert torch.equal(seft.vectors.values, before)
    assert torch.equal(model.get_parameter("model.norm.weight"), before[-32:])


def test_bf16_models_train_in_fp32() -> None:
    model = prune_(tiny_llama(dtype=torch.bfloat16))
    seft = SeftOptimizer(model, CONFIG, lr=1e-5)  # far below a step of bf16 at 1
    for t in range(4):
        model(**batch(t)).loss.backward()
        seft.step()
        seft.zero_grad()
    assert (seft.vectors.values != 1).any() and (model.get_parameter("model.norm.weight") == 1).all()


def test_a_vector_that_is_read_from_outside_of_its_module_is_warned_of() -> None:
    model = biased_llama()
    norm = model.get_submodule("model.norm")
    weight = norm.get_parameter("weight")
    norm.register_forward_hook(lambda module, args, output: args[0] * weight)
    seft = SeftOptimizer(model, CONFIG)
    model(**batch(0)).loss.backward()
    with pytest.warns(SeftWarning, match=r"1 norms or biases got no gradient .*model\.norm\.weight"):
        seft.step()


def test_detach_gives_the_modules_back() -> None:
    seft = _stepped()
    model = seft._model
    assert "forward" in vars(model.get_submodule("model.norm"))
    seft.detach()
    assert not any("forward" in vars(module) for module in model.modules())
    model(**batch(0))


def test_models_without_vectors_and_hidden_forwards_are_refused() -> None:
    linear = nn.Sequential(nn.Linear(8, 8, bias=False))
    with pytest.raises(ValueError, match="no norms with parameters and no biases"):
        SeftOptimizer(linear, CONFIG)
    model = biased_llama()
    model.get_submodule("model.norm").forward = lambda x: x
    with pytest.raises(ValueError, match="a LlamaRMSNorm has a forward method on the object itself"):
        SeftOptimizer(model, CONFIG)


def test_only_one_rank_writes_the_vectors(tmp_path: Path) -> None:
    def on_rank(rank: int, world: int) -> None:
        called, seft, backward, step = build("fsdp", CONFIG, biased_llama())
        backward(called(**batch(0)).loss)
        step()
        checkpoint.save(seft, tmp_path, {})

    run_ranks(on_rank, 2, timeout=120)
    files = sorted((tmp_path / "step-00000001").glob("*.safetensors"))
    counts = [sum("norm.weight.values" in key for key in load_file(file)) for file in files]
    assert counts == [5, 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "over"),
    [
        (1, {}),
        (2, {"packing": "resident"}),
        pytest.param(2, {"packing": "gather"}, marks=pytest.mark.long),
    ],
)
def test_runs_export_them_and_the_delta_file_holds_them(
    layout: int, over: dict[str, Any], inputs: Path, tmp_path: Path
) -> None:
    config = run_config(inputs, tmp_path / "run", seft=moving(density=0.05, interval=3, train_norms=True), **over)
    result = run_train(config, layout)
    before = load_file(inputs / "pruned" / "model.safetensors")
    after = load_file(tmp_path / "run/model/model.safetensors")
    vectors = {name for name, value in before.items() if value.dim() == 1}
    assert vectors and not any(torch.equal(before[name], after[name]) for name in vectors)
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    deltas = sum(int(0.05 * value.numel() + 0.5) for name, value in before.items() if "_proj" in name)
    own = result["trainable"] - sum(before[name].numel() for name in vectors)
    assert 0.9 * deltas < own <= deltas  # where tokens give no gradient, nothing grows

    def source(path: Path) -> Any:
        return open_source(ModelConfig(path=str(path)))

    delta = tmp_path / "run/delta.safetensors"
    apply_delta(source(inputs / "pruned"), delta, tmp_path / "applied")
    remove_delta(source(tmp_path / "run/model"), delta, tmp_path / "removed")
    for folder, wanted in (("applied", after), ("removed", before)):
        tensors = load_file(tmp_path / folder / "model.safetensors")
        assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
