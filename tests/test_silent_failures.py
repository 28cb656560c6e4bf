"""What would go wrong without a message: a pattern that was not named, weights replaced behind the optimizer."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.preload  # noqa: F401
from seft_dist import SeftConfig, SeftOptimizer
from seft_dist.config import BaselineConfig, ModelConfig, TrainConfig
from seft_dist.io import checkpoint
from seft_dist.optim.notices import SeftWarning
from seft_dist.session.cli import parse
from seft_dist.training.trainer import train
from tests.folders import model_folder, text_file
from tests.layouts import build
from tests.models import batch, moving, prune_, prune_groups_, tiny_llama
from tests.ranks import run_ranks
from tests.runs import make_config, run_train

WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}
CONFIG = moving(density=0.05, interval=3, steps=20)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "3:5"])
def test_a_pattern_that_was_not_named_is_recognised(pattern: str) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 60,
        "intermediate_size": 80,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
    }
    model = prune_groups_(tiny_llama(**(sizes if pattern == "3:5" else WIDE)), pattern)
    with pytest.raises(ValueError, match=rf"has the pattern {pattern} .* give seft.pattern {pattern} to keep it"):
        SeftOptimizer(model, CONFIG).attach()


def test_whoever_says_what_becomes_of_the_pattern_can_train() -> None:
    for over in ({"pattern": "2:4"}, {"pattern": None}, {"reactivation": 0.0}):
        model = prune_groups_(tiny_llama(**WIDE), "2:4")
        seft = SeftOptimizer(model, moving(density=0.05, interval=3, steps=20, **over))
        seft.attach()
        assert seft.config.pattern == over.get("pattern")


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.6, 0.9])
@pytest.mark.parametrize("by_row", [True, False])
def test_models_without_a_pattern_are_taken_as_they_are(sparsity: float, by_row: bool) -> None:
    model = tiny_llama(**WIDE)
    if by_row:
        prune_(model, sparsity)
    else:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)) > sparsity)
    seft = SeftOptimizer(model, moving(density=0.02, interval=3, steps=20))
    seft.attach()
    assert seft.config.pattern is None


@pytest.mark.parametrize(("layout", "world_size"), [("fsdp", 2), ("zero3", 3), ("ddp", 2)])
def test_a_pattern_is_recognised_in_shards(layout: str, world_size: int) -> None:
    # 3 ranks of ZeRO-3 cut groups; one group that breaks the pattern, cut or not, is enough for its target
    def on_rank(rank: int, world: int) -> list[str]:
        said = []
        for broken in (False, True):
            model: Any = prune_groups_(tiny_llama(**WIDE), "2:4")
            if broken:
                weight = model.model.layers[1].mlp.down_proj.weight
                weight.data.view(-1)[weight.numel() // 3 // 4 * 4 :][:4] = 1.0
            _, seft, _, _ = build(layout, CONFIG, model)
            try:
                seft.attach()
                said.append("taken")
            except ValueError as error:
                said.append(str(error).split("active, ")[1].split("),")[0])
            seft.detach()
        return said

    for said in run_ranks(on_rank, world_size):
        assert said == ["in every target", "in 13 of 14 targets"]


@pytest.mark.parametrize("other", ["dense", "unstructured", "3:4"])
def test_one_target_without_the_pattern_does_not_cost_the_others_theirs(other: str) -> None:
    model, dense = prune_groups_(tiny_llama(**WIDE), "2:4"), tiny_llama(**WIDE)
    name = "model.layers.1.mlp.down_proj"
    odd: Any = model.get_submodule(name)
    with torch.no_grad():
        odd.weight.copy_(dense.get_parameter(f"{name}.weight"))
    if other == "unstructured":
        prune_(torch.nn.ModuleDict({"odd": odd}), 0.6)
    elif other == "3:4":
        prune_groups_(torch.nn.ModuleDict({"odd": odd}), other)
    has = other if other == "3:4" else "none"
    with pytest.raises(
        ValueError, match=rf"pattern 2:4 .*in 13 of 14 .*leave out .*layers.1.mlp.down_proj, which has {has}\)"
    ):
        SeftOptimizer(model, CONFIG).attach()


def test_launch_train_names_the_options_and_takes_them(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "pruned", sparsity=0, **WIDE)
    prune_groups_(model := tiny_llama(**WIDE), "2:4")
    model.save_pretrained(folder)
    text_file(tmp_path / "text.jsonl")
    config = make_config(tmp_path, tmp_path / "run", model=ModelConfig(path=str(folder)), steps=4, save_every=2)
    with pytest.raises(ValueError, match=r"seft\.pattern 2:4 .*seft\.pattern null"):
        train(config)
    assert not (tmp_path / "run").exists()
    lost = make_config(
        tmp_path, tmp_path / "run", model=config.model, steps=4, seft=moving(density=0.05, interval=3, pattern=None)
    )
    run_train(lost)
    assert parse(TrainConfig, ["--config", str(tmp_path / "run" / "config.yaml")]).seft.pattern is None
    # A run that began without a pattern, as all did once, goes on without one
    (tmp_path / "run" / "result.json").unlink()
    run_train(make_config(tmp_path, tmp_path / "run", model=config.model, steps=6))


def test_pruning_again_is_refused_too(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = model_folder(tmp_path / "pruned", sparsity=0, **WIDE)
    prune_groups_(model := tiny_llama(**WIDE), "2:4")
    model.save_pretrained(folder)
    text_file(tmp_path / "text.jsonl")
    over: dict[str, Any] = {"model": ModelConfig(path=str(folder)), "seft": SeftConfig(), "steps": 2}
    merged = {"method": "lora_merged", "baseline": BaselineConfig(rank=2, sequences=4)}
    with pytest.raises(ValueError, match="has the pattern 2:4"):
        train(make_config(tmp_path, tmp_path / "run", **over, **merged))
    run_train(make_config(tmp_path, tmp_path / "masked", **over, method="masked_full"))


def messages(act: Any) -> list[str]:
    """Warnings about replaced weights."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(each.message) for each in caught if "were replaced after it had read" in str(each.message)]


