"""Runs that are asked to stop, that fail, whose ranks die or hang: real signals to real processes."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.preload  # noqa: F401
from seft_dist.io.checkpoint import latest
from seft_dist.training import step as training_step
from seft_dist.training import trainer
from seft_dist.training.build import TrainingRun
from seft_dist.training.method import TrainedSeft
from seft_dist.training.trainer import Stopped, train
from tests.folders import model_folder, text_file
from tests.ranks import run_ranks
from tests.runs import digests, ds_file, make_config, records, train_to_end, train_until_stopped
from tests.test_launchers import BIN, ROOT, SCRIPT, port

pytestmark = pytest.mark.timeout(600)
LIMIT = 240.0
"""Seconds within which everything here must have ended: a fifth of it will do, if nothing else runs on the machine."""


def when_step(output: Path, step: int, act: Any) -> None:
    """Act once the run has recorded a step; in a thread."""

    def watch() -> None:
        metrics = output / "metrics.jsonl"
        while not (metrics.exists() and f'{{"step": {step},' in metrics.read_text()):
            time.sleep(0.005)
        act()

    threading.Thread(target=watch, daemon=True).start()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "world_size", "number"),
    [
        pytest.param("single", 1, signal.SIGUSR1, marks=pytest.mark.long),
        ("fsdp", 2, signal.SIGTERM),
        pytest.param("zero3", 2, signal.SIGUSR1, marks=pytest.mark.long),
    ],
)
def test_a_signal_to_one_rank_stops_all_and_loses_nothing(
    name: str, world_size: int, number: signal.Signals, inputs: Path, tmp_path: Path
) -> None:
    over: dict[str, Any] = {"global_batch": 12, "batch_size": 6, "steps": 60}
    if name == "zero3":
        over["deepspeed"] = ds_file(tmp_path, {"zero_optimization": {"stage": 3}})
    whole = run_ranks(
        lambda rank, world: train_to_end(make_config(inputs, tmp_path / "whole", **over)), world_size, timeout=LIMIT
    )
    config = make_config(inputs, tmp_path / "run", **over)

    def interrupted(rank: int, world: int) -> Stopped:
        if rank == world - 1:

            def signals() -> None:
                for _ in range(3):  # the later ones, also while it saves, change nothing
                    os.kill(os.getpid(), number)
                    time.sleep(0.002)

            when_step(tmp_path / "run", 4, signals)
        return train_until_stopped(config)

    stopped = run_ranks(interrupted, world_size, timeout=LIMIT)
    assert stopped == [stopped[0]] * world_size
    assert stopped[0].signal == number.name and 4 <= stopped[0].step < 60
    assert not (tmp_path / "run" / "result.json").exists()
    resumed = run_ranks(lambda rank, world: train_to_end(config), world_size, timeout=LIMIT)
    of_attempts = {"seconds": 0, "peak_memory_bytes": 0}
    assert resumed[0] | of_attempts == whole[0] | of_attempts
    assert [line["loss"] for line in records(tmp_path / "run")] == [
        line["loss"] for line in records(tmp_path / "whole")
    ]
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")


def test_a_signal_before_the_first_step(inputs: Path, tmp_path: Path) -> None:
    def on_rank(rank: int, world: int) -> Stopped:
        fill_in = trainer.fill_in_global_batch

        def signalled(*args: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return fill_in(*args)

        trainer.fill_in_global_batch = signalled  # type: ignore[assignment]
        result = train_until_stopped(make_config(inputs, tmp_path / "run"))
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as it was before
        return result

    assert run_ranks(on_rank, 1) == [Stopped("SIGTERM", 1)]


def test_masks_that_disagree_stop_the_run_with_a_diagnosis(inputs: Path, tmp_path: Path) -> None:
    """A bit of memory that fell over in one rank's mask is found at the next evolution."""
    output = tmp_path / "run"
    config = make_config(inputs, output, batch_size=6, backend="ddp", save_every=2)

    def on_rank(rank: int, world: int) -> str:
        update = training_step.update_weights

        def flipping(run: TrainingRun, step: int) -> float:
            if step == 5 and rank == 1:
                assert isinstance(run.method, TrainedSeft)
                mask = run.method.sparse_state.masks[2]
                byte = int(mask.nonzero()[0])
                mask[byte] &= mask[byte] - 1
            return update(run, step)

        training_step.update_weights = flipping
        with pytest.raises(RuntimeError) as caught:
            train(config)
        return str(caught.value)

    messages = run_ranks(on_rank, 2)
    assert all("model.layers.0.self_attn.v_proj" in message for message in messages), messages
    for rank in range(2):
        found = json.loads(next((output / "diagnosis").glob(f"*-rank-0000{rank}.json")).read_text())
        assert found["error"] == f"RuntimeError: {messages[rank]}" and found["rank"] == rank
        # The save of step 4 may still have been on its way to the disk.
        assert found["newest_checkpoint"].endswith(("step-00000002", "step-00000004"))
        assert len(found["sequences_of_the_step"][0]) == 6
    # The checkpoint is as good as it was.
    resumed = run_ranks(lambda rank, world: train_to_end(dataclasses.replace(config, save_every=0)), 2)
    assert resumed[0]["sparsity"]["layers_off_target"] == 0 and resumed[0]["steps"] == 10


