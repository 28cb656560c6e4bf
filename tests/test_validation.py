"""Evaluation while a run trains: it changes nothing, it is `seft evaluate`'s, and the best model is kept."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tests.preload  # noqa: F401
from seft_dist.config import AdamConfig, DataConfig, EvalConfig, EvaluateConfig, SeftConfig, TrainConfig
from seft_dist.evaluation.evaluation import evaluate
from seft_dist.io.checkpoint import complete
from seft_dist.training import trainer
from seft_dist.training.trainer import Finished, train
from seft_dist.training.validation import Validation
from tests.folders import text_file
from tests.models import moving
from tests.ranks import run_ranks
from tests.runs import STEPS, ds_file, make_config, records, run_config, run_train

EVERY = 2
SEFT = moving(density=0.05, interval=3, window=2)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Text that the run does not train on."""
    return DataConfig(path=str(text_file(tmp_path_factory.mktemp("held") / "held.jsonl", 20, 57)), seq_len=16)


def evaluated(inputs: Path, output: Path, held_out: DataConfig, **over: Any) -> TrainConfig:
    """A traced run with an evaluation every second step."""
    settings = {"eval": EvalConfig(data=held_out, every=EVERY), "seft": SEFT, "export": "best", "keep": 1}
    return run_config(inputs, output, **(settings | over))


def measured(model: Path, data: DataConfig) -> tuple[float, int]:
    """`seft evaluate`'s loss and number of tokens."""
    (entry,) = evaluate(EvaluateConfig(models={"model": str(model)}, data=data), show=False)
    assert entry.result is not None
    return entry.result.loss, entry.result.num_tokens


def trained(output: Path) -> list[dict[str, Any]]:
    """The lines of a run's trace: exact losses, masks, supports, deltas, weights."""
    return [json.loads(line) for line in (output / "trace.jsonl").read_text().splitlines()]


def evaluations(output: Path) -> dict[int, tuple[float, int]]:
    """Loss and tokens of each evaluation in metrics.jsonl, by step."""
    found = {line["step"]: line["validation"] for line in records(output) if "validation" in line}
    return {step: (entry["loss"], entry["tokens"]) for step, entry in found.items()}