def replace_all(model: Any) -> None:
    """Load the weights of another model."""
    model.load_state_dict(prune_(tiny_llama(seed=1)).state_dict())


def replace_one(model: Any) -> None:
    """Give one target other memory."""
    weight = model.model.layers[0].self_attn.k_proj.weight
    weight.data = weight.data * 1.5


@pytest.mark.parametrize("replace", [replace_all, replace_one, None])
def test_weights_that_were_replaced_are_noticed_and_own_updates_are_not(replace: Any) -> None:
    model = prune_(tiny_llama())
    seft = SeftOptimizer(model, moving(density=0.05, interval=50, steps=100), lr=1e-3)

    def steps(count: int) -> None:
        for t in range(count):
            model(**batch(t)).loss.backward()
            seft.step()
            seft.zero_grad()

    assert messages(lambda: steps(3)) == []
    if replace is not None:
        replace(model)
    found = messages(lambda: steps(2 * len(seft.target_names)))
    assert len(found) == (0 if replace is None else 1), found


def test_a_restored_run_is_not_taken_for_a_replaced_one(tmp_path: Path) -> None:
    def optimizer() -> tuple[Any, SeftOptimizer]:
        model = prune_(tiny_llama())
        return model, SeftOptimizer(model, CONFIG, lr=1e-2)

    def steps(model: Any, seft: SeftOptimizer) -> None:
        for t in range(7):
            model(**batch(t)).loss.backward()
            seft.step()
            seft.zero_grad()

    model, seft = optimizer()
    assert messages(lambda: steps(model, seft)) == []
    path = checkpoint.save(seft, tmp_path, {})
    model, seft = optimizer()
    checkpoint.load(seft, path)
    assert messages(lambda: steps(model, seft)) == []


