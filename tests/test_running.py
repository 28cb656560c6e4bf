"""A run as its user follows it: length in epochs, saving by time, lines in a log, trackers."""

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import tests.preload  # noqa: F401
from seft_dist.config import EvalConfig, TrainConfig
from seft_dist.io.checkpoint import complete
from seft_dist.session.cli import parse
from seft_dist.training import saving, trackers
from seft_dist.training.trackers import Trackers, check_trackers
from seft_dist.training.trainer import train
from tests.models import moving
from tests.ranks import run_ranks
from tests.runs import make_config, records, run_train

TRAIN = ["--model.path", "m", "--data.path", "d", "--output", "o"]


def steps_kept(output: Path) -> list[int]:
    """Steps of a run's checkpoints."""
    return [int(path.name.rpartition("-")[2]) for path in complete(output / "checkpoints")]


def test_epochs_become_steps(inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = make_config(inputs, tmp_path / "run", steps=None, epochs=0.5, seft=moving(density=0.05, interval=3))
    result = run_train(config)
    (sequences,) = re.findall(r"epochs=0\.5: (?:\d+) steps \((\d+) sequences, 12 in a step\)", capfd.readouterr().err)
    assert result["steps"] == -(-int(sequences) // 24)
    resolved = parse(TrainConfig, ["--config", str(tmp_path / "run" / "config.yaml")])
    assert resolved.steps == result["steps"] and resolved.epochs is None


def test_a_schedule_that_does_not_fit_the_epochs_is_refused_before_the_model_is_loaded(
    inputs: Path, tmp_path: Path
) -> None:
    config = make_config(inputs, tmp_path / "run", steps=None, epochs=0.01, seft=moving(end=5, interval=1))
    with pytest.raises(ValueError, match="last evolution would be at step 5 of 1"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_steps_or_epochs_but_not_both() -> None:
    assert parse(TrainConfig, TRAIN).total_steps == 1000
    assert parse(TrainConfig, [*TRAIN, "--epochs", "3"]).epochs == 3
    with pytest.raises(ValueError, match=r"steps=10 with epochs=2.0: needs one of them"):
        parse(TrainConfig, [*TRAIN, "--epochs", "2", "--steps", "10"])


def test_all_ranks_save_by_the_clock_of_the_first(inputs: Path, tmp_path: Path) -> None:
    def on_rank(rank: int, world: int) -> None:
        now = [0.0]
        # Only rank 0's clock moves: 40 s from one look to the next
        clock = types.SimpleNamespace(monotonic=lambda: now.__setitem__(0, now[0] + 40 * (rank == 0)) or now[0])
        saving.time = clock  # type: ignore[assignment]
        train(make_config(inputs, tmp_path / "run", batch_size=6, save_every_minutes=2, keep=9))

    run_ranks(on_rank, 2)
    # every third logged step, and the last one; a save restarts the clock, which takes a look as well
    assert len(steps_kept(tmp_path / "run")) >= 3 and steps_kept(tmp_path / "run")[-1] == 10


def test_keep_is_how_many_checkpoints_stay(inputs: Path, tmp_path: Path) -> None:
    run_train(make_config(inputs, tmp_path / "run", save_every=2, keep=3))
    assert steps_kept(tmp_path / "run") == [6, 8, 10]


def test_a_log_gets_a_line_for_each_logged_step(
    inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = EvalConfig(data=make_config(inputs, tmp_path).data, every=4)
    run_train(make_config(inputs, tmp_path / "run", log_every=2, eval=settings, seft=moving(interval=100)))
    said = capfd.readouterr().err
    assert "eval.data has the very sequences of data" in said
    lines = [line for line in said.splitlines() if re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  step ", line)]
    assert [re.findall(r"step (\d+)/10 ", line) for line in lines] == [["1"], ["2"], ["4"], ["6"], ["8"], ["10"]]
    for line, record in zip(lines, records(tmp_path / "run"), strict=True):
        assert f"  loss {record['loss']:.4f}  " in line and re.search(
            r"  lr \d\.\de-\d\d  \d+ tokens/s  ETA \d:\d\d:\d\d  memory \d\.\d\d GB", line
        )
        assert ("val" in line) == ("validation" in record) == (record["step"] in (4, 8, 10))
    assert "it/s" not in said and "step/s" not in said


def test_trackers_as_they_are_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse(TrainConfig, [*TRAIN, "--trackers", "tensorboard"]).tracker_names == ("tensorboard",)
    assert parse(TrainConfig, [*TRAIN, "--trackers", "tensorboard,wandb"]).tracker_names == ("tensorboard", "wandb")
    assert parse(TrainConfig, [*TRAIN, "--trackers", "[tensorboard, mlflow]"]).tracker_names[1] == "mlflow"
    assert parse(TrainConfig, [*TRAIN, "--trackers", "[]"]).tracker_names == ()
    with pytest.raises(ValueError, match="trackers=tensorbord: needs names out of tensorboard, wandb, mlflow, trackio"):
        parse(TrainConfig, [*TRAIN, "--trackers", "tensorbord"])
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name != "tensorboard" else name)
    with pytest.raises(ValueError, match=r"wandb,mlflow not installed: `pip install wandb mlflow`, .*\[trackers\]"):
        check_trackers(parse(TrainConfig, [*TRAIN, "--trackers", "wandb,tensorboard,mlflow"]))


class Wandb(types.ModuleType):
    """A stand-in for W&B that remembers what it is called with."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.logged: list[int] = []
        self.values: dict[str, Any] = {}
        self.config = types.SimpleNamespace(update=lambda *_, **__: None)
        self.fails = False

    def init(self, **options: Any) -> Any:
        """Begin a run."""
        self.inits.append(options)
        return types.SimpleNamespace(id=options["id"], log=self.log, finish=lambda: None)

    def log(self, values: dict[str, Any], step: int) -> None:
        """Record a step."""
        if self.fails:
            raise ConnectionError("no server")
        self.logged.append(step)
        self.values |= values


def test_a_run_that_goes_on_continues_its_wandb_run(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = Wandb()
    said: list[str] = []
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = make_config(inputs, tmp_path, trackers="wandb", project="pruned", run_name="first try")
    for done in (0, 5):
        each = Trackers(config, done, said.append)
        each.log({"step": done + 1, "loss": 1.0, "validation": {"loss": 2.0}}, done + 1)
        each.close()
    first, second = wandb.inits
    assert first["project"] == "pruned" and first["name"] == "first try" and first["resume"] == "allow"
    assert first["id"] == second["id"] == json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    assert wandb.logged == [1, 6] and not said
    assert wandb.values == {"loss": 1.0, "validation.loss": 2.0}

    each = Trackers(config, 5, said.append)
    wandb.fails = True
    each.log({"step": 7, "loss": 1.0}, 7)
    each.log({"step": 8, "loss": 1.0}, 8)
    assert len(said) == 1 and "wandb has failed" in said[0] and "no server" in said[0]
    monkeypatch.setattr(wandb, "init", wandb.log)
    with pytest.raises(ValueError, match="trackers has wandb, which cannot be started"):
        Trackers(config, 0, said.append)
