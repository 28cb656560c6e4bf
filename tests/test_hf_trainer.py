"""SEFT in transformers.Trainer and accelerate does what it does in a loop of one's own."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from safetensors.torch import load_file

from seft_dist import SeftOptimizer
from seft_dist.io import checkpoint
from seft_dist.optim.notices import SeftWarning
from tests.hf_trainers import CONFIG, DATA, LR, STEPS, same_topology, train
from tests.layouts import snapshot
from tests.models import moving, prune_, tiny_llama
from tests.ranks import run_ranks

LAYOUTS = ["ddp", "fsdp", pytest.param("zero2", marks=pytest.mark.long), "zero3"]


def _own_loop(bf16: bool = False, gradient_checkpointing: bool = False) -> dict[str, Any]:
    """Train as tests/hf_trainers.py's Trainer does, in its order of data, without it."""
    model: Any = prune_(tiny_llama())
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    seft = SeftOptimizer(model, moving(density=0.05, interval=4, window=2, steps=STEPS), lr=LR, max_grad_norm=0.5)
    losses, norms = [], []
    for t in range(STEPS):
        seft.param_groups[0]["lr"] = LR * (1 - t / STEPS)
        chosen = DATA[4 * t : 4 * t + 4]
        rows = {key: torch.stack([row[key] for row in chosen]) for key in chosen[0]}
        parts = [{key: value[begin : begin + 2] for key, value in rows.items()} for begin in (0, 2)]
        mean = 0.0
        for part in parts:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(**part).loss / 2
            loss.backward()
            mean += loss.item()
        seft.step()
        seft.zero_grad()
        losses.append(mean)
        norms.append(seft.grad_norm)
    return {"losses": losses, "norms": norms, "state": snapshot(model, seft)}


def test_trainer_is_the_same_loop_and_resumes_exactly(tmp_path: Path) -> None:
    whole = train(0, 1, "single", tmp_path, save_strategy="steps")
    own = _own_loop()
    assert whole["steps"] == STEPS and whole["max_grad_norm"] == 0.5
    assert whole["losses"] == pytest.approx(own["losses"], abs=1e-5)
    assert whole["norms"] == pytest.approx(own["norms"], rel=1e-4) and max(whole["norms"]) > 0.5
    assert same_topology(whole["state"], own["state"])
    shutil.rmtree(tmp_path / "checkpoint-9")
    resumed = train(0, 1, "single", tmp_path, tmp_path / "checkpoint-6")
    assert resumed["losses"] == whole["losses"] and resumed["norms"] == whole["norms"]
    for name, layer in resumed["state"].items():
        for key in ("mask", "support", "values", "weight"):
            assert torch.equal(layer[key], whole["state"][name][key]), (name, key)


@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True}])
def test_precision_and_checkpointing_of_trainer_are_those_of_a_loop(options: dict[str, Any], tmp_path: Path) -> None:
    whole, own = train(0, 1, "single", tmp_path, save_strategy="no", **options), _own_loop(**options)
    assert whole["losses"] == pytest.approx(own["losses"], abs=1e-5)
    assert whole["norms"] == pytest.approx(own["norms"], rel=1e-4)
    assert same_topology(whole["state"], own["state"])
    usual = _own_loop()["losses"]
    assert (whole["losses"] == pytest.approx(usual, abs=1e-5)) == ("bf16" not in options)


def test_sft_trainer_evaluates_resumes_and_goes_back(tmp_path: Path) -> None:
    whole = train(0, 1, "single", tmp_path, sft=True)
    resumed = train(0, 1, "single", tmp_path, tmp_path / "checkpoint-6", sft=True)
    assert resumed["losses"] == whole["losses"] and same_topology(whole["state"], resumed["state"])
    assert all(torch.equal(layer["weight"], whole["state"][name]["weight"]) for name, layer in resumed["state"].items())
    best = train(0, 1, "single", tmp_path / "best", sft=True, **(BEST | {"metric_for_best_model": "eval_loss"}))
    assert best["steps"] == int(best["best"].rpartition("-")[2]) < STEPS


