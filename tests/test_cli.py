"""Options of the commands, and what users see when something is wrong."""

import dataclasses
import io
import sys
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch

from seft_dist import config as configs
from seft_dist.config import EvaluateConfig, PruneConfig, TrainConfig
from seft_dist.session.cli import call, option_reader, parse, run, to_yaml
from tests.ranks import run_ranks

PRUNE = ["--model.path=m", "--output=o"]
TRAIN = [*PRUNE, "--data.path=d"]


def test_options_and_files_in_order(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {path: from_file}\nsteps: 50\noptim: {lr: 1e-4, betas: [0.8, 0.9]}\nseft: {density: 0.05}\n"
    )
    found = parse(
        TrainConfig, ["--config", str(recipe), "--output=o", "--data.path=d", "--seft.interval=5", "--steps=70"]
    )
    assert (found.model.path, found.steps, found.optim.lr, found.optim.betas) == ("from_file", 70, 1e-4, (0.8, 0.9))
    assert (found.seft.density, found.seft.interval, found.seft.window) == (0.05, 5, 1)


def test_a_group_that_may_be_left_out() -> None:
    assert parse(PruneConfig, [*PRUNE, "--method=magnitude"]).data is None
    data = parse(PruneConfig, [*PRUNE, "--data.path=d", "--data.seq_len=64"]).data
    assert data is not None and (data.path, data.seq_len) == ("d", 64)


def test_models_by_name() -> None:
    expected = {"a": "x", "b": "y/z"}
    assert parse(EvaluateConfig, ["--models.a=x", "--models.b=y/z", "--data.path=d"]).models == expected
    assert parse(EvaluateConfig, ["--models={a: x, b: y/z}", "--data.path=d"]).models == expected


def test_models_without_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(EvaluateConfig, ["--models", "x", "--data.path=d"])
    assert "Each entry has a name: --models.NAME VALUE" in capsys.readouterr().err
    with pytest.raises(ValueError, match="models is empty: needs at least one, each with a name: --models.NAME FOLDER"):
        parse(EvaluateConfig, ["--data.path=d"])


@pytest.mark.parametrize("extra", [["--local_rank=3"], ["--local_rank", "3"], ["--local-rank=3"]])
def test_deepspeeds_local_rank_is_ignored(extra: list[str]) -> None:
    assert parse(TrainConfig, [*extra, *TRAIN]) == parse(TrainConfig, [*TRAIN, *extra]) == parse(TrainConfig, TRAIN)


