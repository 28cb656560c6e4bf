"""The batch scripts on a real Slurm with the real commands and a tiny model: two nodes, gloo."""

import csv
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests import slurm
from tests.folders import model_folder, text_file
from tests.slurm import ROOT, Cluster, Job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    yield from slurm.start()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    model_folder(folder / "dense", sparsity=0)
    model_folder(folder / "pruned")
    text_file(folder / "text.jsonl")
    return folder


def options(inputs: Path, steps: int) -> list[str]:
    model = ["--model.path", str(inputs / "pruned"), "--data.path", str(inputs / "text.jsonl"), "--data.seq_len", "16"]
    return [
        *model,
        "--steps",
        str(steps),
        "--seft.interval",
        "10",
        "--seft.density",
        "0.05",
        "--timeout",
        "200",
        "--threads",
        "1",
    ]


def start(cluster: Cluster, script: str, *arguments: str, cwd: Path) -> Job:
    return cluster.submit(ROOT / "slurm" / script, "--output", "run", *arguments, cwd=cwd, options=("--nodes=2",))


def step_of(run: Path) -> int:
    """The step that the run has recorded last, 0 before the first."""
    metrics = run / "metrics.jsonl"
    lines = [
        line for line in (metrics.read_text() if metrics.exists() else "").splitlines(keepends=True) if line[-1] == "\n"
    ]
    return int(json.loads(lines[-1])["step"]) if lines else 0


def check_finished(run: Path, job: Job, steps: int, backend: str) -> None:
    result = json.loads((run / "result.json").read_text())
    assert (result["backend"], result["world_size"], result["steps"]) == (backend, 2, steps), job.log
    assert result["sparsity"]["layers_off_target"] == 0
    assert (run / "model" / "model.safetensors").is_file()
    recorded = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert recorded == list(range(1, steps + 1))  # no step was lost, none was done twice


@pytest.mark.long
def test_torchrun_stops_and_goes_on(cluster: Cluster, inputs: Path, tmp_path: Path) -> None:
    run, steps = tmp_path / "run", 200
    job = start(cluster, "train.sbatch", *options(inputs, steps), cwd=tmp_path)
    slurm.until("steps", lambda: step_of(run) > 3)
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    job.comes_back()
    assert "stopped by SIGUSR1 after step" in job.log
    assert job.ends() == "COMPLETED", job.log
    check_finished(run, job, steps, "fsdp")


@pytest.mark.long
def test_srun_survives_a_killed_rank(cluster: Cluster, inputs: Path, tmp_path: Path) -> None:
    run, steps = tmp_path / "run", 200
    job = start(cluster, "train_srun.sbatch", *options(inputs, steps), "--save_every", "20", cwd=tmp_path)
    slurm.until("a checkpoint", lambda: list((run / "checkpoints").glob("step-*")))
    (pid,) = job.processes(sys.executable, "node2")
    os.kill(pid, signal.SIGKILL)
    job.comes_back()
    assert job.ends() == "COMPLETED", job.log
    check_finished(run, job, steps, "fsdp")


@pytest.mark.long
def test_deepspeeds_launcher(cluster: Cluster, inputs: Path, tmp_path: Path) -> None:
    run, steps = tmp_path / "run", 200
    arguments = [*options(inputs, steps), "--deepspeed", str(ROOT / "ds_configs" / "zero3.json")]
    job = start(cluster, "deepspeed.sbatch", *arguments, cwd=tmp_path)
    slurm.until("steps", lambda: step_of(run) > 3)
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    job.is_requeued()
    cluster.run("scancel", job.number)
    assert f"stopped by SIGUSR1 after step {step_of(run)} of {steps}" in job.log
    assert len(list((run / "checkpoints").glob(f"step-*{step_of(run)}/rank-*-of-00002.safetensors"))) == 2


def test_srun_alone(cluster: Cluster, inputs: Path, tmp_path: Path) -> None:
    """The command of the README: nothing sets MASTER_ADDR, and the ranks find each other by Slurm's variables."""
    command = ["srun", "--nodes=2", "--ntasks=2", "--export=ALL", sys.executable, str(ROOT / "launch" / "train.py")]
    cluster.run(*command, *options(inputs, 5), "--output", "run", cwd=tmp_path)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["backend"], result["world_size"]) == ("fsdp", 2)


