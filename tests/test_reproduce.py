"""`seft reproduce`: the commands it works out, and real runs on two layouts, as a user starts them."""

import datetime
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import tests.preload  # noqa: F401
from seft_dist.config import ReproduceConfig, TrainConfig
from seft_dist.reproduce import reproduce as module
from seft_dist.reproduce.reproduce import RunOutcome, all_held, plan_runs, reproduce
from seft_dist.session.cli import parse

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "launch" / "train.py"


def options(inputs: Path, *more: str) -> list[str]:
    return [
        *("--model.path", str(inputs / "pruned"), "--data.path", str(inputs / "text.jsonl"), "--data.seq_len", "16"),
        *("--steps", "5", "--seft.interval", "2", "--seft.density", "0.05", "--batch_size", "3", *more),
    ]


def planned(
    inputs: Path, layouts: str, *more: str, **over: Any
) -> list[tuple[str, str | None, list[str], TrainConfig]]:
    """Name, what it is compared with, launcher and configuration of each run."""
    given = options(inputs, *more)
    config = ReproduceConfig(output="out", layouts=layouts, **over)
    train = parse(TrainConfig, ["--output", "out", *given])
    found = []
    for run in plan_runs(config, train, given, SCRIPT):
        at = run.command.index(str(SCRIPT))
        found.append((run.name, run.against, run.command[:at], parse(TrainConfig, run.command[at + 1 :])))
    return found


def test_every_layout_gets_the_same_run(inputs: Path) -> None:
    runs = planned(
        inputs, "ddp:2, single:1, fsdp:4 --replicas 2, zero3:2, zero3_offload:2", "--trackers", "[tensorboard]"
    )
    assert [(name, against) for name, against, _, _ in runs] == [
        ("1-ddp-2", None),
        ("2-ddp-2", "1-ddp-2"),
        ("3-single-1", "1-ddp-2"),
        ("4-single-1", "3-single-1"),
        ("5-fsdp-4", "1-ddp-2"),
        ("6-fsdp-4", "5-fsdp-4"),
        ("7-zero3-2", "1-ddp-2"),
        ("8-zero3-2", "7-zero3-2"),
        ("9-zero3_offload-2", "1-ddp-2"),
        ("10-zero3_offload-2", "9-zero3_offload-2"),
    ]
    for name, _, _, config in runs:
        assert config.global_batch == 6 and config.threads == 1 and config.trace and config.trackers == ()
        assert config.output == f"out/{name}" and config.model.dtype == "float32" and config.steps == 5
    by_name = {name: (launcher, config) for name, _, launcher, config in runs}
    assert by_name["3-single-1"][0] == [sys.executable]
    assert by_name["5-fsdp-4"][0][-2:] == ["--nproc-per-node", "4"]
    assert by_name["5-fsdp-4"][1].replicas == 2 and by_name["1-ddp-2"][1].backend == "ddp"
    assert by_name["7-zero3-2"][1].deepspeed == str(ROOT / "ds_configs" / "zero3.json")
    assert by_name["9-zero3_offload-2"][1].deepspeed == str(ROOT / "ds_configs" / "zero3_offload.json")


def test_a_recipe_with_a_ds_config_keeps_it_where_it_fits(inputs: Path, tmp_path: Path) -> None:
    ds = tmp_path / "ds.json"
    ds.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}))
    more = ("--deepspeed", str(ds), "--global_batch", "8", "--threads", "3")
    runs = planned(inputs, "zero2:2, zero3:2, single:1", *more, runs=1)
    configs = [config for _, _, _, config in runs]
    assert [config.deepspeed for config in configs] == [str(ds), str(ROOT / "ds_configs" / "zero3_bf16.json"), None]
    assert {config.model.dtype for config in configs} == {"bfloat16"} and {config.threads for config in configs} == {3}
    assert {config.global_batch for config in configs} == {8}
    ds.write_text(json.dumps({"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW", "params": {}}}))
    with pytest.raises(ValueError, match="has its own optimizer, which the layout single would not get"):
        planned(inputs, "zero2:2, single:1", *more)
    assert len(planned(inputs, "zero2:2", *more)) == 2


