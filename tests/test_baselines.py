"""Comparison methods of `seft train`: each trains, keeps the zeros it promises, and is what its name says."""

import dataclasses
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import tests.preload  # noqa: F401
from seft_dist.baselines import adapted
from seft_dist.baselines.adapted import MaskedLora, Spp
from seft_dist.baselines.trained import ParameterPart
from seft_dist.config import AdamConfig, BaselineConfig, DataConfig, ModelConfig, PruneConfig, SeftConfig, TrainConfig
from seft_dist.data.tokenizer import load_tokenizer
from seft_dist.modules.targets import find_targets
from seft_dist.pruning.masks import Ranking, select_pruned
from seft_dist.pruning.prune import prune_folder
from seft_dist.session.distributed import start
from seft_dist.training import step as training_step
from seft_dist.training import trainer
from seft_dist.training.build import TrainingRun, read_batches
from seft_dist.training.step import lr_factor
from seft_dist.training.trainer import Stopped
from tests.folders import model_folder
from tests.ranks import run_ranks
from tests.runs import make_config, records, run_train, train_to_end, train_until_stopped
from tests.test_families import prepare, train_config, zeros
from tests.test_train import failure

IDS = torch.arange(32).view(2, 16)
SPARSE = ("masked_lora", "spp", "masked_full", "norms_and_biases", "lora_merged")
METHODS = (*SPARSE, "lora")


def config_of(method: str, inputs: Path, output: Path, **over: Any) -> TrainConfig:
    """A run of 20 steps of 12 sequences in one process."""
    baseline: dict[str, Any] = (
        {"rank": 4, "alpha": 8.0} if method in ("lora", "lora_merged", "masked_lora", "spp") else {}
    )
    baseline |= {"sequences": 16} if method == "lora_merged" else {}
    settings = {"steps": 20, "optim": AdamConfig(lr=2e-2, warmup=0.0), "seft": SeftConfig()} | over
    return make_config(inputs, output, method=method, **({"baseline": BaselineConfig(**baseline)} | settings))


def run_seen(config: TrainConfig, world_size: int = 1) -> tuple[dict[str, Any], Tensor]:
    """Train in forked ranks; the result, and the logits of the live model after its last step."""

    def on_rank(rank: int, world: int) -> tuple[dict[str, Any], Any]:
        finish, seen = trainer.finish, []

        def watched(run: TrainingRun, *rest: Any) -> dict[str, Any]:
            with torch.no_grad():
                seen.append(run.model.eval()(input_ids=IDS).logits.float().tolist())
            return finish(run, *rest)

        trainer.finish = watched  # type: ignore[assignment]
        return train_to_end(config), seen[0]

    result, logits = run_ranks(on_rank, world_size)[0]
    return result, torch.tensor(logits)


def logits_of(folder: Path) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=IDS).logits.float()


