"""What would go wrong without a message: a pattern that was not named, weights replaced behind the optimizer."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.preload  # noqa: F401
from seft_dist import SeftConfig, SeftOptimizer
from seft_dist.config import BaselineConfig, ModelConfig, TrainConfig
from seft_dist.io import checkpoint
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