def test_launcher_of_a_cluster(inputs: Path) -> None:
    runs = planned(inputs, "single:1, fsdp:16", launcher="srun --ntasks={ranks} python", runs=1)
    assert [launcher for _, _, launcher, _ in runs] == [
        ["srun", "--ntasks=1", "python"],
        ["srun", "--ntasks=16", "python"],
    ]


@pytest.mark.parametrize("layouts", ["single:2", "fsdp", "fsdp:0", "zero4:2", "tpu:8"])
def test_layouts_that_cannot_be(layouts: str, inputs: Path) -> None:
    with pytest.raises(ValueError, match="needs BACKEND:RANKS"):
        planned(inputs, layouts)


def test_what_counts_as_held() -> None:
    def outcome(**over: Any) -> RunOutcome:
        return RunOutcome(name="n", layout="l", against=None, command="c", **({"status": "done"} | over))

    first = outcome()
    assert all_held([first]) and all_held([first, outcome(held=True)])
    for other in ({"held": False}, {"held": None}, {"held": True, "status": "failed"}, {"status": "stopped"}):
        assert not all_held([first, outcome(held=True), outcome(**other)])
    assert not all_held([outcome(status="failed")])


def command(inputs: Path, output: Path, layouts: str, *more: str) -> list[str]:
    command = [sys.executable, "launch/reproduce.py", "--output", str(output), "--layouts", layouts]
    before = [word for word in more if word.startswith("--runs")]
    return [*command, *before, "--", *options(inputs, *(word for word in more if not word.startswith("--runs")))]


def clean_environment() -> dict[str, str]:
    known = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR", "OMP_NUM_THREADS")
    return {key: value for key, value in os.environ.items() if key not in known} | {"PYTHONPATH": str(ROOT)}