BEST: dict[str, Any] = {
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": True,  # the largest loss is not the last
    "eval_strategy": "steps",
    "eval_steps": 3,
}


def test_the_optimizer_goes_back_to_the_best_model(tmp_path: Path) -> None:
    best = train(0, 1, "single", tmp_path, **BEST)
    step = int(best["best"].rpartition("-")[2])
    assert best["steps"] == step < STEPS
    stopped = train(0, 1, "single", tmp_path / "stopped")
    assert not same_topology(best["state"], stopped["state"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [*(pytest.param(layout, marks=pytest.mark.long) for layout in ("ddp", "zero2")), "fsdp", "zero3"]
)
def test_two_ranks_go_back_to_the_best_model_of_one(layout: str, tmp_path: Path) -> None:
    def on_rank(rank: int, world: int) -> Any:
        return train(rank, world, layout, tmp_path / "two", **BEST)

    two, other = run_ranks(on_rank, 2)
    one = train(0, 1, "single", tmp_path / "one", **BEST)
    assert two["steps"] == other["steps"] == one["steps"] < STEPS
    assert same_topology(two["state"], one["state"])
    for name, layer in one["state"].items():
        assert torch.allclose(two["state"][name]["weight"], layer["weight"], atol=1e-4), name


@pytest.mark.slow
def test_trainer_compiles(tmp_path: Path) -> None:
    eager = train(0, 1, "single", tmp_path, save_strategy="no")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options: dict[str, Any] = {"torch_compile": True, "torch_compile_backend": "aot_eager", "save_strategy": "no"}
    compiled = train(0, 1, "single", tmp_path, **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] and not torch._dynamo.utils.counters["graph_break"]
    assert same_topology(compiled["state"], eager["state"])
    assert compiled["losses"] == pytest.approx(eager["losses"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_trainer_on_two_ranks_is_trainer_on_one_and_resumes(layout: str, tmp_path: Path) -> None:
    one = train(0, 1, "single", tmp_path / "one", save_strategy="no")
    two = run_ranks(train, 2, layout, tmp_path / "two")[0]
    assert same_topology(one["state"], two["state"])
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-4)
    if layout == "fsdp":  # save_model() writes no weights then
        from accelerate.utils import merge_fsdp_weights

        merge_fsdp_weights(str(tmp_path / "two/checkpoint-9/pytorch_model_fsdp_0"), str(tmp_path / "merged"))
        merged = load_file(tmp_path / "merged/model.safetensors")
        for name, layer in two["state"].items():
            assert torch.equal(merged[f"{name}.weight"].view(-1), layer["weight"]), name
        tiny_llama().load_state_dict(merged, strict=True)
    resumed = run_ranks(train, 2, layout, tmp_path / "two", tmp_path / "two" / "checkpoint-6")[0]
    assert resumed["losses"] == two["losses"]
    for name, layer in resumed["state"].items():
        for key in ("mask", "support", "values", "weight"):
            assert torch.equal(layer[key], two["state"][name][key]), (name, key)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp", pytest.param("zero3", marks=pytest.mark.long)])
def test_sft_trainer_on_two_ranks_is_trainer_on_one_and_resumes(layout: str, tmp_path: Path) -> None:
    best = BEST | {"metric_for_best_model": "eval_loss"}

    def on_rank(rank: int, world: int) -> Any:
        folder = tmp_path / "two"
        whole = train(rank, world, layout, folder, sft=True)
        resumed = train(rank, world, layout, folder, folder / "checkpoint-6", sft=True)
        return whole, resumed, train(rank, world, layout, tmp_path / "best", sft=True, **best)

    one, (two, resumed, gone_back) = (
        train(0, 1, "single", tmp_path / "one", save_strategy="no"),
        run_ranks(on_rank, 2)[0],
    )
    assert same_topology(one["state"], two["state"])
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert resumed["losses"] == two["losses"]
    assert all(torch.equal(layer["weight"], two["state"][name]["weight"]) for name, layer in resumed["state"].items())
    assert gone_back["steps"] == int(gone_back["best"].rpartition("-")[2]) < STEPS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "bf16"),
    # with DeepSpeed, Trainer takes bf16 on GPUs only
    [("fsdp", True), ("fsdp", False), pytest.param("zero3", False, marks=pytest.mark.long)],
)
def test_precision_and_checkpointing_on_two_ranks(layout: str, bf16: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"bf16": bf16, "gradient_checkpointing": True, "save_strategy": "no"}

    def on_rank(rank: int, world: int) -> Any:
        return train(rank, world, layout, tmp_path / "two", **options)

    two, one = run_ranks(on_rank, 2)[0], train(0, 1, "single", tmp_path / "one", **options)
    # In bf16 sums differ between layouts, and so, in the end, do supports
    assert two["losses"] == pytest.approx(one["losses"], abs=0.1 if bf16 else 1e-5)
    assert bf16 or same_topology(two["state"], one["state"])
    assert all(layer["mask"].sum() == one["state"][name]["mask"].sum() for name, layer in two["state"].items())
    if bf16:
        exact = train(0, 1, "single", tmp_path / "fp32", **(options | {"bf16": False}))
        assert two["losses"] != pytest.approx(exact["losses"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [*(pytest.param(layout, marks=pytest.mark.long) for layout in ("ddp", "zero2", "zero3")), "fsdp"]
)
def test_two_ranks_compile_and_are_one_in_eager_mode(layout: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"torch_compile": True, "torch_compile_backend": "aot_eager", "save_strategy": "no"}

    def on_rank(rank: int, world: int) -> Any:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        return train(rank, world, layout, tmp_path / "two", **options), dict(torch._dynamo.utils.counters["stats"])

    one, (two, stats) = train(0, 1, "single", tmp_path / "one", save_strategy="no"), run_ranks(on_rank, 2)[0]
    assert stats["unique_graphs"]
    assert same_topology(one["state"], two["state"])
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)