def loss_on_text(folder: Path, inputs: Path) -> float:
    """Mean loss of the first 24 training sequences."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    config = make_config(inputs, folder)
    stream = read_batches(config, load_tokenizer(config.model), start(threads=1))
    ids = torch.stack([stream.sequences[i][0] for i in range(24)])
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def weights_of(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model" / "model.safetensors")


def losses_of(run: Path) -> list[float]:
    return [line["loss"] for line in records(run)]


def zeros_by_row(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: (value == 0).sum(1) for name, value in weights.items() if "_proj" in name}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_repairs_keeps_its_zeros_and_is_exported(method: str, inputs: Path, tmp_path: Path) -> None:
    if method.startswith("lora"):
        pytest.importorskip("peft")
    result, live = run_seen(config_of(method, inputs, tmp_path / "one"))
    assert result["method"] == method and result["steps"] == 20 and result["peak_memory_bytes"] > 10**7
    pruned, repaired = (loss_on_text(folder, inputs) for folder in (inputs / "pruned", tmp_path / "one" / "model"))
    assert repaired < pruned - 0.02, (pruned, repaired)
    before, after = load_file(inputs / "pruned" / "model.safetensors"), weights_of(tmp_path / "one")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    matrices = {name for name in before if "_proj" in name}
    norms = {name for name in before if "norm" in name}
    assert moved == (norms if method == "norms_and_biases" else matrices)
    off = result["sparsity"]["layers_off_target"]
    assert off == (len(matrices) if method == "lora" else 0)
    if method in SPARSE:
        old, new = zeros_by_row(before), zeros_by_row(after)
        assert all(torch.equal(old[name], new[name]) for name in old)
        assert result["sparsity"]["final"] == result["sparsity"]["target"] == pytest.approx(0.6, abs=0.01)
    exported = logits_of(tmp_path / "one" / "model")
    if method in ("masked_lora", "spp", "masked_full", "norms_and_biases"):
        assert torch.equal(exported, live)
        assert all(torch.equal(before[name] != 0, after[name] != 0) for name in matrices)
    elif method == "lora":
        assert torch.allclose(exported, live, atol=1e-4)

    # The same on two FSDP2 ranks
    model = ModelConfig(path=str(inputs / "pruned"), activation_checkpointing=method == "masked_lora")
    sharded, _ = run_seen(config_of(method, inputs, tmp_path / "two", batch_size=6, model=model), 2)
    assert sharded["backend"] == "fsdp" and sharded["sparsity"] == result["sparsity"]
    assert sharded["trainable"] == result["trainable"] > 0
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), abs=2e-4)


def test_none_writes_the_pruned_model(inputs: Path, tmp_path: Path) -> None:
    result = run_train(config_of("none", inputs, tmp_path / "run"))
    assert result["steps"] == 0 and result["loss"] is None and result["trainable"] == 0
    assert result["sparsity"]["layers_off_target"] == 0
    before, after = load_file(inputs / "pruned" / "model.safetensors"), weights_of(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before) and records(tmp_path / "run") == []


def signalled_in(number: int) -> Callable[[], None]:
    """Send SIGTERM to this rank in the update of a step: the run stops after the next one."""

    def patch() -> None:
        update = training_step.update_weights

        def signalled(run: TrainingRun, step: int) -> float:
            if step == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return update(run, step)

        training_step.update_weights = signalled

    return patch


def run_stopped(config: TrainConfig, world_size: int = 1, *, before: Callable[[], None]) -> Stopped:
    """Train in forked ranks, each with ``before`` called first; where the run stopped."""

    def on_rank(rank: int, world: int) -> Stopped:
        before()
        return train_until_stopped(config)

    return run_ranks(on_rank, world_size)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "ranks"), [("masked_full", 2), ("lora", 1)])
def test_a_stopped_run_goes_on(method: str, ranks: int, inputs: Path, tmp_path: Path) -> None:
    if method == "lora":
        pytest.importorskip("peft")
    over = {"batch_size": 12 // ranks, "steps": 8, "global_batch": 12}
    whole = run_train(config_of(method, inputs, tmp_path / "whole", **over), ranks)
    for name, ranks_after in (("same", ranks), *([("other", 3 - ranks)] if method == "masked_full" else [])):
        run = config_of(method, inputs, tmp_path / name, **over)
        assert run_stopped(run, ranks, before=signalled_in(3)).step == 4
        result = run_train(run, ranks_after)
        assert result["steps"] == 8 and result["sparsity"] == whole["sparsity"]
        if name == "same":
            assert losses_of(tmp_path / name) == losses_of(tmp_path / "whole")
            ours, theirs = weights_of(tmp_path / name), weights_of(tmp_path / "whole")
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert losses_of(tmp_path / name) == pytest.approx(losses_of(tmp_path / "whole"), abs=2e-4)


@pytest.mark.slow
def test_lora_is_peft_in_a_loop_of_ones_own(inputs: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = config_of("lora", inputs, tmp_path / "run", steps=8)
    _, live = run_seen(config)
    model: Any = AutoModelForCausalLM.from_pretrained(inputs / "pruned")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        names = list(find_targets(model))
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=names))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2, weight_decay=0.0)
    stream = read_batches(config, load_tokenizer(config.model), start(threads=1))
    losses = []
    for step, (batch,) in zip(range(1, 9), stream.batches(0), strict=False):
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = 2e-2 * lr_factor(config.optim, step, 8)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses_of(tmp_path / "run") == pytest.approx(losses, rel=1e-5)
    # What is written beside the merged model is what PEFT reads, on the pruned model
    base = AutoModelForCausalLM.from_pretrained(inputs / "pruned")
    read = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    with torch.no_grad():
        assert torch.allclose(read(input_ids=IDS).logits, live, atol=1e-5)
    assert len(load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")) == 2 * len(names)


@pytest.mark.slow
def test_lora_on_a_dense_model_and_pruned_again(inputs: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    dense = {"model": ModelConfig(path=str(model_folder(tmp_path / "dense", sparsity=0)))}
    result = run_train(config_of("lora", inputs, tmp_path / "on_dense", steps=2, **dense))
    assert result["sparsity"] == {"target": 0.0, "final": 0.0, "layers_off_target": 0}
    # lora_merged is what `seft prune` makes of lora's model
    merged = {name: config_of(name, inputs, tmp_path / name, steps=4) for name in ("lora", "lora_merged")}
    for config in merged.values():
        run_train(config)
    data = DataConfig(path=str(inputs / "text.jsonl"), seq_len=16)
    model = ModelConfig(path=str(tmp_path / "lora" / "model"))
    prune_folder(PruneConfig(model=model, data=data, sequences=16, output=str(tmp_path / "again")), progress=False)
    ours, theirs = weights_of(tmp_path / "lora_merged"), load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not (tmp_path / "lora_merged" / "merged").exists()


@pytest.mark.slow
def test_masked_full_is_seft_with_a_delta_at_every_active_weight(tmp_path: Path, inputs: Path) -> None:
    half = {"model": ModelConfig(path=str(model_folder(tmp_path / "half", sparsity=0.5))), "steps": 8}
    run_train(config_of("masked_full", inputs, tmp_path / "full", **half))
    seft = SeftConfig(density=0.5)
    result = run_train(config_of("seft_static_random", inputs, tmp_path / "seft", seft=seft, **half))
    assert (
        result["trainable"]
        == run_train(config_of("masked_full", inputs, tmp_path / "ddp", backend="ddp", batch_size=6, **half), 2)[
            "trainable"
        ]
    )
    for name in ("seft", "ddp"):
        assert losses_of(tmp_path / name) == pytest.approx(losses_of(tmp_path / "full"), rel=1e-5)
        norms = [[line["grad_norm"] for line in records(tmp_path / run)] for run in (name, "full")]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_masked_lora_of_full_rank_over_the_identity_is_masked_full(inputs: Path, tmp_path: Path) -> None:
    """With A = 1 and fixed, and alpha = rank, B is a delta of the weight: nothing else is between the two methods."""
    targets = {"seft": SeftConfig(targets="self_attn|gate_proj|up_proj"), "steps": 6}  # all of 32 inputs
    run_train(config_of("masked_full", inputs, tmp_path / "full", **targets))

    def fix() -> None:
        install = MaskedLora.install

        def with_identity(method: MaskedLora) -> dict[str, nn.Parameter]:
            found = install(method)
            for name in [name for name in found if name.endswith(".A")]:
                nn.init.eye_(found.pop(name).requires_grad_(False))
            return found

        MaskedLora.install = with_identity  # type: ignore[method-assign,assignment]
        MaskedLora.finalize = lambda self, inputs: {}  # type: ignore[method-assign]

    baseline = BaselineConfig(rank=32, alpha=32.0)
    run = config_of("masked_lora", inputs, tmp_path / "lora", baseline=baseline, export=False, **targets)
    run_train(run, before=fix)
    assert losses_of(tmp_path / "lora") == pytest.approx(losses_of(tmp_path / "full"), rel=1e-5)


@pytest.mark.parametrize("kind", [MaskedLora, Spp])
def test_adapted_linears_have_the_gradients_of_plain_autograd(kind: Any) -> None:
    method = object.__new__(kind)
    method.config = TrainConfig(
        model=ModelConfig(path="-"),
        data=DataConfig(path="-"),
        output="-",
        method="spp",
        baseline=BaselineConfig(rank=3),
    )
    torch.manual_seed(0)
    linear = nn.Linear(5, 7)
    linear.weight.data[torch.rand(7, 5) < 0.5] = 0
    linear.requires_grad_(False)
    a, b = (torch.randn(shape, requires_grad=True) for shape in method.adapter_shapes(7, 5))
    x, out = torch.randn(2, 4, 5, requires_grad=True), torch.randn(2, 4, 7)

    def plain() -> Tensor:
        return nn.functional.linear(x, method.combined(linear.weight, method.product(a, b)), linear.bias)

    expected = torch.autograd.grad(plain(), (x, a, b), out)
    found = torch.autograd.grad(adapted._forward(linear, a, b, method)(x), (x, a, b), out)  # type: ignore[arg-type]
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    effective = method.combined(linear.weight, method.product(a, b))
    assert torch.equal(effective != 0, linear.weight != 0) and not torch.equal(effective, linear.weight)


def test_a_parameter_without_a_gradient_has_gradient_0() -> None:
    part = ParameterPart.of("unused", nn.Parameter(torch.ones(2, 3)))
    assert torch.equal(part.grad(), torch.zeros(6))


def test_as_many_weights_are_pruned_as_each_row_or_group_asks_for() -> None:
    torch.manual_seed(0)
    scores, weight = torch.rand(6, 8), torch.randn(6, 8)
    for kind, width in (("row", 8), ("2:4", 4)):
        count = torch.randint(0, width + 1, (48 // width,))
        gone = select_pruned(scores, weight, Ranking(kind, 0.0), None, count)  # type: ignore[arg-type]
        for group, mask, wanted in zip(scores.view(-1, width), gone.view(-1, width), count.tolist(), strict=True):
            assert int(mask.sum()) == wanted
            assert not wanted or wanted == width or group[mask].max() < group[~mask].min()


@pytest.mark.parametrize("method", ["masked_lora", "spp", "masked_full"])
def test_bf16_and_negative_zeros(method: str, inputs: Path, tmp_path: Path) -> None:
    """Small steps are not lost (values are fp32), no weight becomes 0 by the way, and zeros have no sign."""
    folder = model_folder(tmp_path / "pruned", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for target in find_targets(model).values():
        target.weight.data[target.weight == 0] = -0.0
    model.save_pretrained(folder)
    optim = AdamConfig(lr=1e-5, schedule="constant", warmup=0.0)
    config = config_of(method, inputs, tmp_path / "run", model=ModelConfig(path=str(folder)), optim=optim, steps=4)
    result, live = run_seen(config)
    assert result["sparsity"]["layers_off_target"] == 0 and math.isfinite(result["loss"])
    after = weights_of(tmp_path / "run")
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    assert not any(((value == 0) & value.signbit()).any() for value in after.values())
    saved = load_file(next((tmp_path / "run" / "checkpoints").glob("*/rank-*.safetensors")))
    values = {name: value for name, value in saved.items() if name.endswith(".values")}
    assert {value.dtype for value in values.values()} == {torch.float32}
    assert torch.equal(logits_of(tmp_path / "run" / "model"), live)


@pytest.mark.slow
def test_settings_of_seft_by_name(inputs: Path, tmp_path: Path) -> None:
    config = config_of("spiel", inputs, tmp_path / "spiel", seft=SeftConfig(density=0.05, interval=3), steps=10)
    result = run_train(config)
    assert result["method"] == "spiel" and result["sparsity"]["layers_off_target"] > 0
    assert result["sparsity"]["final"] < result["sparsity"]["target"] and result["reactivated"] > 0
    fixed = config_of(
        "seft_fixed_mask", inputs, tmp_path / "fixed", seft=SeftConfig(density=0.05, interval=3), steps=10
    )
    result = run_train(fixed)
    assert result["reactivated"] == 0 and result["evolutions"] > 0 and result["sparsity"]["layers_off_target"] == 0
    before, after = load_file(inputs / "pruned" / "model.safetensors"), weights_of(tmp_path / "fixed")
    assert all(torch.equal(before[name] != 0, after[name] != 0) for name in before)


def test_refused_before_anything_is_written(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "run"
    dense = ModelConfig(path=str(model_folder(tmp_path / "dense", sparsity=0)))
    assert "choose method lora, or set seft.allow_dense" in failure(
        config_of("masked_full", inputs, output, model=dense), 2
    )
    few = config_of("lora_merged", inputs, output, baseline=BaselineConfig(sequences=10**6))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert "baseline.sequences=1000000, but the training data has" in failure(few)
    wide = config_of("spp", inputs, output, baseline=BaselineConfig(rank=33))
    assert "baseline.rank=33 with a target of 32 rows" in failure(wide)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'seft_dist[baselines]'" in failure(config_of("lora", inputs, output), 2)
    assert not output.exists()


def test_a_checkpoint_of_another_method_is_refused(inputs: Path, tmp_path: Path) -> None:
    output, short = tmp_path / "run", {"steps": 4, "save_every": 2, "export": False}
    assert run_stopped(config_of("spp", inputs, output, **short), before=signalled_in(2)).step == 3
    assert "name is masked_full, was spp" in failure(config_of("masked_full", inputs, output, **short))
    assert "name='spp' there, unknown here" in failure(make_config(inputs, output, **short))
    other = BaselineConfig(rank=4, alpha=9.0)
    assert "alpha is 9.0, was 8.0" in failure(config_of("spp", inputs, output, baseline=other, **short), 2)


@pytest.mark.long
@pytest.mark.parametrize(("family", "method"), [("gpt2", "lora_merged"), ("mixtral", "masked_full")])
def test_transposed_and_fused_weights(family: str, method: Any, tmp_path: Path) -> None:
    """On two FSDP2 ranks; what a method cannot do for a kind of weight is said by name."""
    pytest.importorskip("peft")
    folder = prepare(tmp_path, family)
    run = dataclasses.replace(train_config(folder, "fsdp", 2), seft=SeftConfig(), method=method)
    if method == "lora_merged":
        run = dataclasses.replace(run, baseline=BaselineConfig(rank=4, sequences=8))
    result = run_train(run, 2)
    assert result["sparsity"]["layers_off_target"] == 0 and zeros(folder / "fsdp/model") == zeros(folder / "pruned")
    other = dataclasses.replace(run, method="spp", baseline=BaselineConfig(), output=str(folder / "spp"))
    assert "method=spp is not supported for" in failure(other, 2)