def test_a_loss_that_is_not_finite_leaves_a_diagnosis(inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"

    def on_rank(rank: int, world: int) -> str:
        forward_backward = training_step.forward_backward

        def spoiled(run: TrainingRun, micro_batches: list[Any]) -> Any:
            loss = forward_backward(run, micro_batches)
            return loss * torch.inf if rank == 1 and run.method.num_steps == 4 else loss

        training_step.forward_backward = spoiled
        with pytest.raises(FloatingPointError) as caught:
            train(make_config(inputs, output, batch_size=6, save_every=2))
        return str(caught.value)

    message = run_ranks(on_rank, 2)[0]
    assert message.startswith("step 5: the loss is not finite on rank 1 (inf)")
    found = json.loads((output / "diagnosis" / "step-00000004-rank-00000.json").read_text())
    assert found["error"].endswith(message) and found["steps_done"] == 4
    assert {row["not_finite_values"] for row in found["layers"]} == {0}


def as_if_killed_after(run: Path, step: int) -> None:
    for name in ("result.json", "delta.safetensors"):
        (run / name).unlink()
    for path in (run / "checkpoints").glob("step-*"):
        if int(path.name[-8:]) > step:
            shutil.rmtree(path)


@pytest.mark.parametrize("world_size", [1, 2])
def test_dropout_is_drawn_as_in_the_uninterrupted_run(world_size: int, tmp_path: Path) -> None:
    text_file(tmp_path / "text.jsonl")
    model_folder(tmp_path / "pruned", attention_dropout=0.5)
    config = make_config(tmp_path, output := tmp_path / "run", batch_size=2, save_every=5)
    run_ranks(lambda rank, world: train(config), world_size)
    whole = [line["loss"] for line in records(output)]
    as_if_killed_after(output, 5)
    run_ranks(lambda rank, world: train(config), world_size)
    assert [line["loss"] for line in records(output)] == whole
    model_folder(tmp_path / "pruned")
    run_ranks(lambda rank, world: train(dataclasses.replace(config, output=str(tmp_path / "none"))), world_size)
    assert [line["loss"] for line in records(tmp_path / "none")] != whole  # dropout was really there


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_damaged_checkpoint_is_put_aside(
    world_size: int, inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = make_config(inputs, output := tmp_path / "run", batch_size=2, save_every=5)
    whole = run_ranks(lambda rank, world: train_to_end(config), world_size)
    as_if_killed_after(output, 10)
    file = output / "checkpoints" / "step-00000010" / f"rank-0000{world_size - 1}-of-0000{world_size}.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    resumed = run_ranks(lambda rank, world: train_to_end(config), world_size)
    of_attempts = {"seconds": 0, "peak_memory_bytes": 0}
    assert resumed[0] | of_attempts == whole[0] | of_attempts
    kept = {path.name for path in (output / "checkpoints").iterdir()}
    assert kept == {"step-00000005", "step-00000010", "damaged-step-00000010"}
    said = capfd.readouterr().err
    assert said.count(f"{file} is damaged") == 1 and "going on from the checkpoint before it" in said
    for path in (output / "checkpoints").glob("step-*"):
        (path / "checkpoint.json").write_text("{")
    (output / "result.json").unlink()

    def refused(rank: int, world: int) -> None:
        for _ in range(2):  # the second time too, when they have been put aside already
            with pytest.raises(
                ValueError,
                match=r"all checkpoints in .* are damaged \(damaged-step-00000005, damaged-step-00000010, .*-2\)",
            ):
                train(config)

    run_ranks(refused, world_size)


def options(inputs: Path, output: Path, steps: int) -> list[str]:
    text = f"--model.path {inputs / 'pruned'} --data.path {inputs / 'text.jsonl'} --output {output} --steps {steps}"
    return f"{text} --save_every 1 --data.seq_len 16 --seft.interval 3 --seft.density 0.05 --threads 1".split()


def environment(**over: str) -> dict[str, str]:
    known = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {key: value for key, value in os.environ.items() if key not in known}
    return env | {"PATH": f"{BIN}:{env['PATH']}", "PYTHONPATH": str(ROOT)} | over


@contextlib.contextmanager
def processes(
    commands: list[list[str]], envs: list[dict[str, str]], log: Path
) -> Iterator[list[subprocess.Popen[str]]]:
    """Start processes, each in a session of its own; afterwards nothing of them is left."""
    started = []
    try:
        for i, (command, env) in enumerate(zip(commands, envs, strict=True)):
            with (log / f"process-{i}.log").open("w") as file:
                started.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=env,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        text=True,
                        start_new_session=True,
                    )
                )
        yield started
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def wait_for_step(output: Path, step: int) -> None:
    def reached() -> bool:
        newest = latest(output / "checkpoints")
        return newest is not None and int(newest.name[-8:]) >= step

    wait_until(reached)


