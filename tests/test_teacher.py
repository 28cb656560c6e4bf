"""Distillation: the loss is what its formula says, and a teacher is held as the model is and never changes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tests.preload  # noqa: F401
from seft_dist.config import SeftConfig, TeacherConfig
from seft_dist.training import teacher as module
from seft_dist.training.teacher import Teacher, divergence, learnt_positions, relative_distance
from tests.folders import model_folder
from tests.models import VOCAB, prune_, tiny_llama
from tests.runs import digests, ds_file, make_config, records, run_train


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of ``inputs/pruned`` as it was before pruning."""
    return model_folder(tmp_path_factory.mktemp("teacher") / "dense", sparsity=0)


def with_teacher(path: Path, **over: Any) -> TeacherConfig:
    return TeacherConfig(path=str(path), **over)


@pytest.mark.parametrize("tokens", [1, 4, 9])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_and_its_gradient_are_the_formulas(
    tokens: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TEACHER_CHUNK", 4)
    generator = torch.Generator().manual_seed(tokens)
    logits = torch.randn(tokens, 13, generator=generator).requires_grad_()
    wanted = torch.randn(tokens, 13, generator=generator)
    found = divergence(logits, wanted, temperature)
    (gradient,) = torch.autograd.grad(found, logits)
    p = (wanted / temperature).double().softmax(-1)
    q = (logits / temperature).double().softmax(-1)
    expected = (p * (p.log() - q.log())).sum(-1).mean() * temperature**2
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    # d/dx of KL is q - p, over the temperature, times its square, over the number of tokens
    torch.testing.assert_close(gradient, ((q - p) * temperature / tokens).float(), rtol=1e-4, atol=1e-6)


def test_divergence_is_zero_only_where_predictions_are_equal() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert divergence(logits, logits).item() == pytest.approx(0, abs=1e-6)
    assert divergence(logits, logits + 3).item() == pytest.approx(0, abs=1e-6)  # the same predictions
    assert divergence(logits, -logits).item() > 0.1


def test_distance_is_a_share_of_the_teachers_size_at_each_token() -> None:
    wanted = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    assert relative_distance(torch.zeros_like(wanted), wanted).item() == pytest.approx(1)
    assert relative_distance(wanted * 3, wanted).item() == pytest.approx(4)
    larger = wanted * torch.logspace(-3, 3, 6).unsqueeze(1)  # no token outweighs another
    assert relative_distance(larger * 3, larger).item() == pytest.approx(4)
    assert relative_distance(torch.zeros(2, 3), torch.zeros(2, 3)).item() == 0


def batch_with_prompt() -> dict[str, Tensor]:
    """Two sequences whose first tokens are not learnt."""
    ids = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[0, :4], labels[1, :7] = -100, -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize(("share", "hidden"), [(0.5, 0.0), (1.0, 0.0), (0.25, 2.0), (0.0, 1.0)])
def test_loss_has_all_terms_at_the_learnt_tokens_only(share: float, hidden: float) -> None:
    model, teacher, inputs = prune_(tiny_llama(0)), tiny_llama(0), batch_with_prompt()
    config = TeacherConfig(path="x", logits=share, hidden=hidden)
    found = Teacher(teacher, config, "").loss(model, inputs, learnt_positions(inputs))
    own, theirs = (each(**inputs, output_hidden_states=True) for each in (model, teacher))
    at = inputs["labels"][:, 1:] != -100
    expected = (1 - share) * F.cross_entropy(own.logits[:, :-1][at], inputs["labels"][:, 1:][at])
    p, q = (each.logits[:, :-1][at].softmax(-1) for each in (theirs, own))
    expected = expected + share * (p * (p.log() - q.log())).sum(-1).mean()
    layers = [
        ((a[:, :-1][at] - b[:, :-1][at]).square().sum(-1) / b[:, :-1][at].square().sum(-1)).mean()
        for a, b in zip(own.hidden_states[1:], theirs.hidden_states[1:], strict=True)
    ]
    expected = expected + hidden * torch.stack(layers).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    found.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_the_same_model_as_teacher_leaves_its_share_of_cross_entropy(inputs: Path, tmp_path: Path) -> None:
    pruned = inputs / "pruned"
    run_train(make_config(inputs, tmp_path / "plain", steps=2))
    run_train(make_config(inputs, tmp_path / "taught", steps=2, teacher=with_teacher(pruned, logits=0.25)))
    plain, taught = (records(tmp_path / name)[0]["loss"] for name in ("plain", "taught"))
    assert taught == pytest.approx(0.75 * plain, rel=1e-5)


@pytest.fixture(scope="module")
def reference(inputs: Path, dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "single"
    run_train(make_config(inputs, output, teacher=with_teacher(dense, hidden=0.5)))
    return output


def test_a_teacher_changes_the_run(inputs: Path, reference: Path, tmp_path: Path) -> None:
    run_train(make_config(inputs, tmp_path / "plain"))
    assert records(tmp_path / "plain")[0]["loss"] != records(reference)[0]["loss"]
    manifest = json.loads((reference / "manifest.json").read_text())
    assert len(manifest["teacher"]) == 32
    assert json.loads((tmp_path / "plain" / "manifest.json").read_text())["teacher"] is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "world_size", "over"),
    [
        pytest.param("ddp", 2, {"backend": "ddp", "batch_size": 6}, marks=pytest.mark.long),
        pytest.param("fsdp", 3, {"batch_size": 4}, marks=pytest.mark.long),
        ("fsdp", 5, {"batch_size": 2, "global_batch": 12}),  # some ranks have nothing left in the second forward pass
        pytest.param("hsdp", 4, {"batch_size": 3, "replicas": 2}, marks=pytest.mark.long),
        pytest.param("zero2", 2, {"batch_size": 6}, marks=pytest.mark.long),
        ("zero3", 2, {"batch_size": 3, "global_batch": 12}),
    ],
)
def test_every_backend_gives_the_single_run(
    backend: str, world_size: int, over: dict[str, Any], inputs: Path, dense: Path, reference: Path, tmp_path: Path
) -> None:
    if backend.startswith("zero"):
        content = {"zero_optimization": {"stage": int(backend[4])}}
        over = over | {"deepspeed": ds_file(tmp_path, content)}
    config = make_config(inputs, output := tmp_path / "run", teacher=with_teacher(dense, hidden=0.5), **over)
    assert run_train(config, world_size)["backend"] == backend
    losses, expected = ([line["loss"] for line in records(run)] for run in (output, reference))
    assert losses == pytest.approx(expected, abs=2e-4)
    assert digests(output) == digests(reference)
    prints = [json.loads((run / "manifest.json").read_text())["teacher"] for run in (output, reference)]
    assert prints[0] == prints[1]