@pytest.mark.long
def test_prune_sweep_evaluate(cluster: Cluster, inputs: Path, tmp_path: Path) -> None:
    """From the dense model to the table of a sweep, each as a job."""
    data = ["--data.path", str(inputs / "text.jsonl"), "--data.seq_len", "16"]
    script = ROOT / "slurm" / "prune.sbatch"
    prune = cluster.submit(script, "--model.path", str(inputs / "dense"), *data, cwd=tmp_path, RUN="pruned")
    assert prune.ends() == "COMPLETED", prune.log
    pruned = str(tmp_path / "pruned" / "model")
    env = {"SWEEP": "sweep", "DENSITIES": "0.02 0.05", "SEEDS": "0", "EVAL": " ".join(data), "AT_ONCE": "2"}
    train = [*options(inputs, 20), "--model.path", pruned]
    said = cluster.run(str(ROOT / "slurm" / "submit_sweep.sh"), *train, cwd=tmp_path, env=env)
    table = Job(
        cluster, said.split("job ")[2].split(":")[0], tmp_path / f"collect-{said.split('job ')[2].split(':')[0]}.out"
    )
    script = ROOT / "slurm" / "evaluate.sbatch"
    evaluate = cluster.submit(script, "--models.pruned", pruned, *data, cwd=tmp_path, RUN="evaluated", NPROC="2")
    assert evaluate.ends() == "COMPLETED", evaluate.log
    assert table.ends() == "COMPLETED", table.log
    with (tmp_path / "sweep" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    before = json.loads((tmp_path / "evaluated" / "eval.json").read_text())["models"]["pruned"]
    assert [row["seft.density"] for row in rows] == ["0.02", "0.05"]
    for row in rows:
        assert (row["status"], row["step"], row["off target"]) == ("finished", "20", "0")
        assert float(row["perplexity"]) < before["perplexity"]  # of the text that was learnt
    assert (tmp_path / "sweep" / "sweep.png").is_file()


@pytest.mark.long
def test_reproduce(cluster: Cluster, inputs: Path, tmp_path: Path) -> None:
    own = ["--layouts", "fsdp:2", "--runs", "1", "--"]
    script = ROOT / "slurm" / "reproduce.sbatch"
    job = cluster.submit(script, *own, *options(inputs, 5), cwd=tmp_path, options=("--nodes=2",), RUN="run")
    assert job.ends() == "COMPLETED", job.log
    outcomes = json.loads((tmp_path / "run" / "check" / "reproduce.json").read_text())
    assert outcomes["held"] and [run["layout"] for run in outcomes["runs"]] == ["fsdp:2"]
    result = json.loads((tmp_path / "run" / "check" / "1-fsdp-2" / "result.json").read_text())
    assert (result["backend"], result["world_size"]) == ("fsdp", 2)


@pytest.mark.long
def test_a_study_on_an_array(cluster: Cluster, inputs: Path, tmp_path: Path) -> None:
    """Two tasks share four processes; both are stopped while they train, come back, and nothing is done twice."""
    method = {"seft.interval": 10, "seft.density": 0.05}
    study = {
        "output": "study",
        "bases": {"pruned": {"path": str(inputs / "pruned")}},
        "data": {"split": {"path": str(inputs / "text.jsonl"), "shares": {"train": 4, "validation": 1, "test": 1}}},
        "methods": {"moves": method | {"seft.reactivation": 1}, "stays": method},
        "train": {"data.seq_len": 16, "timeout": 200},
        "tokens": 60 * 16,
        "seeds": [0],
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    arguments = ("--config", str(tmp_path / "study.yaml"), "--threads", "1")
    array = cluster.submit(ROOT / "slurm" / "study.sbatch", *arguments, cwd=tmp_path, options=("--array=0-1",)).number
    tasks = [Job(cluster, f"{array}_{i}", tmp_path / f"study-{array}_{i}.out") for i in (0, 1)]
    runs = tmp_path / "study" / "cells"
    slurm.until("both train", lambda: sum(step_of(run) > 3 for run in runs.glob("*/run")) == 2)
    for task in tasks:
        cluster.run("scancel", "--batch", "--signal=USR1", task.number)
    for task in tasks:
        task.comes_back()
    for task in tasks:
        assert task.ends() == "COMPLETED", task.log
    results = json.loads((tmp_path / "study" / "results.json").read_text())
    assert (results["done"], results["total"], results["failures"]) == (4, 4, []), [task.log for task in tasks]
    for run in runs.glob("*/run"):
        recorded = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert recorded == list(range(1, 61))
        lines = [json.loads(line)["task"] for line in (run.parent / "commands.jsonl").read_text().splitlines()]
        assert lines == ["train", "train", "test"]