@pytest.mark.parametrize(("layout", "world_size"), [("fsdp", 2), ("zero3", 2)])
def test_replaced_shards_are_noticed(layout: str, world_size: int) -> None:
    def on_rank(rank: int, world: int) -> list[int]:
        called, seft, backward, step = build(layout, moving(density=0.05, interval=4, steps=100))

        def steps(count: int) -> None:
            for t in range(count):
                backward(called(**batch(t)).loss)
                step()

        counts = [len(messages(lambda: steps(5)))]
        seft.backend.drop_gathered()
        for i in range(len(seft.target_names)):
            memory, _ = seft.backend.memory(i)
            memory.mul_(1.5)
        return [*counts, len(messages(lambda: steps(4)))]

    assert run_ranks(on_rank, world_size) == [[0, 1]] * world_size


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("layout", ["single", "ddp"])
@pytest.mark.parametrize("train_norms", [True, False])
def test_gradients_dropped_by_the_model_are_dropped(layout: str, set_to_none: bool, train_norms: bool) -> None:
    """A batch that is skipped leaves no trace, nor does a second backward pass of the step lose the first."""

    def on_rank(rank: int, world: int, skips: bool) -> Any:
        inner = prune_(tiny_llama())
        config = moving(density=0.05, interval=3, window=2, reactivation=0.0, train_norms=train_norms)
        model, seft, *_ = build(layout, config, inner)
        for t in range(7):
            if skips and t != 1:
                model(**batch(50 + t)).loss.backward()
                model.zero_grad(set_to_none=set_to_none)
            for part in (t, 20 + t):
                model(**batch(part)).loss.backward()
            seft.step()
            model.zero_grad(set_to_none=set_to_none)
        if skips:  # nothing is left that a step could use
            before = {name: value.clone() for name, value in inner.state_dict().items()}
            model(**batch(60)).loss.backward()
            model.zero_grad(set_to_none=set_to_none)
            seft.step()
            assert seft.num_steps == 7
            assert all(torch.equal(value, before[name]) for name, value in inner.state_dict().items())
        return dict(inner.state_dict())

    size = 1 if layout == "single" else 2
    plain, skipped = (run_ranks(on_rank, size, skips)[0] for skips in (False, True))
    for name, value in plain.items():
        assert torch.equal(value, skipped[name]), name


def test_a_module_that_is_called_twice_keeps_both_gradients() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Linear(8, 8, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.one(torch.tanh(self.one(x))).square().sum()

    torch.manual_seed(0)
    model: Any = prune_(Twice(), 0.5)
    reference: Any = copy.deepcopy(model)
    seft = SeftOptimizer(model, SeftConfig(density=0.4, interval=100, steps=1000))
    for t in range(2):
        x = torch.randn(4, 8)
        model(x).backward()
        model(x).backward()
        if t == 0:  # the first step chooses the support by the dense gradient
            seft.step()
            reference.load_state_dict(model.state_dict())
            seft.zero_grad()
    reference(x).backward()
    reference(x).backward()
    found = seft._slots[0].grad
    support = seft.sparse_state.supports[0].positions()
    assert found is not None and torch.allclose(found, reference.one.weight.grad.view(-1)[support])


def test_a_replaced_module_is_noticed() -> None:
    model: Any = prune_(tiny_llama())
    seft = SeftOptimizer(model, moving(density=0.05, interval=3, window=1))
    with pytest.warns(
        SeftWarning, match=r"1 targets .*no longer modules of the model \(e.g. model.layers.1.mlp.up_proj"
    ):
        for t in range(3):
            model(**batch(t)).loss.backward()
            seft.step()
            if t == 0:
                old = model.model.layers[1].mlp.up_proj
                model.model.layers[1].mlp.up_proj = torch.nn.Linear(old.in_features, old.out_features, bias=False)


@pytest.mark.parametrize("config", [1e-3, {"density": 0.01}])
def test_what_is_no_config_is_named(config: Any) -> None:
    with pytest.raises(TypeError, match=r"got a (float|dict) as config: needs a SeftConfig"):
        SeftOptimizer(prune_(tiny_llama()), config)


@pytest.mark.parametrize("threshold", [1.0, 1e9])
def test_clipping_that_begins_later_is_warned_of(threshold: float) -> None:
    model = prune_(tiny_llama())
    seft = SeftOptimizer(model, moving(density=0.05, interval=3))
    said = []
    for t in range(4):
        model(**batch(t)).loss.backward()
        if t >= 2:
            torch.nn.utils.clip_grad_norm_(model.parameters(), threshold)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            seft.step()
        said.append(any("gradients were clipped outside" in str(each.message) for each in caught))
        seft.zero_grad()
    assert said == [False, False, True, False]  # once


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.long), 2])
def test_many_micro_batches_are_no_overflow_for_deepspeed(stage: int) -> None:
    """Anchors' gradients add up, and DeepSpeed skips a step whose norm is not finite."""

    def on_rank(rank: int, world: int) -> int:
        config = moving(density=0.05, interval=3)
        engine, seft, backward, step = build(f"zero{stage}", config, ds={"gradient_accumulation_steps": 96})
        for _ in range(96):
            backward(engine(**batch(0, rank, size=1)).loss)
            step()
        return seft.num_steps

    assert run_ranks(on_rank, 2) == [1, 1]