def test_comparison_methods_learn_from_a_teacher_too(inputs: Path, dense: Path, tmp_path: Path) -> None:
    results = [
        run_train(make_config(inputs, tmp_path / str(i), steps=2, method="masked_full", seft=SeftConfig(), **over))
        for i, over in enumerate(({}, {"teacher": with_teacher(dense)}))
    ]
    assert results[0]["loss"] != results[1]["loss"]


def test_a_run_goes_on_with_its_own_teacher_only(inputs: Path, dense: Path, reference: Path, tmp_path: Path) -> None:
    other = model_folder(tmp_path / "other", sparsity=0.1)
    config = make_config(inputs, tmp_path / "run", save_every=4, teacher=with_teacher(dense, hidden=0.5))
    run_train(config)
    (tmp_path / "run" / "result.json").unlink()  # as if it had been killed while it exported
    for change in (with_teacher(other, hidden=0.5), TeacherConfig()):
        with pytest.raises(Exception, match="use teacher.path as before"):
            run_train(dataclasses.replace(config, teacher=change))
    moved = model_folder(tmp_path / "moved", sparsity=0)  # the same weights elsewhere
    run_train(dataclasses.replace(config, teacher=with_teacher(moved, hidden=0.5)))


@pytest.mark.parametrize(
    ("over", "teach", "message"),
    [
        ({"vocab_size": VOCAB + 2}, {}, f"vocab_size {VOCAB + 2}, the model has {VOCAB}"),
        ({"num_hidden_layers": 3}, {"hidden": 1.0}, "num_hidden_layers 3, the model has 2"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(
    over: dict[str, Any], teach: dict[str, Any], message: str, inputs: Path, tmp_path: Path
) -> None:
    other = tmp_path / "teacher"
    tiny_llama(0, **over).save_pretrained(other)
    with pytest.raises(Exception, match=message):
        run_train(make_config(inputs, tmp_path / "run", teacher=with_teacher(other, **teach)))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_options_of_a_teacher_that_is_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="teacher.logits without teacher.path"):
        TeacherConfig(logits=0.3)
    with pytest.raises(ValueError, match="computed for nothing"):
        TeacherConfig(path="x", logits=0)
