"""launch/train.py as users start it: plain python, torchrun, deepspeed, accelerate launch, mpirun; two real ranks."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
SCRIPT = "launch/train.py"


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


def start(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command as from a fresh shell: none of the tests' own rank variables."""
    known = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
    env = {key: value for key, value in os.environ.items() if key not in known}
    env["PATH"] = f"{BIN}:{env['PATH']}"
    env["PYTHONPATH"] = str(ROOT)
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)


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
        ("python", None),
        ("torchrun", None),
        ("accelerate", None),
        ("mpirun", None),
        ("python", "ds_configs/zero3.json"),
        ("deepspeed", "ds_configs/zero3.json"),
        ("mpirun", "ds_configs/zero2.json"),
    ],
)
def test_launcher(name: str, ds: str | None, inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    extra = ["--deepspeed", ds] if ds else []
    done = start([*launcher(name), SCRIPT, *options(inputs, output), *extra])
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads((output / "result.json").read_text())
    assert result["world_size"] == (1 if name == "python" else 2)
    assert result["backend"] == (Path(ds).stem if ds else "single" if name == "python" else "fsdp")
    assert result["sparsity"]["layers_off_target"] == 0
    assert (output / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["python", "torchrun"])
def test_a_users_error_is_one_message(name: str, inputs: Path, tmp_path: Path) -> None:
    command = [*launcher(name), SCRIPT, *options(inputs, tmp_path / "run"), "--seft.targets", "nothing_like_this"]
    failed = start(command)
    assert failed.returncode != 0
    lines = [line for line in failed.stderr.splitlines() if "nothing_like_this" in line]
    assert len(lines) == 1 and lines[0].startswith("train.py: error: targets="), failed.stderr[-4000:]
    for part in ("launch", "seft_dist"):  # torchrun adds a traceback of its own, we do not
        assert f'File "{ROOT}/{part}' not in failed.stderr
    assert not (tmp_path / "run").exists()
