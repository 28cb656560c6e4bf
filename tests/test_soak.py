"""A few kills of the loop that is otherwise run for hours, and what its checks see."""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tests.preload  # noqa: F401
from benchmarks import soak_checks
from tests.runs import run_config, run_train
from tests.test_launchers import ROOT

pytestmark = pytest.mark.timeout(900)


@pytest.mark.long
def test_killed_runs_end_as_the_undisturbed_one(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/soak.py", "--output", str(tmp_path), "--steps", "6", "--seed", "3"]
    command += ["--kills_of_a_run", "2", "--layouts", "single", "fsdp", "--startup", "6", "--kills"]
    for kills in ("1", "3"):  # it goes on where it was
        done = subprocess.run([*command, kills], cwd=ROOT, capture_output=True, text=True, timeout=800)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    log = [json.loads(line) for line in (tmp_path / "kills.jsonl").read_text().splitlines()]
    assert sum(line["how"] != "finished" for line in log) >= 3 and log[-1]["finished"]
    assert not any(line["problems"] for line in log)


def test_the_checks_see_what_is_wrong(inputs: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    run_train(run_config(inputs, whole, save_every=5))
    shutil.copytree(whole, run)
    args = argparse.Namespace(whole=whole, steps=10, tolerance=1e-5)
    assert soak_checks.wrong_state(args, run, 10) == [] and soak_checks.compare(args, run)["problems"] == []
    metrics = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([*metrics[:4], metrics[3], *metrics[4:]]))
    trace = (run / "trace.jsonl").read_text().splitlines(keepends=True)
    (run / "trace.jsonl").write_text("".join(trace[:3]))
    for name in ("stray.part", "damaged-metrics.jsonl"):
        (run / name).write_text("")
    for name in ("step-00000007", "step-00000008"):
        shutil.copytree(run / "checkpoints" / "step-00000010", run / "checkpoints" / name)
    file = next((run / "checkpoints" / "step-00000010").glob("rank-*"))
    file.write_bytes(file.read_bytes()[:-1])
    said = "; ".join(soak_checks.wrong_state(args, run, 11) + soak_checks.compare(args, run)["problems"])
    for part in (
        "the newest checkpoint was of step 11 and is of 10",
        "4 checkpoints",
        "the newest checkpoint cannot be read",
        "metrics.jsonl has steps [1, 2, 3, 4, 4, 5",
        "trace.jsonl has steps [1, 2, 3] at checkpoint 10",
        "put aside: ['damaged-metrics.jsonl']",
        "names in the folder: ['damaged-metrics.jsonl', 'stray.part']",
    ):
        assert part in said, said


@pytest.mark.parametrize(
    ("found", "right"),
    [
        ({"code": -9, "how": "SIGKILL to a rank"}, True),
        ({"code": 0, "how": "SIGKILL to a rank"}, False),
        ({"code": 0, "how": "SIGUSR1 to a rank", "phase": "steps"}, True),
        ({"code": -10, "how": "SIGUSR1 to a rank", "phase": "steps"}, False),
        ({"code": 130, "how": "SIGINT to the launcher", "phase": "steps"}, True),
        ({"code": 1, "how": "finished"}, False),
        ({"code": 0, "how": "finished"}, False),
        ({"code": 0, "how": "finished", "finished": True}, True),
        ({"code": 1, "how": "SIGKILL to a rank", "layout": "fsdp"}, True),
        ({"code": 0, "how": "SIGKILL to a rank", "layout": "fsdp"}, False),
        ({"code": 2, "how": "SIGKILL to a rank", "layout": "zero3"}, False),
        ({"code": None, "how": "SIGKILL to a rank"}, False),
    ],
)
def test_exit_codes(found: dict[str, object], right: bool) -> None:
    assert (soak_checks.wrong_code({"layout": "single", "finished": False} | found) == []) == right