LAYOUTS: list[Any] = [
    ("single", 1),
    pytest.param("ddp", 2, marks=pytest.mark.long),
    ("fsdp", 2),
    pytest.param("hsdp", 4, marks=pytest.mark.long),
    pytest.param("zero2", 2, marks=pytest.mark.long),
    ("zero3", 2),
]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "world_size"), LAYOUTS)
def test_evaluation_changes_nothing_and_is_that_of_evaluate(
    backend: str, world_size: int, inputs: Path, held_out: DataConfig, tmp_path: Path
) -> None:
    over: dict[str, Any] = {"batch_size": 12 // world_size}
    if backend.startswith("zero"):
        over["deepspeed"] = ds_file(tmp_path, {"zero_optimization": {"stage": int(backend[4])}})
    elif backend == "ddp":
        over["backend"] = "ddp"
    elif backend == "hsdp":
        over["replicas"] = 2
    run_train(run_config(inputs, tmp_path / "without", seft=SEFT, **over), world_size)
    result = run_train(evaluated(inputs, tmp_path / "with", held_out, **over), world_size)
    assert trained(tmp_path / "with") == trained(tmp_path / "without")
    found = evaluations(tmp_path / "with")
    assert sorted(found) == list(range(EVERY, STEPS + 1, EVERY))
    best = min(found, key=lambda step: found[step][0])
    assert result["validation"]["best"]["step"] == best and result["validation"]["last"]["step"] == STEPS
    loss, tokens = measured(tmp_path / "with" / "model", held_out)
    assert found[best][0] == pytest.approx(loss, abs=2e-6) and found[best][1] == tokens


def test_the_best_model_outlives_rotation_and_is_exported(inputs: Path, held_out: DataConfig, tmp_path: Path) -> None:
    # A rate that ruins the model later on, so that the best evaluation is not the last
    over: dict[str, Any] = {"optim": AdamConfig(lr=0.5, schedule="constant", warmup=0.0, max_grad_norm=None)}
    over |= {"save_every": 1, "eval": EvalConfig(data=held_out, every=1)}
    config = evaluated(inputs, tmp_path / "best", held_out, **over)
    result = run_train(config)
    found, best = evaluations(tmp_path / "best"), result["validation"]["best"]["step"]
    assert best < STEPS and found[best] == min(found.values())
    steps = [int(path.name.rpartition("-")[2]) for path in complete(tmp_path / "best" / "checkpoints")]
    assert steps == [best, STEPS]
    assert measured(tmp_path / "best" / "model", held_out)[0] == pytest.approx(found[best][0], abs=2e-6)
    assert result["steps"] == STEPS and result["sparsity"]["layers_off_target"] == 0

    run_train(evaluated(inputs, tmp_path / "short", held_out, **(over | {"steps": best, "export": "last"})))
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("best", "short"))
    # the schedule of the drop fraction knows the number of steps, so only the weights before an evolution are equal
    if best < SEFT.interval:
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "world_size"), [("single", 1), ("fsdp", 2)])
def test_a_killed_run_makes_the_same_evaluations(
    backend: str, world_size: int, inputs: Path, held_out: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = evaluated(inputs, tmp_path / "whole", held_out, batch_size=12 // world_size, save_every=5)
    whole = run_train(config, world_size)

    class KilledError(Exception):
        """What stops the first attempt."""

    def on_rank(rank: int, world: int) -> None:
        evaluate_once = Validation.evaluate

        def stop_at_eight(self: Validation, step: int) -> Any:
            if step == 8:
                raise KilledError
            return evaluate_once(self, step)

        Validation.evaluate = stop_at_eight  # type: ignore[method-assign]
        with pytest.raises(KilledError):
            train(dataclasses.replace(config, output=str(tmp_path / "killed")))

    run_ranks(on_rank, world_size)
    shutil.rmtree(tmp_path / "killed" / "diagnosis")
    again = run_train(dataclasses.replace(config, output=str(tmp_path / "killed")), world_size)
    assert evaluations(tmp_path / "killed") == evaluations(tmp_path / "whole")
    for result in (whole, again):
        for entry in (result["validation"]["last"], result["validation"]["best"]):
            del entry["seconds"]
    assert whole["validation"] == again["validation"]
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_early_stopping_ends_the_run_and_a_rerun_does_not_go_on(
    inputs: Path, held_out: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worse = AdamConfig(lr=5.0, schedule="constant", warmup=0.0, max_grad_norm=None)
    settings = EvalConfig(data=held_out, every=1, patience=2)
    config = evaluated(inputs, tmp_path / "run", held_out, optim=worse, eval=settings, trace=False)
    finish = trainer.finish

    def killed(*_: Any) -> Any:
        raise OSError("no export")

    monkeypatch.setattr(trainer, "finish", killed)
    with pytest.raises(OSError, match="no export"):
        train(config)
    monkeypatch.setattr(trainer, "finish", finish)
    done = len(records(tmp_path / "run"))
    outcome = train(config)
    assert isinstance(outcome, Finished)
    found = evaluations(tmp_path / "run")
    best = outcome.result["validation"]["best"]["step"]
    assert outcome.result["validation"]["stopped_early"] and outcome.result["steps"] == best + 2 < STEPS
    assert len(records(tmp_path / "run")) == done == outcome.result["steps"] and sorted(found) == [*range(1, done + 1)]


def test_other_text_than_before_is_refused(inputs: Path, held_out: DataConfig, tmp_path: Path) -> None:
    config = evaluated(inputs, tmp_path / "run", held_out, trace=False, steps=4, save_every=2)
    run_train(config)
    (tmp_path / "run" / "result.json").unlink()
    other = dataclasses.replace(config, steps=6, eval=EvalConfig(data=held_out, every=2, max_tokens=100))
    with pytest.raises(ValueError, match="earlier evaluations of this run were on other text"):
        train(other)


def test_text_that_cannot_be_scored_is_refused_before_anything_is_written(
    inputs: Path, held_out: DataConfig, tmp_path: Path
) -> None:
    config = evaluated(inputs, tmp_path / "run", dataclasses.replace(held_out, path="./nowhere.jsonl"))
    with pytest.raises(ValueError, match=r"eval\.data: .*nowhere"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_a_method_without_steps_is_evaluated_at_its_end(inputs: Path, held_out: DataConfig, tmp_path: Path) -> None:
    over = {"method": "none", "seft": SeftConfig(), "eval": EvalConfig(data=held_out), "export": "best"}
    result = run_train(make_config(inputs, tmp_path / "run", **over))
    loss, tokens = measured(inputs / "pruned", held_out)
    assert result["validation"]["best"]["step"] == 0 and result["validation"]["last"]["tokens"] == tokens
    assert result["validation"]["last"]["loss"] == pytest.approx(loss, abs=2e-6)


@pytest.mark.slow
def test_a_comparison_method_goes_back_to_its_best(inputs: Path, held_out: DataConfig, tmp_path: Path) -> None:
    worse = AdamConfig(lr=5.0, schedule="constant", warmup=0.0, max_grad_norm=None)
    settings = {"optim": worse, "eval": EvalConfig(data=held_out, every=1), "seft": SeftConfig(), "trace": False}
    config = evaluated(inputs, tmp_path / "run", held_out, method="masked_full", batch_size=6, **settings)
    result = run_train(config, 2)
    best = result["validation"]["best"]
    assert best["step"] < STEPS
    assert measured(tmp_path / "run" / "model", held_out)[0] == pytest.approx(best["loss"], abs=2e-6)


def test_positions_on_trial_are_pruned_in_evaluations_and_in_what_is_exported(
    inputs: Path, held_out: DataConfig, tmp_path: Path
) -> None:
    seft = moving(density=0.05, interval=3, reactivate="trial", end=8)
    worse = AdamConfig(lr=5.0, schedule="constant", warmup=0.0, max_grad_norm=None)
    settings = EvalConfig(data=held_out, every=1, patience=1)
    config = evaluated(inputs, tmp_path / "run", held_out, optim=worse, eval=settings, seft=seft, trace=False)
    result = run_train(config)
    best = result["validation"]["best"]
    assert result["validation"]["stopped_early"] and result["sparsity"]["layers_off_target"] == 0
    assert measured(tmp_path / "run" / "model", held_out)[0] == pytest.approx(best["loss"], abs=2e-6)