def test_a_resumed_run_without_masks_and_deltas_is_refused(tmp_path: Path) -> None:
    train(0, 1, "single", tmp_path, max_steps=9)
    shutil.rmtree(tmp_path / "checkpoint-9" / "seft")
    with pytest.raises(
        ValueError, match=r"no complete checkpoint of SEFT.*the newest in output_dir: \S+/checkpoint-6\)"
    ):
        train(0, 1, "single", tmp_path, tmp_path / "checkpoint-9", max_steps=9)


@pytest.mark.parametrize("dies", ["seft", "trainer", "after both"])
def test_a_run_that_dies_while_it_saves_goes_on(dies: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though Trainer keeps one checkpoint only: the older one is deleted when all of the newer one is there."""
    import transformers

    class Killed(BaseException):
        pass

    place, name = {
        "seft": (checkpoint, "save"),
        "trainer": (transformers.Trainer, "save_model"),
        "after both": (transformers.trainer, "rotate_checkpoints"),
    }[dies]
    intact = getattr(place, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        if "checkpoint-6" in str(args):
            raise Killed
        done = intact(*args, **kwargs)
        if dies == "after both" and (tmp_path / "killed/checkpoint-6").exists():
            raise Killed
        return done

    whole = train(0, 1, "single", tmp_path / "whole", save_strategy="no")
    with monkeypatch.context() as patched:
        patched.setattr(place, name, dying)
        with pytest.raises(Killed):
            train(0, 1, "single", tmp_path / "killed", save_total_limit=1)
    last = tmp_path / f"killed/checkpoint-{6 if dies == 'after both' else 3}"
    resumed = train(0, 1, "single", tmp_path / "killed", last, save_total_limit=1)
    assert resumed["losses"] == whole["losses"]
    for name, layer in resumed["state"].items():
        assert torch.equal(layer["weight"], whole["state"][name]["weight"]), name


def test_trainer_takes_an_optimizer(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    from seft_dist.integrations.transformers import SeftCallback

    args = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=2, report_to="none", logging_steps=1)
    model = prune_(tiny_llama())
    seft = SeftOptimizer(model, CONFIG)
    trainer = Trainer(model, args, train_dataset=DATA, optimizers=(seft, None))
    SeftCallback.add_to(trainer)
    trainer.train()
    assert seft.num_steps == 2 and seft.config.steps == 2
    assert [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry][-1] == seft.grad_norm > 0


def test_what_trainer_would_train_otherwise_is_refused_or_warned_of(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    from seft_dist.integrations.transformers import SeftCallback

    def make(on: Any, config: Any = CONFIG, **over: Any) -> Any:
        args = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=2, report_to="none", save_strategy="no", **over)
        model = prune_(tiny_llama())
        seft = SeftOptimizer(model if on is None else on, config)
        trainer = Trainer(model, args, train_dataset=DATA, eval_dataset=DATA[:2], optimizers=(seft, None))
        SeftCallback.add_to(trainer)
        return trainer

    with pytest.raises(ValueError, match="made on another model than Trainer trains"):
        make(prune_(tiny_llama())).train()
    trainer = make(None)
    trainer.train()
    with pytest.raises(ValueError, match="has done 2 steps, and Trainer begins with step 1"):
        trainer.train()
    best = {"load_best_model_at_end": True, "eval_strategy": "no"}
    with pytest.raises(ValueError, match="reactivate=trial with load_best_model_at_end"):
        make(None, moving(density=0.05, interval=4, reactivate="trial"), **best).train()
    with pytest.warns(UserWarning, match="weight_decay of TrainingArguments have no effect"):
        make(None, weight_decay=0.1).train()


def test_what_the_callback_is_told(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    from seft_dist.integrations.transformers import SeftCallback

    def make(output: str, callbacks: Any = None, config: Any = CONFIG, **over: Any) -> Any:
        given = {"max_steps": 3, "report_to": "none", "save_steps": 2} | over
        args = TrainingArguments(str(tmp_path / output), use_cpu=True, **given)
        model = prune_(tiny_llama())
        seft = SeftOptimizer(model, config)
        return Trainer(model, args, train_dataset=DATA, optimizers=(seft, None), callbacks=callbacks)

    with pytest.raises(ValueError, match=r"SeftConfig.steps=7, but Trainer takes 3 optimizer steps"):
        make("a", [SeftCallback()], moving(density=0.05, interval=4, steps=7)).train()
    with pytest.warns(UserWarning, match=r"tensorboard get Trainer's grad_norm"):
        make("b", [SeftCallback()], report_to="tensorboard").train()
    with pytest.warns(SeftWarning, match=r"saves or evaluates between two evolutions have positions on trial"):
        make("c", [SeftCallback()], moving(density=0.05, interval=2, reactivate="trial")).train()
    trainer = make("d", [SeftCallback()], save_only_model=True)
    trainer.train()
    assert (tmp_path / "d/checkpoint-2/config.json").exists() and not (tmp_path / "d/checkpoint-2/seft").exists()
    elsewhere = shutil.move(tmp_path / "b/checkpoint-2", tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=r"name the one that Trainer resumes from \(SeftCallback\(resume_from=...\)\)"):
        make("e", [SeftCallback()]).train(resume_from_checkpoint=str(elsewhere))
    resumed = make("f", [SeftCallback(resume_from=elsewhere)])
    resumed.train(resume_from_checkpoint=str(elsewhere))
    assert resumed.optimizer.optimizer.num_steps == 3 and resumed.state.global_step == 3


def test_a_trainer_that_resumes_itself_saves_the_same_step_again(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    from seft_dist.integrations.transformers import SeftCallback

    args = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=4, save_steps=2, report_to="none")
    model = prune_(tiny_llama())
    trainer = Trainer(model, args, train_dataset=DATA, optimizers=(SeftOptimizer(model, CONFIG), None))
    SeftCallback.add_to(trainer)
    trainer.train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert checkpoint.latest(tmp_path / "checkpoint-4" / "seft") is not None


def test_another_optimizer_in_trainer_is_named(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    from seft_dist.integrations.transformers import SeftCallback

    args = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=2, report_to="none")
    model = prune_(tiny_llama())
    SeftOptimizer(model, CONFIG)
    trainer = Trainer(model, args, train_dataset=DATA, callbacks=[SeftCallback()])
    with pytest.raises(ValueError, match="optimizer AdamW, not SeftOptimizer"):
        trainer.train()
