"""A real Slurm cluster for tests, and jobs on it: submitted, watched and ended as a user would."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests" / "slurm_cluster.sh"
NODES = 8
WAIT = 240.0
"""Seconds after which something that takes a few of them on an idle machine counts as failed."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
PACKAGES = "apt-get install --no-install-recommends slurm-wlm munge"


def missing() -> str | None:
    """Why there can be no cluster here, None if there can."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [
        name for name in ("slurmctld", "slurmd", "munged", "sbatch", "unshare") if not shutil.which(name, path=path)
    ]
    if absent:
        return f"a Slurm cluster needs {', '.join(absent)} (Debian: {PACKAGES})"
    if os.geteuid() != 0:
        return "a Slurm cluster on this machine needs root (namespaces)"
    tried = subprocess.run(["unshare", "--mount", "--uts", "--pid", "--fork", "true"], capture_output=True, text=True)
    return f"a Slurm cluster needs namespaces: {tried.stderr.strip()}" if tried.returncode else None


def cannot(reason: str) -> NoReturn:
    """Skip a test that this machine cannot run; in CI nothing is skipped."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def free_ports(count: int) -> int:
    """First of several free ports in a row, below those that Linux hands out and above those that jobs take."""
    for first in range(32100 - os.getpid() % 100 * 20, 18000, -count):
        probes = [socket.socket() for _ in range(count)]
        try:
            for i, probe in enumerate(probes):
                probe.bind(("", first + i))
            return first
        except OSError:
            continue
        finally:
            for probe in probes:
                probe.close()
    raise AssertionError("no free ports")


def until(what: str, check: Callable[[], object]) -> None:
    """Wait until something is true.

    Raises:
        AssertionError: It was not, in this many seconds.
    """
    deadline = time.monotonic() + WAIT
    while not check():
        assert time.monotonic() < deadline, f"{what}: not in {WAIT} s"
        time.sleep(0.1)


@dataclass
class Job:
    """A job of the cluster."""

    cluster: "Cluster"
    number: str
    """Number of the job as Slurm prints it; "12_3" for a task of an array."""
    log_file: Path

    def __getattr__(self, name: str) -> str:
        """A field of ``scontrol show job``, e.g. JobState, Restarts, NodeList."""
        if name.startswith("_"):
            raise AttributeError(name)
        shown = self.cluster.run("scontrol", "--oneliner", "show", "job", self.number)
        found = re.search(rf"(?:^| ){name}=(\S*)", shown)
        assert found is not None, f"{name} of {shown}"
        return found.group(1)

    @property
    def log(self) -> str:
        """All that the job has written so far."""
        return self.log_file.read_text() if self.log_file.exists() else ""

    def says(self, text: str) -> None:
        """Wait until the log holds a text."""
        try:
            until(f"{text!r} in the log", lambda: text in self.log or self.JobState in ENDED)
            assert text in self.log
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.JobState}\n{self.log}") from None

    def becomes(self, *states: str) -> str:
        """Wait for a state; returns it."""
        try:
            until(f"state {states}", lambda: self.JobState in (*states, *ENDED))
            state = self.JobState
            assert state in states, f"job {self.number} is {state} and not one of {states}"
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log}") from None
        return state

    def ends(self) -> str:
        """Wait for its end; returns how."""
        return self.becomes(*ENDED)

    def comes_back(self, restarts: int = 1) -> None:
        """Wait until it was requeued, and let it start at once instead of after two minutes."""
        self.is_requeued(restarts)
        time.sleep(2.1)  # Slurm revokes the credential of a job that it starts in the second of its requeue
        self.cluster.run("scontrol", "update", f"JobId={self.number}", "StartTime=now")

    def is_requeued(self, restarts: int = 1) -> None:
        """Wait until it was given back to the queue so many times."""
        try:
            until("requeue", lambda: self.JobState == "PENDING" and self.Restarts == str(restarts))
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.JobState}\n{self.log}") from None

    def processes(self, program: str, node: str) -> list[int]:
        """Pids of the job's processes on a node whose command line begins so."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                env = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            ours = {f"SLURM_CONF={self.cluster.conf}".encode(), f"SLURM_JOB_ID={self.number}".encode()} <= set(env)
            if ours and words.startswith(program) and f"SLURMD_NODENAME={node}".encode() in env:
                found.append(int(entry.name))
        return found


@dataclass
class Cluster:
    """A running cluster of NODES nodes with 8 fake GPUs each."""

    folder: Path
    env: dict[str, str] = field(default_factory=dict)
    """Environment of its jobs."""

    @property
    def conf(self) -> Path:
        """Its slurm.conf."""
        return self.folder / "slurm.conf"

    def run(self, *command: str, cwd: Path | None = None, check: bool = True, env: dict[str, str] | None = None) -> str:
        """Run a command that talks to this cluster; returns what it printed, errors too if ``check`` is False."""
        done = subprocess.run(
            command,
            cwd=cwd,
            env=self.env | (env or {}),
            capture_output=True,
            text=True,
            timeout=200,
            stdin=subprocess.DEVNULL,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout if check else done.stdout + done.stderr

    def submit(self, script: Path, *arguments: str, cwd: Path, options: tuple[str, ...] = (), **env: str) -> Job:
        """Submit a batch script with its arguments; ``options`` are sbatch's."""
        number = self.run("sbatch", "--parsable", *options, str(script), *arguments, cwd=cwd, env=env).strip()
        job = Job(self, number, Path())
        job.log_file = Path(job.StdOut)
        return job

    def clear(self) -> None:
        """Cancel what is left of a test's jobs, and wait until every node is idle."""
        self.run("scancel", "--user", "root", "--quiet", check=False)
        idle = ("sinfo", "--noheader", "--partition=main", "--states=idle", "--format=%D")
        until("idle nodes", lambda: self.run(*idle).strip() == str(NODES))

    def node(self, action: str, name: str) -> None:
        """ "crash" or "boot" a node."""
        subprocess.run([SCRIPT, action, self.folder, name], check=True, timeout=WAIT)


def start(nodes: int = NODES) -> Iterator[Cluster]:
    """Start a cluster for a test module; it ends with this process, however that ends."""
    reason = missing()
    if reason is not None:
        cannot(reason)
    folder = Path(
        tempfile.mkdtemp(prefix="seft-slurm-", dir="/tmp")
    )  # short: the path of a socket has 108 letters at most
    settings = {"PORT": str(free_ports(nodes + 1)), "CPUS": "8", "GPUS": "8"}
    process = subprocess.Popen(
        [SCRIPT, "run", folder, str(nodes)], env=os.environ | settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == b"ready\n"
        yield Cluster(folder, _environment(folder))
    finally:
        process.stdin.close()
        process.wait(WAIT)


def _environment(folder: Path) -> dict[str, str]:
    """Environment of a user's new shell, with the variables that keep tests off the network."""
    names = ("HOME", "LANG", "HF_DATASETS_CACHE", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
    return (
        kept
        | {"PATH": path, "SLURM_CONF": str(folder / "slurm.conf"), "PYTHON": sys.executable}
        | {"NPROC": "1", "OMP_NUM_THREADS": "1"}
    )