def run_script(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=280, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("repeats", [1, pytest.param(2, marks=pytest.mark.long)])
def test_two_layouts_and_again(repeats: int, inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = run_script(command(inputs, output, "single:1, fsdp:2", f"--runs={repeats}"))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "every promise was kept" in done.stdout
    content = json.loads((output / "reproduce.json").read_text())
    runs = content["runs"]
    one, two = runs[:repeats], runs[repeats:]
    assert content["held"] and len(two) == repeats
    assert two[0]["verdict"] in ("bitwise equal", "equal within docs/numerics.md")
    assert two[0]["against"] == one[0]["name"]
    for first, second in ((each[0], each[1]) for each in (one, two) if repeats == 2):
        assert second["verdict"] == "bitwise equal" and second["against"] == first["name"]
        assert second["digest"] == first["digest"]
    assert json.loads((output / f"{two[0]['name']}.json").read_text())["steps"] == 5
    for run in runs:
        assert (output / f"{run['name']}.log").read_text()
    times = {path: path.stat().st_mtime_ns for path in output.rglob("result.json")}
    given = options(inputs)
    config = ReproduceConfig(output=str(output), layouts="single:1, fsdp:2", runs=repeats)
    train = parse(TrainConfig, ["--output", str(output), *given])
    again = reproduce(config, train, given, SCRIPT)  # nothing is left to do but to compare
    assert all_held(again) and {path: path.stat().st_mtime_ns for path in times} == times
    with pytest.raises(ValueError, match="holds another check"):
        reproduce(config, train, [*given, "--seed", "1"], SCRIPT)


def test_a_dated_template_sees_one_day_in_all_runs(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NextDay(datetime.date):
        @classmethod
        def today(cls) -> "NextDay":
            return cls(2031, 2, 3)

    given, output = options(inputs), tmp_path / "out"
    train = parse(TrainConfig, ["--output", str(output), *given])
    config = ReproduceConfig(output=str(output), runs=1, layouts="single:1, fsdp:2")
    monkeypatch.setattr(module, "_execute", lambda *_: None)  # as if a signal had come before the first run

    def days() -> list[str | None]:
        words = [shlex.split(outcome.command) for outcome in reproduce(config, train, given, SCRIPT)]
        return [one[one.index("--data.date") + 1] if "--data.date" in one else None for one in words]

    assert days() == [None, None]  # this tokenizer's template writes no date
    shutil.rmtree(output)
    monkeypatch.setattr(module, "uses_date", lambda tokenizer: True)
    today = datetime.date.today().isoformat()
    assert days() == [today, today]
    monkeypatch.setattr(datetime, "date", NextDay)
    assert days() == [today, today]  # the check goes on after midnight
    shutil.rmtree(output)
    assert days() == ["2031-02-03"] * 2
    train = parse(TrainConfig, ["--output", str(output), *given, "--data.date", "2030-01-01"])
    shutil.rmtree(output)
    assert days() == [None, None]  # it is among the user's own options, which every run gets


@pytest.mark.long
def test_a_changed_run_and_one_that_fails(inputs: Path, tmp_path: Path) -> None:
    layouts = "single:1, single:1 --optim.lr 0.002, single:1 --seft.targets nothing_like_this"
    done = run_script(command(inputs, tmp_path / "out", layouts, "--runs=1"))
    assert done.returncode == 1, done.stderr[-3000:]
    assert "2-single-1 against 1-single-1: differs: first at step 1, learning rate" in done.stdout
    assert "layer model.layers.0.self_attn.q_proj: deltas" in done.stdout
    assert "3-single-1 failed with exit status 2" in done.stdout and "targets=" in done.stdout
    assert "not every promise was kept" in done.stdout and "Traceback" not in done.stdout
    content = json.loads((tmp_path / "out" / "reproduce.json").read_text())
    assert [run["status"] for run in content["runs"]] == ["done", "done", "failed"] and not content["held"]


@pytest.mark.long
def test_a_stopped_check_goes_on(inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    more = ("--steps", "150", "--export", "false")
    words = command(inputs, output, "single:1", *more, "--runs=1")
    process = subprocess.Popen(
        words, cwd=ROOT, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    trace, deadline = output / "1-single-1" / "trace.jsonl", time.monotonic() + 120
    while not (trace.is_file() and trace.read_text().count("\n") > 5):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "1-single-1 was stopped" in said
    assert not (output / "1-single-1" / "result.json").exists()
    given = options(inputs, *more)
    config = ReproduceConfig(output=str(output), runs=1)
    (outcome,) = reproduce(config, parse(TrainConfig, ["--output", str(output), *given]), given, SCRIPT)
    attempts = json.loads((output / "1-single-1" / "manifest.json").read_text())["attempts"]
    assert outcome.status == "done" and len(attempts) == 2 and attempts[1]["first_step"] > 1, "it did not go on"
    assert trace.read_text().count("\n") == 150


def test_errors_of_users_come_before_any_run(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = options(inputs)
    train = parse(TrainConfig, ["--output", "out", *given])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    with pytest.raises(ValueError, match="holds no check"):
        reproduce(ReproduceConfig(output=str(tmp_path / "full")), train, given, SCRIPT)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="start it once"):
        reproduce(ReproduceConfig(output=str(tmp_path / "new")), train, given, SCRIPT)
    assert not (tmp_path / "new").exists()
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable)
    for content in ("", "{}", '{"runs": []}', '{"runs": [{}]}'):
        (tmp_path / "full" / "reproduce.json").write_text(content)
        with pytest.raises(ValueError, match=r"full/reproduce.json (is no JSON|does not hold what is needed)"):
            reproduce(ReproduceConfig(output=str(tmp_path / "full")), train, given, SCRIPT)
    done = run_script([sys.executable, "launch/reproduce.py", "--output", str(tmp_path / "x"), "--", "--nonsense", "1"])
    assert done.returncode == 2 and "nonsense" in done.stderr and not (tmp_path / "x").exists()
