"""`seft train`'s run, in forked ranks: every backend gives the same run; what users get and what bad input gets."""

import dataclasses
import json
import os
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tests.preload  # noqa: F401
from seft_dist.config import AdamConfig, DataConfig, ModelConfig, TrainConfig
from seft_dist.session.cli import parse
from seft_dist.training import writer_lock
from seft_dist.training.run_folder import check_run_folder
from seft_dist.training.step import lr_factor
from seft_dist.training.trainer import train
from seft_dist.training.writer_lock import only_writer
from tests.folders import model_folder, text_file
from tests.models import moving
from tests.ranks import run_ranks
from tests.runs import STEPS, digests, ds_file, make_config, records, run_train


@pytest.fixture(scope="module")
def reference(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """One process."""
    output = tmp_path_factory.mktemp("runs") / "single"
    return run_train(make_config(inputs, output)), output


def test_single_run_writes_its_folder(reference: tuple[dict[str, Any], Path]) -> None:
    result, output = reference
    assert sorted(path.name for path in output.iterdir() if path.suffix != ".diff") == [
        "checkpoints",
        "config.yaml",
        "delta.safetensors",
        "layers.json",
        "manifest.json",
        "metrics.jsonl",
        "model",
        "result.json",
        "topology.jsonl",
    ]
    assert json.loads((output / "result.json").read_text()) == result
    assert result["backend"] == "single" and result["world_size"] == 1 and result["density"] == 0.05
    assert result["method"] == "seft" and result["trainable"] > 0 and result["peak_memory_bytes"] > 10**7
    assert result["steps"] == STEPS and result["evolutions"] == 2 and result["tokens"] == STEPS * 12 * 16
    assert result["sparsity"]["layers_off_target"] == 0
    assert result["sparsity"]["final"] == pytest.approx(result["sparsity"]["target"], abs=1e-12)
    lines = records(output)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] == result["loss"] < lines[0]["loss"] - 0.1
    assert [line["step"] for line in lines if "evolution" in line] == [1, 3, 6]
    reactivated = sum(line["evolution"]["reactivated"] for line in lines if "evolution" in line)
    assert reactivated == result["reactivated"] > 0
    assert parse(TrainConfig, ["--config", str(output / "config.yaml")]).steps == STEPS
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    assert model.config.use_cache
    assert model(**tokenizer("w1 w2 w3", return_tensors="pt")).logits.isfinite().all()


LAYOUTS: list[tuple[str, int, dict[str, Any]]] = [
    ("ddp", 2, {"backend": "ddp", "batch_size": 6}),
    ("fsdp", 2, {"backend": "fsdp", "batch_size": 6}),
    ("fsdp", 3, {"batch_size": 4}),
    ("fsdp", 1, {"backend": "fsdp", "batch_size": 3, "global_batch": 12}),
    ("fsdp", 2, {"batch_size": 6, "offload": True}),
    ("fsdp", 5, {"batch_size": 2, "global_batch": 12}),  # some ranks have nothing left in the second forward pass
    ("hsdp", 4, {"batch_size": 3, "replicas": 2}),
    ("zero0", 2, {"batch_size": 6}),
    ("zero1", 2, {"batch_size": 6}),
    ("zero2", 2, {"batch_size": 6}),
    ("zero3", 2, {"batch_size": 6}),
    ("zero3", 2, {"batch_size": 3, "global_batch": 12}),
    ("zero3", 5, {"batch_size": 2, "global_batch": 12}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "world_size", "over"), LAYOUTS)
def test_every_backend_gives_the_single_run(
    backend: str,
    world_size: int,
    over: dict[str, Any],
    inputs: Path,
    reference: tuple[dict[str, Any], Path],
    tmp_path: Path,
) -> None:
    if backend.startswith("zero"):
        over = over | {"deepspeed": ds_file(tmp_path, {"zero_optimization": {"stage": int(backend[4])}})}
    result = run_train(make_config(inputs, output := tmp_path / "run", **over), world_size)
    assert result["backend"] == backend and result["world_size"] == world_size
    assert result["sparsity"]["layers_off_target"] == 0 and result["tokens"] == reference[0]["tokens"]
    losses, expected = ([line["loss"] for line in records(run)] for run in (output, reference[1]))
    assert losses == pytest.approx(expected, abs=2e-4)
    # Sums over ranks differ in the last bits from one process's; nothing here ties so closely that a position differs.
    assert digests(output) == digests(reference[1])


