"""Comparison methods do what their names and papers say: pruned again, without decay, within their budget."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from seft_dist.config import (
    AdamConfig,
    BaselineConfig,
    DataConfig,
    EvalConfig,
    EvaluateConfig,
    SeftConfig,
    TrainConfig,
)
from seft_dist.evaluation.evaluation import evaluate
from seft_dist.pruning.calibrate import sample_sequences
from tests.runs import make_config, run_train

REPRUNED: dict[str, Any] = {
    "method": "lora_merged",
    "baseline": BaselineConfig(rank=4, sequences=8),
    "seft": SeftConfig(),
}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_model_that_was_pruned_again_is_evaluated(world_size: int, inputs: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    text = DataConfig(path=str(inputs / "text.jsonl"), seq_len=16)
    over = REPRUNED | {"batch_size": 12 // world_size, "optim": AdamConfig(lr=5e-2)}
    config = make_config(inputs, tmp_path / "run", eval=EvalConfig(data=text, every=5, max_tokens=400), **over)
    result = run_train(config, world_size)
    models = {"model": str(tmp_path / "run" / "model")}
    (measured,) = evaluate(EvaluateConfig(models=models, data=text, max_tokens=400), show=False)
    assert measured.result is not None
    found = result["validation"]
    assert found["exported"]["loss"] == pytest.approx(measured.result.loss, rel=1e-6)
    assert abs(found["last"]["loss"] - found["exported"]["loss"]) > 1e-4  # of LoRA before it is pruned
    assert found["last"]["step"] == found["exported"]["step"] == 10


@pytest.mark.slow
def test_other_methods_have_one_model_to_evaluate(inputs: Path, tmp_path: Path) -> None:
    text = DataConfig(path=str(inputs / "text.jsonl"), seq_len=16)
    result = run_train(make_config(inputs, tmp_path / "run", eval=EvalConfig(data=text, max_tokens=400), steps=4))
    assert "exported" not in result["validation"]


@pytest.mark.slow
def test_separate_documents_are_trained_on_and_pruned_by(inputs: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    data = DataConfig(path=str(inputs / "text.jsonl"), seq_len=16, separate=True)
    result = run_train(make_config(inputs, tmp_path / "run", data=data, steps=4, **REPRUNED))
    assert result["sparsity"]["layers_off_target"] == 0 and (tmp_path / "run" / "model").is_dir()
    assert not (tmp_path / "run" / "merged").exists()


def test_documents_are_cut_apart_for_calibration() -> None:
    ids, positions = torch.arange(7), torch.tensor([0, 1, 2, 0, 0, 1, 2])
    (first, second, third) = sample_sequences([(ids, ids, positions)], 1, 0)
    assert (first.tolist(), second.tolist(), third.tolist()) == ([0, 1, 2], [3], [4, 5, 6])
    (whole,) = sample_sequences([(ids, ids)], 1, 0)
    assert whole.tolist() == list(range(7))


@pytest.mark.slow
def test_norms_and_biases_do_not_decay(inputs: Path, tmp_path: Path) -> None:
    weights = []
    for decay in (0.0, 0.5):
        output = tmp_path / str(decay)
        optim = AdamConfig(lr=1e-2, weight_decay=decay)
        run_train(make_config(inputs, output, method="norms_and_biases", seft=SeftConfig(), optim=optim, steps=4))
        weights.append(load_file(output / "model" / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_spiel_differs_from_the_pruned_model_by_its_budget(inputs: Path, tmp_path: Path) -> None:
    """What leaves its support is as it was: a weight of the pruned model, or a zero."""
    seft = SeftConfig(density=0.05, interval=2, drop_fraction=0.5)
    result = run_train(make_config(inputs, tmp_path / "run", method="spiel", seft=seft, steps=20))
    before = load_file(inputs / "pruned" / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    moved = sum(int((before[name] != after[name]).sum()) for name in before)
    zeros = sum(int(((before[name] == 0) & (after[name] != 0)).sum()) for name in before if "_proj" in name)
    assert 0 < zeros <= moved <= result["trainable"] and result["evolutions"] > 5
    assert result["reactivated"] > zeros  # some left again


@pytest.mark.parametrize(
    ("method", "seft", "said"),
    [
        ("spiel", {"static": True}, "seft.static=True with method=spiel: needs False"),
        ("spiel", {"on_drop": "keep"}, "seft.on_drop=keep with method=spiel: needs revert"),
        ("seft_fixed_mask", {"static": True}, "seft.static=True with method=seft_fixed_mask"),
        ("seft_static", {"init": "random"}, "seft.init=random with method=seft_static: needs gradient"),
        ("lora", {"steps": 7}, "seft.steps=7 in a run of 10 steps: needs it left out"),
        ("seft", {"steps": 7}, "seft.steps=7 in a run of 10 steps: needs it left out"),
        ("seft", {"on_drop": "revert"}, "on_drop=revert with adapt=sensitivity"),
    ],
)
def test_names_are_not_contradicted(method: str, seft: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        make_config(tmp_path, tmp_path / "run", method=method, seft=SeftConfig(**seft))
    assert said in str(error.value)


def test_the_length_of_the_run_may_be_repeated(tmp_path: Path) -> None:
    config: TrainConfig = make_config(tmp_path, tmp_path / "run", seft=SeftConfig(steps=10, interval=3))
    assert dataclasses.replace(config, seft=SeftConfig(interval=3)).total_steps == 10