def test_printed_configuration_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(TrainConfig, [*TRAIN, "--seft.density=0.03", "--trackers=[wandb]", "--print_config"])
    assert ended.value.code == 0
    (tmp_path / "a.yaml").write_text(capsys.readouterr().out)
    found = parse(TrainConfig, ["--config", str(tmp_path / "a.yaml")])
    assert found == parse(TrainConfig, [*TRAIN, "--seft.density=0.03", "--trackers=[wandb]"])
    assert to_yaml(found) == (tmp_path / "a.yaml").read_text()
    with pytest.raises(ValueError, match="data.path is empty"):
        parse(TrainConfig, PRUNE)
    with pytest.raises(ValueError, match="density=2"):  # a dry run checks, too
        parse(TrainConfig, [*TRAIN, "--seft.density=2", "--print_config"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*TRAIN, "--bogus=1"], "unrecognized arguments: --bogus=1"),
        ([*TRAIN, "--seft.densit=1"], "densit"),
        ([*TRAIN, "--steps=many"], '"steps"'),
        ([*TRAIN, "--seft.grow=luck"], '"seft.grow"'),
        (["--model.path=m", "--data.path=d"], "output"),
        ([*TRAIN, "--config=gone.yaml"], "gone.yaml"),
    ],
)
def test_wrong_options_give_one_short_message(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(TrainConfig, arguments)
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and message in printed and "usage" not in printed and len(printed) < 700


@pytest.mark.parametrize(
    ("config_class", "arguments", "meant"),
    [
        (TrainConfig, ["--seft.densit=1"], "--seft.density"),
        (TrainConfig, ["--densty=1"], "--seft.density"),  # in another group
        (TrainConfig, ["--lr=1e-3"], "--optim.lr"),
        (TrainConfig, ["--save-evry=3"], "--save_every"),
        (TrainConfig, ["--method=masked_loar"], "masked_lora"),
        (TrainConfig, ["--seft.grow=gradien"], "gradient"),
        (PruneConfig, ["--method=wnada"], "wanda"),
        (PruneConfig, ["--data.seqlen=3"], "seq_len"),  # of a group that may be left out
        (EvaluateConfig, ["--modls.a=x"], "--models"),
        (TrainConfig, ["--config=quikstart"], "quickstart"),
    ],
)
def test_misspelled_options_get_a_suggestion(
    config_class: type, arguments: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(config_class, [*PRUNE, *arguments])
    assert f"id you mean {meant}?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "meant"),
    [("seft: {densty: 0.1}", "seft.density"), ("densty: 0.1", "seft.density"), ("metod: seft", "method")],
)
def test_misspelled_keys_of_a_file_get_a_suggestion(
    text: str, meant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(SystemExit):
        parse(TrainConfig, ["--config", str(tmp_path / "a.yaml"), *TRAIN])
    assert f"Did you mean {meant}?" in capsys.readouterr().err


def test_options_of_a_study_get_a_suggestion() -> None:
    read = option_reader(TrainConfig)
    with pytest.raises(ValueError, match=r"methods.a: .*Did you mean --seft.density\?"):
        read([*TRAIN, "--seft.densty=1"], "methods.a")
    with pytest.raises(ValueError, match=r"methods.a: .*Did you mean masked_lora\?"):
        read([*TRAIN, "--method=maskedlora"], "methods.a")
    with pytest.raises(ValueError, match=r"methods.a: .*eval.data.*'pth' is not accepted"):
        read([*TRAIN, '--eval.data={"pth": 1}'], "methods.a")


def test_nothing_is_suggested_for_what_resembles_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--bogus=1"], ["--method=zzz"], ["--steps=many"]):
        with pytest.raises(SystemExit):
            parse(TrainConfig, [*TRAIN, *arguments])
        assert "you mean" not in capsys.readouterr().err


def test_functions_are_called_with_one_line_for_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[int] = []

    def double(number: int, twice: bool = False) -> None:
        """Remember a number."""
        calls.append(number * (2 if twice else 1))

    call({"double": double}, None, ["double", "3", "--twice", "true"])
    assert calls == [6]
    for arguments, meant in ((["duoble"], "double"), (["double", "3", "--twcie=true"], "--twice")):
        with pytest.raises(SystemExit) as ended:
            call({"double": double}, None, arguments)
        printed = capsys.readouterr().err
        assert ended.value.code == 2 and f"Did you mean {meant}?" in printed and "usage" not in printed


def test_unknown_keys_of_a_file_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("model: {path: a, colour: red}", "colour: red", "data: {path: a, colour: red}"):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(SystemExit):
            parse(PruneConfig, ["--config", str(tmp_path / "a.yaml"), *PRUNE])
        assert "colour" in capsys.readouterr().err


@pytest.mark.parametrize("config_class", [TrainConfig, PruneConfig, EvaluateConfig])
def test_help_documents_every_field(config_class: type, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(config_class, ["--help"], "What this does.")
    printed = capsys.readouterr().out
    words = " ".join(printed.split())
    assert "What this does." in words and len(printed.splitlines()[0]) < 80
    groups = {"": config_class, "model.": configs.ModelConfig, "data.": configs.DataConfig}
    groups |= {"seft.": configs.SeftConfig, "optim.": configs.AdamConfig}
    for prefix, group in groups.items():
        names = [field.name for field in dataclasses.fields(config_class)]
        if prefix and prefix[:-1] not in names:
            continue
        for field in dataclasses.fields(group):
            assert f"--{prefix}{field.name}" in words, field.name
    assert "Tokens in a sequence: the length of packed blocks" in words  # docstrings of fields, not only their names


def test_help_keeps_examples_on_lines_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    example = "    seft prune --model.path MODEL --data.path TEXT.jsonl --output PRUNED --sparsity 0.6 --method wanda"
    text = f"Prune a model, {'and so on, ' * 10}for short.\n\n{example}\n    seft files\n\nThe last paragraph."
    with pytest.raises(SystemExit):
        parse(PruneConfig, ["--help"], text)
    printed = capsys.readouterr().out
    assert f"for short.\n\n{example}\n    seft files\n\nThe last paragraph.\n" in printed
    assert max(map(len, printed.partition(example)[0].splitlines())) <= 100  # prose is still wrapped


def said(error: BaseException | None) -> tuple[int, str]:
    """Exit code and printed text of a command that ends with an error."""

    def main() -> None:
        if error is not None:
            raise error

    printed = io.StringIO()
    with redirect_stderr(printed):
        try:
            run(main)
        except SystemExit as ended:
            return int(str(ended.code)), printed.getvalue()
    return 0, printed.getvalue()


def test_errors_of_users_have_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["launch/prune.py"])
    code, printed = said(ValueError("found this: needs that"))
    assert code == 2 and printed.startswith("prune.py: error: found this: needs that")
    assert said(FloatingPointError("loss is nan"))[0] == 2
    assert said(OSError("the disk is full"))[0] == 1
    assert said(None) == (0, "") and said(KeyboardInterrupt()) == (130, "")
    with pytest.raises(RuntimeError):
        said(RuntimeError("a bug"))
    missing = ModuleNotFoundError("No module named 'datasets'", name="datasets.utils")
    assert said(missing) == (
        2,
        "prune.py: error: this needs datasets, which is not installed: pip install 'seft_dist[train]'\n",
    )
    with pytest.raises(ModuleNotFoundError):
        said(ModuleNotFoundError("No module named 'mine'", name="mine"))


def test_foreign_errors_say_where_they_arose() -> None:
    def main() -> None:
        torch.zeros(2).view(int("x"))

    printed = io.StringIO()
    with redirect_stderr(printed), pytest.raises(SystemExit):
        run(main)
    assert "test_cli.py" in printed.getvalue()

    def ours() -> None:
        PruneConfig(model=configs.ModelConfig(path="a"), output="o", sparsity=2)

    with redirect_stderr(printed := io.StringIO()), pytest.raises(SystemExit):
        run(ours)
    assert "raised in" not in printed.getvalue() and "sparsity=2" in printed.getvalue()


def test_several_ranks_speak_once() -> None:
    def rank_fails(rank: int, world_size: int) -> str:
        return said(ValueError("everybody fails"))[1]

    assert sum("everybody fails" in printed for printed in run_ranks(rank_fails, 3)) == 1