@pytest.mark.slow
def test_bf16_and_activation_checkpointing(inputs: Path, tmp_path: Path) -> None:
    results = {}
    for name, ds in (("fsdp", None), ("zero3", {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}})):
        model = ModelConfig(
            path=str(inputs / "pruned"), dtype="auto" if ds else "bfloat16", activation_checkpointing=name == "fsdp"
        )
        over = {"deepspeed": ds_file(tmp_path, ds)} if ds else {}
        config = make_config(inputs, tmp_path / name, model=model, batch_size=6, **over)
        results[name] = run_train(config, 2, raise_for_other_clipping)
        assert results[name]["sparsity"]["layers_off_target"] == 0
        weights = load_file(tmp_path / name / "model" / "model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
        assert AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").dtype == torch.bfloat16
    assert results["fsdp"]["loss"] == pytest.approx(results["zero3"]["loss"], rel=0.02)


def raise_for_other_clipping() -> None:
    """Make an error of the warning that something else than SEFT clips, as DeepSpeed does unless it is told not to."""
    warnings.filterwarnings("error", message=".*clipped outside of SeftOptimizer")


def test_ds_config_blocks_are_honoured(inputs: Path, tmp_path: Path) -> None:
    blocks = {
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.005, "betas": [0.8, 0.9], "weight_decay": 0.1}},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 0.004, "warmup_num_steps": 4, "warmup_type": "linear"},
        },
        "gradient_clipping": 0.5,
    }
    output = tmp_path / "run"
    run_train(
        make_config(inputs, output, deepspeed=ds_file(tmp_path, blocks), batch_size=6), 2, raise_for_other_clipping
    )
    rates = [line["lr"] for line in records(output)]
    assert rates[-1] == pytest.approx(0.004) and rates[1] < rates[3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps is 3, but global_batch"),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}, 'reduce_bucket_size is "auto"'),
        ({"optimizer": {"type": "Lamb", "params": {}}}, "Lamb"),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "zero_hpz_partition_size"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "nvme"),
    ],
)
def test_ds_config_that_cannot_be_honoured(content: dict[str, Any], message: str, inputs: Path, tmp_path: Path) -> None:
    config = make_config(inputs, tmp_path / "run", deepspeed=ds_file(tmp_path, content))
    assert message in failure(config)
    assert not (tmp_path / "run").exists()


def failure(config: TrainConfig, world_size: int = 1, kind: type[Exception] = ValueError) -> str:
    """Train, which must fail on every rank with the same message, and return it."""

    def on_rank(rank: int, world: int) -> str:
        with pytest.raises(kind) as caught:
            train(config)
        return str(caught.value)

    messages = run_ranks(on_rank, world_size)
    assert len(set(messages)) == 1, messages
    return messages[0]


