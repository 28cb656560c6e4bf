"""Every family of docs/models.md: pruning, SEFT on one process and on two ranks, export, plain transformers."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import tests.preload  # noqa: F401
from seft_dist.config import AdamConfig, DataConfig, ModelConfig, PruneConfig, TrainConfig
from seft_dist.export.delta import apply_delta
from seft_dist.io.source import open_source
from seft_dist.modules.targets import find_targets
from seft_dist.pruning.prune import prune_folder
from seft_dist.training import trainer
from tests.families import FAMILIES, family_folder
from tests.models import moving
from tests.ranks import run_ranks
from tests.runs import train_to_end
from tests.texts import text_jsonl

STEPS = 4
IDS = torch.arange(2, 34).view(2, 16)
ZERO3 = {"zero_optimization": {"stage": 3}, "steps_per_print": 1 << 30}


def prepare(folder: Path, family: str) -> Path:
    """A dense model, its pruned form, and text."""
    family_folder(folder / "dense", family)
    config = PruneConfig(
        model=ModelConfig(path=str(folder / "dense")),
        output=str(folder / "pruned"),
        method="magnitude",
        sparsity=0.5,
    )
    prune_folder(config, progress=False)
    text_jsonl(folder / "text.jsonl")
    (folder / "zero3.json").write_text(json.dumps(ZERO3))
    return folder


def train_config(folder: Path, layout: str, world_size: int) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(path=str(folder / "pruned")),
        data=DataConfig(path=str(folder / "text.jsonl"), seq_len=16),
        output=str(folder / layout),
        seft=moving(density=0.05, interval=2),
        optim=AdamConfig(lr=1e-2),
        steps=STEPS,
        batch_size=8 // world_size,
        threads=1,
        deepspeed=str(folder / "zero3.json") if layout == "zero3" else None,
    )


def train_and_look(config: TrainConfig) -> tuple[dict[str, Any], Tensor]:
    """Train; the result, and what the trained model itself says before it is exported."""
    seen: list[Tensor] = []
    finish = trainer.finish

    def look_then_finish(run: Any, *rest: Any) -> dict[str, Any]:
        run.model.eval()
        with torch.no_grad():
            seen.append(run.forward_module(input_ids=IDS).logits.float())
        run.model.train()
        return finish(run, *rest)

    setattr(trainer, "finish", look_then_finish)  # noqa: B010  # in a forked process
    return train_to_end(config), seen[0]


def digests(output: Path) -> list[str]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["evolution"]["digest"] for line in lines if "evolution" in line]


def zeros(folder: Path) -> dict[str, int]:
    targets = find_targets(AutoModelForCausalLM.from_pretrained(folder))
    return {name: int((target.weight == 0).sum()) for name, target in targets.items()}


FEW = ("llama3", "gpt2", "mixtral")
"""Families that train with DeepSpeed, too, in each run of the tests: one of each kind of target."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "layouts"),
    [
        *((family, ("fsdp", "zero3") if family in FEW else ("fsdp",)) for family in FAMILIES),
        *(pytest.param(family, ("zero3",), marks=pytest.mark.long) for family in FAMILIES if family not in FEW),
    ],
)
def test_the_whole_way(family: str, layouts: tuple[str, ...], tmp_path: Path) -> None:
    folder = prepare(tmp_path, family)
    before = zeros(folder / "pruned")
    for layout, world_size in (("single", 1), *((layout, 2) for layout in layouts)):
        config = train_config(folder, layout, world_size)
        result, logits = run_ranks(lambda rank, world, config=config: train_and_look(config), world_size)[0]
        assert result["sparsity"]["layers_off_target"] == 0 and result["reactivated"] > 0
        assert zeros(folder / layout / "model") == before
        reloaded = AutoModelForCausalLM.from_pretrained(folder / layout / "model")
        with torch.no_grad():
            torch.testing.assert_close(reloaded(IDS).logits, logits, rtol=0, atol=1e-6)
        assert digests(folder / layout) == digests(folder / "single")
        apply_delta(
            open_source(ModelConfig(path=str(folder / "pruned"))),
            folder / layout / "delta.safetensors",
            folder / layout / "again",
        )
        one, other = (load_file(folder / layout / name / "model.safetensors") for name in ("model", "again"))
        assert one.keys() == other.keys() == load_file(folder / "dense/model.safetensors").keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_rank_that_owns_no_expert(tmp_path: Path) -> None:
    """Three experts on four ranks, with layers computed twice; one rank is the oracle."""
    folder = prepare(tmp_path, "mixtral")
    for layout, world_size in (("single", 1), ("fsdp", 4)):
        config = train_config(folder, layout, world_size)
        model = dataclasses.replace(config.model, activation_checkpointing=world_size > 1)
        config = dataclasses.replace(config, model=model)
        run_ranks(lambda rank, world, config=config: train_and_look(config), world_size)
    assert len(digests(folder / "single")) == 2 and digests(folder / "single") == digests(folder / "fsdp")
    assert zeros(folder / "fsdp/model") == zeros(folder / "pruned")
