"""Mistakes that trained something else, or nothing, without a word."""

from pathlib import Path
from typing import Any

import pytest
import torch

from seft_dist import SeftConfig, SeftOptimizer
from seft_dist.config import DataConfig, EvalConfig, EvaluateConfig, ModelConfig, PruneConfig, TrainConfig
from seft_dist.data.tokenizer import load_tokenizer
from seft_dist.evaluation.evaluation import evaluate
from seft_dist.io import checkpoint
from seft_dist.optim.notices import SeftWarning
from seft_dist.session.cli import parse
from tests.folders import model_folder
from tests.models import batch, moving, prune_, tiny_llama

CONFIG = moving(density=0.05, interval=4, window=2, steps=8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"grow": "gradients"}, "grow='gradients': needs one of 'gradient', 'momentum', 'random'"),
        ({"scope": "row"}, "scope='row': needs one of 'layer', 'global'"),
        ({"static": "false"}, "static='false': needs a value of type <class 'bool'>"),
        ({"interval": 2.5}, "interval=2.5: needs a value of type <class 'int'>"),
        ({"density": "0.01"}, "density='0.01': needs"),
        ({"targets": ["q_proj"]}, "targets="),
    ],
)
def test_words_and_types_of_the_method_are_checked(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        SeftConfig(**given)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": -0.01}, "lr=-0.01"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"betas": (0.9, 1.0)}, "betas="),
        ({"betas": 0.9}, "betas=0.9: needs two rates"),
        ({"max_grad_norm": 0}, "max_grad_norm=0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
    ],
)
def test_rates_are_checked_as_on_the_command_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        SeftOptimizer(prune_(tiny_llama()), CONFIG, **given)
    assert message in str(error.value)
    SeftOptimizer(prune_(tiny_llama()), CONFIG, lr=0.0)  # a scheduler may begin there


def test_a_list_of_targets_is_no_character_class() -> None:
    with pytest.raises(ValueError, match=r"is a list: needs a regular expression, here 'q_proj\|v_proj'"):
        SeftOptimizer(prune_(tiny_llama()), moving(targets="[q_proj, 'v_proj']"))


@pytest.mark.parametrize("how", ["another copy", "its inner model"])
def test_a_model_that_the_optimizer_does_not_see_is_warned_of(how: str) -> None:
    model: Any = prune_(tiny_llama())
    seft = SeftOptimizer(model, CONFIG)
    other: Any = prune_(tiny_llama())

    def train(called: Any) -> None:
        ids = batch(0)["input_ids"]
        hidden = called.model(input_ids=ids).last_hidden_state
        called.lm_head(hidden.requires_grad_()).sum().backward()
        seft.step()
        seft.zero_grad()

    train(model if how == "its inner model" else other)
    with pytest.warns(SeftWarning, match="nothing is trained. Call the very model"):
        train(model if how == "its inner model" else other)


def test_other_parameters_are_not_taken() -> None:
    model: Any = prune_(tiny_llama())
    seft = SeftOptimizer(model, CONFIG)
    with pytest.raises(ValueError, match="an optimizer of their own"):
        seft.add_param_group({"params": [model.lm_head.weight]})


def test_backward_inside_of_autocast_is_backward_behind_it() -> None:
    def train(inside: bool) -> dict[str, torch.Tensor]:
        model = prune_(tiny_llama())
        seft = SeftOptimizer(model, CONFIG, lr=1e-2)
        for t in range(6):  # the first support, a window and an evolution
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch(t)).loss
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
            seft.step()
            seft.zero_grad()
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    inside, behind = train(True), train(False)
    for name, tensor in behind.items():
        # Gradients are rounded to bf16 elsewhere, so a few positions may be chosen otherwise.
        assert ((inside[name] - tensor).abs() > 0.02).float().mean() < 0.02, name


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "GPT2Tokenizer"])
def test_a_folder_without_a_vocabulary_is_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(f'{{"tokenizer_class": "{kind}"}}')
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match="holds no (vocabulary|tokenizer)"):
        load_tokenizer(ModelConfig(path=str(tmp_path)))


def test_a_share_that_is_held_out_is_not_measured_from_the_other_side() -> None:
    with pytest.raises(ValueError, match="measures what is not held out: needs eval.data.holdout true"):
        EvalConfig(every=5, data=DataConfig(path="text.jsonl", holdout_share=0.1))
    EvalConfig(every=5, data=DataConfig(path="text.jsonl", holdout_share=0.1, holdout=True))


def test_a_first_start_has_no_checkpoint(tmp_path: Path) -> None:
    seft = SeftOptimizer(prune_(tiny_llama()), CONFIG)
    with pytest.raises(ValueError, match="there is no checkpoint to load yet"):
        checkpoint.load(seft, checkpoint.latest(tmp_path))  # type: ignore[arg-type]


def test_an_output_that_cannot_be_written_is_refused_before_the_evaluation(tmp_path: Path) -> None:
    model_folder(tmp_path / "model")
    (tmp_path / "file").touch()
    data = DataConfig(path=str(tmp_path / "no such text.jsonl"))
    models = {"pruned": str(tmp_path / "model")}
    with pytest.raises(ValueError, match=r"output=.*eval.json cannot be written"):
        evaluate(EvaluateConfig(models=models, data=data, output=str(tmp_path / "file" / "eval.json")), show=False)


@pytest.mark.parametrize("more", [[], ["--optim.lr", "1e-3"]])
def test_a_section_without_options_is_named(
    more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text("model: {path: m}\ndata: {path: d}\noutput: o\noptim:\n  # lr: 1.0e-3\n")
    with pytest.raises(SystemExit):
        parse(TrainConfig, ["--config", str(tmp_path / "run.yaml"), *more])
    assert "optim has nothing below it: needs options there, or remove the line" in capsys.readouterr().err
    (tmp_path / "prune.yaml").write_text("model: {path: m}\noutput: o\nsparsity: 0.5\nmethod: magnitude\ndata: null\n")
    assert parse(PruneConfig, ["--config", str(tmp_path / "prune.yaml")]).data is None


def test_entries_of_a_mix_are_given_together(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model.path=m", "--output=o"]
    with pytest.raises(SystemExit):
        parse(TrainConfig, [*given, "--data.mix.a.path", "d", "--data.mix.a.weight", "1"])
    assert "--data.mix '{NAME: {OPTION: VALUE}}'" in capsys.readouterr().err
    mix = parse(TrainConfig, [*given, "--data.mix", "{a: {path: d, weight: 1}}"]).data.mix
    assert mix is not None and mix["a"].path == "d"


def test_a_closure_is_the_same_as_a_backward_pass_before_the_step() -> None:
    def train(closed: bool) -> list[float]:
        model = prune_(tiny_llama())
        seft = SeftOptimizer(model, CONFIG, lr=1e-2)
        losses: list[float] = []

        def backward() -> float:
            seft.zero_grad()
            loss = model(**batch(len(losses))).loss
            loss.backward()
            return float(loss.detach())

        for _ in range(5):
            if closed:
                loss = seft.step(backward)
                assert loss is not None
            else:
                loss = backward()
                seft.step()
            losses.append(loss)
        return losses

    assert train(closed=True) == train(closed=False)
