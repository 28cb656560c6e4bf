"""The model card says what the files say and nothing else; the actions of seft export run as users type them."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import tests.preload  # noqa: F401
from seft_dist.config import DataConfig, EvaluateConfig, ModelConfig, TrainConfig
from seft_dist.evaluation.evaluation import evaluate
from seft_dist.export.card import write_card
from seft_dist.io.source import open_source
from seft_dist.training.trainer import train
from tests.folders import model_folder, text_file
from tests.models import moving
from tests.scripts import run_script
from tests.test_export import assert_same_model

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of 4 steps, evaluated."""
    folder = tmp_path_factory.mktemp("run")
    pruned, text = model_folder(folder / "pruned"), text_file(folder / "text.jsonl")
    record = {"model": {"path": str(folder / "dense")}, "method": "wanda", "sparsity": 0.6, "pattern": None}
    (pruned / "pruning.json").write_text(json.dumps(record))
    data = DataConfig(path=str(text), seq_len=16)
    config = TrainConfig(
        model=ModelConfig(path=str(pruned)),
        data=data,
        output=str(folder / "run"),
        steps=4,
        threads=1,
        seft=moving(density=0.05, interval=2),
    )
    train(config)
    models = {"pruned": str(pruned), "repaired": str(folder / "run" / "model")}
    output = str(folder / "run" / "eval.json")
    evaluate(EvaluateConfig(models=models, data=data, output=output, threads=1), show=False)
    return folder


def card_of(model: Path, **options: Any) -> tuple[dict[str, Any], str]:
    write_card(model, open_source(ModelConfig(path=str(model))), **options)
    text = (model / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_card_of_a_run(work: Path) -> None:
    run = work / "run"
    front, body = card_of(run / "model", run=run)
    assert front["base_model"] == "pruned" and front["library_name"] == "transformers" and "license" not in front
    assert {"sparse", "seft"} <= set(front["tags"])
    result, found = json.loads((run / "result.json").read_text()), json.loads((run / "eval.json").read_text())
    rows = dict(
        line.removeprefix("| ").removesuffix(" |").split(" | ", 1) for line in body.splitlines() if line[:2] == "| "
    )
    assert rows["optimizer steps"] == "4" and rows["density of deltas"] == "5 %" and rows["data"] == "text.jsonl"
    assert rows["loss of the last step"] == str(result["loss"])
    assert rows["layers off their number of zeros"] == "0"
    for name in ("pruned", "repaired"):
        assert f"{found['models'][name]['perplexity']:.4g}" in rows[name]
    weights = sum(layer["weights"] for layer in found["models"]["repaired"]["layers"].values())
    zeros = f"{100 * result['sparsity']['final']:.2f} %"
    assert rows["all targets (14)"].startswith(f"{weights:,} | {zeros}") and zeros in rows["repaired"]
    assert "dense, pruned by wanda to 60 % zeros" in body and str(work) not in body
    assert json.loads((run / "manifest.json").read_text())["model"] in body


def test_card_without_records_says_so(work: Path, tmp_path: Path) -> None:
    model = model_folder(tmp_path / "m")
    front, body = card_of(model)
    assert "base_model" not in front and "seft" not in front["tags"]
    assert "## Sparsity" in body and "## Recipe" not in body and "## Results" not in body and "SEFT" not in body
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(ValueError, match="has no config.yaml"):
        card_of(model, run=run)
    (run / "config.yaml").write_bytes((work / "run" / "config.yaml").read_bytes())
    front, body = card_of(model, run=run, base_model="org/base")
    assert front["base_model"] == "org/base"
    assert "No evaluation was recorded" in body and "result.json is missing" in body
    (run / "eval.json").write_text("[")
    with pytest.raises(ValueError, match=r"eval.json is no JSON"):
        card_of(model, run=run)


def run_export(*arguments: object, code: int = 0) -> str:
    done = run_script("launch/export.py", *arguments, env={"COLUMNS": "200"})
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.mark.slow
def test_the_command_from_run_to_packed_and_back(work: Path, tmp_path: Path) -> None:
    run = work / "run"
    run_export("hf", "--run", run, "--output", tmp_path / "hf", "--shard_gb", 0.00002)
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 1
    assert "# hf\n" in (tmp_path / "hf" / "README.md").read_text()
    assert_same_model(run / "model", tmp_path / "hf")
    said = run_export(
        "pack", "--model", tmp_path / "hf", "--run", run, "--output", tmp_path / "packed", "--dtype", "bfloat16"
    )
    assert "bytes a weight" in said and "load_packed" in (tmp_path / "packed" / "README.md").read_text()
    run_export("unpack", "--model", tmp_path / "packed", "--output", tmp_path / "plain")
    run_export("hf", "--model", run / "model", "--dtype", "bfloat16", "--output", tmp_path / "cast")
    assert_same_model(tmp_path / "cast", tmp_path / "plain")
    assert "is not packed" in run_export("unpack", "--model", tmp_path / "hf", "--output", tmp_path / "x", code=2)
    assert "needs --run or --model" in run_export("hf", "--output", tmp_path / "x", code=2)
    assert "shard_gb=0" in run_export("hf", "--run", run, "--output", tmp_path / "x", "--shard_gb", 0, code=2)
    assert "has no model" in run_export("hf", "--run", tmp_path, "--output", tmp_path / "x", code=2)
    assert "exists already" in run_export("hf", "--run", run, "--output", tmp_path / "hf", code=2)
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_the_command_delta(work: Path, tmp_path: Path) -> None:
    pruned, delta = work / "pruned", work / "run" / "delta.safetensors"
    run_export("delta", "apply", "--base", pruned, "--delta", delta, "--output", tmp_path / "repaired")
    assert_same_model(work / "run" / "model", tmp_path / "repaired")
    run_export("delta", "remove", "--model", tmp_path / "repaired", "--delta", delta, "--output", tmp_path / "removed")
    assert_same_model(pruned, tmp_path / "removed")
    said = run_export("delta", "inspect", "--delta", delta)
    assert "model.layers.0.mlp.up_proj.weight" in said and "on pruned" in said
    run_export(
        "delta", "make", "--base", pruned, "--model", work / "run" / "model", "--output", tmp_path / "d.safetensors"
    )
    run_export(
        "delta", "apply", "--base", pruned, "--delta", tmp_path / "d.safetensors", "--output", tmp_path / "again"
    )
    assert_same_model(work / "run" / "model", tmp_path / "again")
    assert "another pruned" in run_export(
        "delta", "apply", "--base", tmp_path / "again", "--delta", delta, "--output", tmp_path / "x", code=2
    )
    assert "not a 2:4 model" in run_export("check", "--model", pruned, code=2)
    assert not (tmp_path / "x").exists()
