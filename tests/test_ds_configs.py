"""Every file of ds_configs/ starts an engine and trains; every recipe of launch/recipes/ loads."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.preload  # noqa: F401
from seft_dist.config import DataConfig, ModelConfig, TrainConfig
from seft_dist.session.cli import parse
from seft_dist.training.build import open_model
from seft_dist.training.ds_config import DsConfig
from tests.folders import model_folder
from tests.models import moving
from tests.ranks import run_ranks
from tests.runs import run_config, train_to_end

ROOT = Path(__file__).resolve().parents[1]
DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
RECIPES = [path for path in sorted((ROOT / "launch" / "recipes").glob("*.yaml")) if not path.stem.startswith("study_")]


def test_the_set_is_complete() -> None:
    assert {path.stem for path in DS_CONFIGS} == {
        f"{name}{kind}" for name in ("zero0", "zero1", "zero2", "zero3", "zero3_offload") for kind in ("", "_bf16")
    }


@pytest.mark.slow
@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
def test_ds_config_trains(path: Path, inputs: Path, tmp_path: Path) -> None:
    content = json.loads(path.read_text())
    config = TrainConfig(
        model=ModelConfig(path=str(inputs / "pruned")),
        data=DataConfig(path=str(inputs / "text.jsonl"), seq_len=16),
        output=str(tmp_path / "run"),
        seft=moving(density=0.05, interval=2),
        deepspeed=str(path),
        steps=5,
        threads=1,
    )

    def on_rank(rank: int, world: int) -> tuple[dict[str, Any], list[str]]:
        import warnings

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = train_to_end(config)
        return result, [str(warning.message) for warning in caught if "config" in str(warning.message).lower()]

    result, complaints = run_ranks(on_rank, 2)[0]
    assert result["backend"] == f"zero{content['zero_optimization']['stage']}"
    assert result["sparsity"]["layers_off_target"] == 0 and result["evolutions"] == 2
    assert complaints == []


def test_weights_in_bf16_that_would_train_in_fp32_are_warned_of(
    inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = ModelConfig(path=str(model_folder(tmp_path / "m", torch.bfloat16)))
    config = run_config(inputs, tmp_path / "run", model=model)
    open_model(config, DsConfig({"bf16": {"enabled": True}}, {}))
    open_model(dataclasses.replace(config, model=dataclasses.replace(model, dtype="float32")), DsConfig({}, {}))
    open_model(config, None)
    assert not caplog.records
    assert open_model(config, DsConfig({}, {})).dtype == torch.float32
    assert "is stored in bfloat16, but the ds_config trains in float32, with twice the memory" in caplog.text


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = path.read_text()
    config = parse(TrainConfig, ["--config", str(path)])
    assert text.startswith("#") and config.output.startswith("runs/")
    if config.deepspeed is not None:
        assert (ROOT / config.deepspeed).is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [path for path in RECIPES if "quickstart" not in path.stem], ids=lambda path: path.stem
)
def test_recipe_trains(path: Path, inputs: Path, tmp_path: Path) -> None:
    """With a tiny model and data in place of the user's own; the method, backend and types are the recipe's."""
    data = inputs / "text.jsonl"
    if "instruction" in path.stem:
        data = tmp_path / "instructions.jsonl"
        rows = [{"instruction": f"w{i} w{i + 1}", "input": "", "output": f"w{i + 2} w{i + 3}"} for i in range(40)]
        data.write_text("\n".join(json.dumps(row) for row in rows))
    argv = [
        "--config",
        str(path),
        "--model.path",
        str(inputs / "pruned"),
        "--data.path",
        str(data),
        "--data.seq_len",
        "16",
    ]
    argv += [
        "--output",
        str(tmp_path / "run"),
        "--steps",
        "4",
        "--seft.interval",
        "2",
        "--seft.end",
        "3",
        "--threads",
        "1",
    ]
    argv += ["--save_every", "0"]
    world_size = 1 if "single" in path.stem else 2
    result = run_ranks(lambda rank, world: train_to_end(parse(TrainConfig, argv)), world_size)[0]
    assert result["sparsity"]["layers_off_target"] == 0 and result["loss"] < 8