def listens(number: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", number)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("how", [pytest.param(signal.SIGKILL, marks=pytest.mark.long), signal.SIGSTOP])
def test_the_others_stop_when_a_rank_dies_or_hangs(how: signal.Signals, inputs: Path, tmp_path: Path) -> None:
    """A dead rank is noticed at once, a hanging one after --timeout."""
    output, where = tmp_path / "run", port()
    command = [sys.executable, SCRIPT, *options(inputs, output, 100000), "--timeout", "8"]
    envs = [
        environment(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=where)
        for r in range(2)
    ]
    with processes([command] * 2, envs, tmp_path) as ranks:
        wait_for_step(output, 3)
        os.kill(ranks[1].pid, how)
        begin = time.monotonic()
        code = ranks[0].wait(timeout=LIMIT)
        assert time.monotonic() - begin < 60  # and not 30 minutes, which is everybody's default
    log = (tmp_path / "process-0.log").read_text()
    assert code == 1, log  # neither done nor an error of the user
    assert "the same command goes on from" in log and list((output / "diagnosis").iterdir()), log


def children(pid: int) -> list[int]:
    """Processes started by a process."""
    found = subprocess.run(["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "how"),
    [("torchrun", signal.SIGKILL), pytest.param("deepspeed", signal.SIGTERM, marks=pytest.mark.long)],
)
def test_ranks_save_and_stop_when_their_launcher_is_gone(
    launcher: str, how: signal.Signals, inputs: Path, tmp_path: Path
) -> None:
    """Neither launcher ends its ranks then: they would go on unseen."""
    output = tmp_path / "run"
    given = {
        "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", port(), SCRIPT],
        "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", port(), SCRIPT],
    }[launcher]
    more = ["--deepspeed", "ds_configs/zero2.json"] if launcher == "deepspeed" else []
    command = [*given, *options(inputs, output, 100000), *more, "--save_every", "3"]
    with processes([command], [environment()], tmp_path) as started:
        wait_for_step(output, 3)
        ranks = children(started[0].pid)
        ranks = ranks if launcher == "torchrun" else children(ranks[0])
        assert len(ranks) == 2
        started[0].send_signal(how)
        started[0].wait(timeout=LIMIT)
        try:
            wait_until(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks))
        finally:
            for rank in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank, signal.SIGKILL)
    log = (tmp_path / "process-0.log").read_text()
    assert "the launcher of this rank has ended" in log and "stopped by SIGTERM after step" in log, log
    step = records(output)[-1]["step"]
    newest = latest(output / "checkpoints")
    assert newest is not None and newest.name == f"step-{step:08d}"


@pytest.mark.slow
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
@pytest.mark.long
def test_torchrun_restarts_a_killed_rank(rendezvous: str, inputs: Path, tmp_path: Path) -> None:
    output, steps = tmp_path / "run", 100
    where = ["--master-port", port()] if rendezvous == "static" else ["--standalone"]
    command = [
        "torchrun",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1",
        *where,
        SCRIPT,
        *options(inputs, output, steps),
    ]
    with processes([command], [environment()], tmp_path) as agents:
        wait_for_step(output, 2)
        os.kill(children(agents[0].pid)[-1], signal.SIGKILL)
        assert agents[0].wait(timeout=LIMIT) == 0, (tmp_path / "process-0.log").read_text()[-3000:]
    assert [line["step"] for line in records(output)] == list(range(1, steps + 1))
    first, second = json.loads((output / "manifest.json").read_text())["attempts"]
    assert first["first_step"] == 1 and second["first_step"] > 2


@pytest.mark.long
def test_torchrun_restarts_with_the_ranks_it_has_left(inputs: Path, tmp_path: Path) -> None:
    """Two elastic agents; one is lost with its rank, the other goes on alone from the last checkpoint."""
    output, steps, where = tmp_path / "run", 200, port()
    agent = ["torchrun", "--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-id", "elastic"]
    agent += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{where}"]
    agent += ["--rdzv-conf", "last_call_timeout=20,keep_alive_interval=1,keep_alive_max_attempt=3"]
    command = [*agent, SCRIPT, *options(inputs, output, steps)]
    (tmp_path / "lost").mkdir()
    with processes([command], [environment()], tmp_path) as agents:
        wait_until(lambda: listens(int(where)))  # the rendezvous lives in this agent; the other is the one to lose
        with processes([command], [environment()], tmp_path / "lost") as lost:
            wait_for_step(output, 5)
            for pid in [lost[0].pid, *children(lost[0].pid)]:
                os.kill(pid, signal.SIGKILL)
            assert agents[0].wait(timeout=LIMIT) == 0, (tmp_path / "process-0.log").read_text()[-3000:]
    manifest = json.loads((output / "checkpoints" / f"step-{steps:08d}" / "checkpoint.json").read_text())
    assert manifest["extra"]["origin"]["global_batch"] == 2  # as it began, with two ranks
    result = json.loads((output / "result.json").read_text())
    assert result["world_size"] == 1 and result["steps"] == steps and result["sparsity"]["layers_off_target"] == 0
    assert [line["step"] for line in records(output)] == list(range(1, steps + 1))