def test_a_folder_is_used_once(inputs: Path, reference: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    assert "finished run" in failure(make_config(inputs, reference[1]), world_size=2)
    (tmp_path / "slurm").mkdir()  # a batch script writes there before the run
    (tmp_path / "letter.txt").write_text("dear reader")
    assert "holds no run" in failure(make_config(inputs, tmp_path))
    assert (tmp_path / "letter.txt").read_text() == "dear reader" and len(list(tmp_path.iterdir())) == 2
    (tmp_path / "letter.txt").unlink()
    check_run_folder(make_config(inputs, tmp_path))


def test_one_run_at_a_time_writes_to_a_folder(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(inputs, tmp_path / "run", batch_size=6, steps=2)
    with only_writer(tmp_path / "run"):
        with monkeypatch.context() as patch:
            patch.setattr(writer_lock, "PATIENCE", 0.2)
            assert "another process on this machine is writing to" in failure(config, 2)
        pid = os.fork()  # an earlier attempt that is about to end
        if not pid:
            time.sleep(0.5)
            os._exit(0)
    run_train(config, 2)
    os.waitpid(pid, 0)


@pytest.mark.parametrize("world_size", [1, 2])
def test_non_finite_loss_stops_all_ranks(world_size: int, inputs: Path, tmp_path: Path) -> None:
    pruned = model_folder(tmp_path / "pruned")
    model = AutoModelForCausalLM.from_pretrained(pruned)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e38)
    model.save_pretrained(pruned)
    message = failure(
        make_config(inputs, tmp_path / "run", model=ModelConfig(path=str(pruned)), batch_size=6),
        world_size,
        FloatingPointError,
    )
    assert (
        message.startswith("step 1: the loss is not finite on rank 0") and "the weights are those of step 0" in message
    )
    left = {path.name for path in (tmp_path / "run").iterdir() if path.suffix != ".diff"}
    assert left == {"checkpoints", "config.yaml", "diagnosis", "manifest.json", "metrics.jsonl", "topology.jsonl"}
    assert records(tmp_path / "run") == []


def test_bad_models_are_refused_before_anything_is_written(inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    dense = model_folder(tmp_path / "dense", sparsity=0)
    assert "dense" in failure(make_config(inputs, output, model=ModelConfig(path=str(dense)))).lower()
    no_match = make_config(inputs, output, seft=moving(targets="wrong_proj", interval=3))
    assert "wrong_proj" in failure(no_match, 2)
    assert "not a folder" in failure(make_config(inputs, output, model=ModelConfig(path="./nowhere")))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((dense / "config.json").read_text())
    (pickled / "pytorch_model.bin").write_bytes(b"never read")
    assert "save_pretrained" in failure(make_config(inputs, output, model=ModelConfig(path=str(pickled))))
    too_dense = make_config(inputs, output, seft=moving(density=0.9, interval=3), batch_size=6)
    assert "density" in failure(too_dense, 2)
    assert "single" in failure(make_config(inputs, output, backend="single"), 2)
    assert "replicas=3" in failure(make_config(inputs, output, replicas=3), 2)
    ds = ds_file(tmp_path, {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}})
    float32 = ModelConfig(path=str(inputs / "pruned"), dtype="float32")
    assert "bf16" in failure(make_config(inputs, output, deepspeed=ds, model=float32))
    assert not output.exists()


def test_a_tokenizer_of_another_model_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model_folder(tmp_path / "pruned", vocab_size=32)
    text_file(tmp_path / "text.jsonl")
    for world_size in (1, 2):
        message = failure(make_config(tmp_path, tmp_path / "run", batch_size=6), world_size)
        assert "but the model has 32 embeddings: needs the model's own tokenizer" in message
        assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_model_is_refused(inputs: Path, tmp_path: Path) -> None:
    other = model_folder(tmp_path / "other", num_hidden_layers=1)
    (other / "config.json").write_text((inputs / "pruned" / "config.json").read_text())
    for over in ({}, {"deepspeed": ds_file(tmp_path, {"zero_optimization": {"stage": 3}})}):
        config = make_config(inputs, tmp_path / "run", model=ModelConfig(path=str(other)), batch_size=6, **over)
        assert "model.layers.1.input_layernorm.weight" in failure(config, 2)
    wide = model_folder(tmp_path / "wide", intermediate_size=64)
    (wide / "config.json").write_text((inputs / "pruned" / "config.json").read_text())
    assert "has shape (64, 32)" in failure(make_config(inputs, tmp_path / "run", model=ModelConfig(path=str(wide))), 1)


def as_if_killed(run: Path, step: int) -> None:
    """Take a finished run back to the moment after a checkpoint, in the middle of writing a later line."""
    for name in ("result.json", "delta.safetensors"):
        (run / name).unlink()
    for path in (run / "checkpoints").glob("step-*"):
        if path.name != f"step-{step:08d}":
            shutil.rmtree(path)
    metrics = run / "metrics.jsonl"
    metrics.write_text((lines := metrics.read_text())[: lines.index(f'{{"step": {step + 3}') + 20])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["single", "ddp", "fsdp", "zero2", "zero3"])
