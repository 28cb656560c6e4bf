"""Training as users start it: plain python, torchrun, deepspeed, accelerate launch, mpirun; two real ranks."""

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import termios
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
SCRIPT = "launch/train.py"
MODULES = {"torchrun": ["-m", "seft_dist", "train"], "deepspeed": ["--module", "seft_dist", "train"]}
"""Launchers that are tested with the module; the others get the script."""


def options(inputs: Path, output: Path) -> list[str]:
    return [
        *("--model.path", str(inputs / "pruned"), "--data.path", str(inputs / "text.jsonl"), "--data.seq_len", "16"),
        *(
            "--output",
            str(output),
            "--steps",
            "4",
            "--seft.interval",
            "2",
            "--seft.density",
            "0.05",
            "--timeout",
            "120",
        ),
    ]


def port() -> str:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return str(probe.getsockname()[1])


def start(
    command: list[str], variables: dict[str, str] | None = None, terminal: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a command as from a fresh shell, with some variables: none of the tests' own rank variables."""
    known = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
    env = {key: value for key, value in os.environ.items() if key not in known}
    env["PATH"] = f"{BIN}:{env['PATH']}"
    env["PYTHONPATH"] = str(ROOT)
    env |= variables or {}
    own, inner = os.openpty()

    def take_terminal() -> None:  # as a process has that is typed into a shell
        os.setsid()
        fcntl.ioctl(inner, termios.TIOCSCTTY, 0)

    try:
        return subprocess.run(
            command,
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            timeout=400,
            preexec_fn=take_terminal if terminal else None,
        )
    finally:
        os.close(own)
        os.close(inner)


def launcher(name: str) -> list[str]:
    if name == "python":
        return [sys.executable]
    if name == "torchrun":
        return ["torchrun", "--nproc-per-node", "2", "--master-port", port()]
    if name == "deepspeed":
        return ["deepspeed", "--num_gpus", "2", "--master_port", port()]
    if name == "accelerate":
        distributed = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", port()]
        return ["accelerate", "launch", *distributed, "--mixed_precision", "no", "--dynamo_backend", "no"]
    if shutil.which("mpirun") is None:
        text = "mpirun is not installed (Debian: apt-get install openmpi-bin)"
        if os.environ.get("CI") == "true":
            pytest.fail(text)
        pytest.skip(text)
    return ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable]


@pytest.mark.parametrize(
    ("name", "ds"),
    [
        pytest.param("python", None, marks=pytest.mark.long),
        ("torchrun", None),
        pytest.param("accelerate", None, marks=pytest.mark.long),
        ("mpirun", None),
        pytest.param("python", "ds_configs/zero3.json", marks=pytest.mark.long),
        ("deepspeed", "zero3"),
        pytest.param("mpirun", "ds_configs/zero2.json", marks=pytest.mark.long),
    ],
)
def test_launcher(name: str, ds: str | None, inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    extra = ["--deepspeed", ds] if ds else []
    done = start([*launcher(name), *MODULES.get(name, [SCRIPT]), *options(inputs, output), *extra])
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads((output / "result.json").read_text())
    assert result["world_size"] == (1 if name == "python" else 2)
    assert result["backend"] == (Path(ds).stem if ds else "single" if name == "python" else "fsdp")
    assert result["sparsity"]["layers_off_target"] == 0
    assert (output / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", [pytest.param("python", marks=pytest.mark.long), "torchrun"])
def test_a_users_error_is_one_message(name: str, inputs: Path, tmp_path: Path) -> None:
    command = [*launcher(name), SCRIPT, *options(inputs, tmp_path / "run"), "--seft.targets", "nothing_like_this"]
    failed = start(command)
    assert failed.returncode != 0
    lines = [line for line in failed.stderr.splitlines() if "nothing_like_this" in line]
    assert len(lines) == 1 and lines[0].startswith("train.py: error: targets="), failed.stderr[-4000:]
    for part in ("launch", "seft_dist"):  # torchrun adds a traceback of its own, we do not
        assert f'File "{ROOT}/{part}' not in failed.stderr
    assert not (tmp_path / "run").exists()


def test_one_process_among_variables_that_were_left_over(inputs: Path, tmp_path: Path) -> None:
    """In a shell that srun --pty has opened, after a job that set an address: FSDP in one process needs neither."""
    shell = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}
    shell |= {"SLURM_LOCALID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gone[1-2]", "SLURM_PTY_PORT": "40001"}
    leaked = {"RANK": "", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29500"}
    command = [sys.executable, SCRIPT, *options(inputs, tmp_path / "run"), "--backend", "fsdp"]
    done = start(command, shell | leaked, terminal=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["world_size"] == 1
    assert "one process, although SLURM_NTASKS=4" in done.stderr


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        pytest.param("0", "rank 1 of 2 did not come within 2 s", marks=pytest.mark.long),
        ("1", "rank 1 found no rank 0 at 127.0.0.1"),
    ],
)
def test_a_rank_that_is_alone_says_so(rank: str, message: str, inputs: Path, tmp_path: Path) -> None:
    """Variables of a notebook's terminal, or of a launcher whose other ranks have died: no waiting for half an hour."""
    leaked = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port()}
    failed = start([sys.executable, SCRIPT, *options(inputs, tmp_path / "run"), "--timeout", "2"], leaked)
    lines = [line for line in failed.stderr.splitlines() if line.startswith("train.py: error: ")]
    assert failed.returncode == 1 and len(lines) == 1, failed.stderr[-4000:]
    assert message in lines[0] and f"RANK={rank}, WORLD_SIZE=2" in lines[0] and "unset RANK WORLD_SIZE" in lines[0]
    assert "Traceback" not in failed.stderr and not (tmp_path / "run").exists()
