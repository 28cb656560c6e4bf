"""Signals that ask a run to stop: at its start, from the keyboard, from a terminal that is closed."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from seft_dist.io.checkpoint import latest
from seft_dist.session import signals
from seft_dist.session.distributed import find_launcher
from seft_dist.session.signals import StopRequest, stop_requests
from tests.runs import records
from tests.test_launchers import ROOT, SCRIPT, port
from tests.test_stopping import LIMIT, children, environment, options, processes, wait_until

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(autouse=True)
def signals_as_at_a_terminal() -> Iterator[None]:
    """A shell's background job and nohup ignore SIGINT and SIGHUP, and what they start inherits that."""
    usual: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_first_signal_counts() -> None:
    with stop_requests() as request:
        assert request.number == 0
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert request.number == signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_a_second_ctrl_c_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    with stop_requests() as request:
        for _ in range(3):  # the terminal's, and the same passed on by launchers
            os.kill(os.getpid(), signal.SIGINT)
        assert request.number == signal.SIGINT
        monkeypatch.setattr(signals, "_ONE_KEYSTROKE", -1.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert request.number == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_usr1_that_a_batch_script_ignores_until_the_rank_is_ready_is_caught() -> None:
    """``trap "" USR1`` in slurm/task.sh: the signal must not end a rank that loads torch, but stop one that trains."""
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with stop_requests() as request:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert request.number == signal.SIGUSR1
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_signal_to_a_process_that_is_ending_changes_nothing() -> None:
    """Leaving Python takes a second; a finished run must not look like a killed one."""
    code = (
        "import atexit, os, signal\n"
        "from seft_dist.session.signals import STOP_SIGNALS, stop_requests\n"
        "atexit.register(lambda: [os.kill(os.getpid(), number) for number in STOP_SIGNALS])\n"
        "with stop_requests(process_ends=True):\n"
        "    pass\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_a_launcher_that_ended_during_the_start_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    above = find_launcher({"CROSS_RANK": "0"})  # as under deepspeed: two processes
    assert len(above) == 2
    for now, number in ((above, 0), ((above[0], 1 << 30), signal.SIGTERM), ((1 << 30, 1), signal.SIGTERM), ((), 0)):
        request = StopRequest()
        request.watch(lambda now=now: now)  # type: ignore[misc]
        assert request.number == number, now
    assert capsys.readouterr().err.count("the launcher of this rank has ended") == 2


def catches(pid: int, number: int) -> bool:
    """Return whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def test_a_signal_while_torch_is_loaded(inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with processes([[sys.executable, SCRIPT, *options(inputs, output, 100000)]], [environment()], tmp_path) as started:
        pid = started[0].pid
        wait_until(lambda: catches(pid, signal.SIGTERM))
        early = "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
        os.kill(pid, signal.SIGTERM)
        code = started[0].wait(timeout=LIMIT)
    log = (tmp_path / "process-0.log").read_text()
    assert early and code == 0 and "stopped by SIGTERM after step 1 of" in log, log
    newest = latest(output / "checkpoints")
    assert newest is not None and newest.name == "step-00000001"


def test_a_closed_terminal_loses_nothing(inputs: Path, tmp_path: Path) -> None:
    """Its SIGHUP, and then errors for whoever prints."""
    output, env = tmp_path / "run", environment()
    command = [sys.executable, SCRIPT, *options(inputs, output, 100000), "--save_every", "0"]
    ended: list[int] = []
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(ROOT)
        os.execve(command[0], command, env)

    def until(true: Callable[[], bool]) -> None:
        end = time.monotonic() + LIMIT
        while not true():
            assert time.monotonic() < end, "waited too long"
            os.set_blocking(terminal, False)
            try:
                os.read(terminal, 1 << 16)
            except BlockingIOError:
                time.sleep(0.02)

    try:
        until(lambda: (output / "metrics.jsonl").exists() and len(records_so_far(output)) >= 3)
        os.close(terminal)

        def has_ended() -> bool:
            found, status = os.waitpid(pid, os.WNOHANG)
            ended.extend([os.waitstatus_to_exitcode(status)] if found else [])
            return bool(ended)

        wait_until(has_ended)
    finally:
        if not ended:
            os.kill(pid, signal.SIGKILL)
    newest = latest(output / "checkpoints")
    assert ended == [0] and newest is not None and newest.name == f"step-{records(output)[-1]['step']:08d}"


def records_so_far(output: Path) -> list[str]:
    return [line for line in (output / "metrics.jsonl").read_text().splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), pytest.param(signal.SIGHUP, marks=pytest.mark.long)]
)
def test_torchrun_passes_ctrl_c_on(number: signal.Signals, inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = ["torchrun", "--nproc-per-node", "2", "--master-port", port(), SCRIPT, *options(inputs, output, 100000)]
    with processes([[*command, "--save_every", "0"]], [environment()], tmp_path) as started:
        wait_until(lambda: (output / "metrics.jsonl").exists() and len(records_so_far(output)) >= 3)
        ranks = children(started[0].pid)
        started[0].send_signal(number)
        started[0].wait(timeout=LIMIT)
        wait_until(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks))
    newest = latest(output / "checkpoints")
    assert newest is not None, (tmp_path / "process-0.log").read_text()[-3000:]
    assert newest.name == f"step-{records(output)[-1]['step']:08d}"


@pytest.mark.slow
def test_a_rank_that_never_comes_is_not_waited_for_long(tmp_path: Path) -> None:
    """Half an hour is for collectives; ranks are started together."""
    code = (
        "from seft_dist.session import distributed\ndistributed.LONGEST_WAIT = 2.0\ndistributed.start(timeout=1800)\n"
    )
    env = environment(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port())
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 1 and "rank 1 of 2 did not come within 2 s" in done.stderr, done.stderr[-2000:]