def test_a_stopped_run_goes_on(backend: str, inputs: Path, tmp_path: Path) -> None:
    world_size = 1 if backend == "single" else 2
    over: dict[str, Any] = {"save_every": 5, "log_every": 2, "batch_size": 12 // world_size}
    if backend.startswith("zero"):
        rate = {"warmup_min_lr": 1e-3, "warmup_max_lr": 1e-2, "warmup_num_steps": 8, "warmup_type": "linear"}
        blocks = {"scheduler": {"type": "WarmupLR", "params": rate}} if backend == "zero2" else {}
        over["deepspeed"] = ds_file(tmp_path, {"zero_optimization": {"stage": int(backend[4])}} | blocks)
    elif backend == "ddp":
        over["backend"] = "ddp"
    config = make_config(inputs, tmp_path / "run", seft=moving(density=0.05, interval=3, window=2), **over)
    whole = run_train(config, world_size)
    weights = tmp_path / "run/model/model.safetensors"
    before = (records(tmp_path / "run"), load_file(weights))
    as_if_killed(tmp_path / "run", 5)
    resumed, after = run_train(config, world_size), (records(tmp_path / "run"), load_file(weights))
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])
    for one, other in zip(before[0], after[0], strict=True):
        for line in (one, one.get("evolution", {}), other, other.get("evolution", {})):
            for key in ("seconds", "tokens_per_second", "bytes_sent", "phases"):  # of this attempt
                line.pop(key, None)
        assert one == other
    of_attempts = {"seconds": 0, "peak_memory_bytes": 0}
    assert whole | of_attempts == resumed | of_attempts


@pytest.mark.slow
def test_going_on_with_other_ranks_and_other_settings(inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    whole = run_train(make_config(inputs, output, batch_size=6, save_every=5), 2)
    expected = digests(output)
    as_if_killed(output, 5)
    assert "global_batch is 6, was 12" in failure(make_config(inputs, output, batch_size=6, global_batch=6))
    assert "seed is 1, was 0" in failure(make_config(inputs, output, batch_size=6, seed=1), 2)
    assert "has done 5 steps, more than steps=4" in failure(make_config(inputs, output, batch_size=6, steps=4), 2)
    text = text_file(tmp_path / "text.jsonl")
    text.write_text(text.read_text().replace("w1 ", "w2 ", 1))  # as many sequences
    data = DataConfig(path=str(text), seq_len=16)
    assert "cannot go on with this data: data is " in failure(make_config(inputs, output, batch_size=6, data=data), 2)
    model = AutoModelForCausalLM.from_pretrained(inputs / "pruned")
    with torch.no_grad():
        model.model.norm.weight[0] += 1  # no target
    shutil.copytree(inputs / "pruned", tmp_path / "other")
    model.save_pretrained(tmp_path / "other")
    changed = make_config(inputs, output, batch_size=6, model=ModelConfig(path=str(tmp_path / "other")))
    assert "another base model: its targets are those of this one, but" in failure(changed, 2)
    other = moving(density=0.04, interval=3)
    assert "density" in failure(make_config(inputs, output, batch_size=6, seft=other), 2)
    zero3 = ds_file(tmp_path, {"zero_optimization": {"stage": 3}})
    resumed = run_train(make_config(inputs, output, batch_size=6, deepspeed=zero3), 3)
    assert digests(output) == expected and resumed["backend"] == "zero3"
    assert resumed["loss"] == pytest.approx(whole["loss"], abs=2e-4) and resumed["tokens"] == whole["tokens"]


def test_ranks_with_different_settings(inputs: Path, tmp_path: Path) -> None:
    def on_rank(rank: int, world: int) -> str:
        with pytest.raises(ValueError) as caught:
            train(make_config(inputs, tmp_path / "run", batch_size=2, seed=int(rank == 2)))
        return str(caught.value)

    for message in run_ranks(on_rank, 3):
        assert message.startswith("rank 2 was given another configuration")


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate(schedule: Any) -> None:
    optim = AdamConfig(schedule=schedule, warmup=0.2)
    factors = [lr_factor(optim, step, 10) for step in range(1, 11)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert all(0 < later <= earlier for earlier, later in zip(factors[2:], factors[3:], strict=False))
    assert factors[-1] == (1.0 if schedule == "constant" else pytest.approx(factors[-1], abs=0.2))
    assert all(lr_factor(dataclasses.replace(optim, warmup=0.0), step, 1) > 0 for step in (1,))


def test_trackers(inputs: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = tmp_path / "run"
    run_train(make_config(inputs, output, batch_size=6, trackers=("tensorboard",), log_every=5), 2)
    assert [line["step"] for line in records(output)] == [1, 3, 5, 6, 10]  # those with an evolution too
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 3, 5, 6, 10]
    assert "evolution.reactivated" in events.Tags()["scalars"]
