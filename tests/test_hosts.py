"""DeepSpeed's launcher on two hosts: a hostfile, pdsh, and a real sshd on two addresses of this machine."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.folders import model_folder, text_file
from tests.slurm import cannot, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
ROOT = Path(__file__).resolve().parents[1]
HOSTS = ("127.0.0.2", "127.0.0.3")
PACKAGES = "apt-get install --no-install-recommends openssh-server openssh-client pdsh"


def missing() -> str | None:
    """Why two hosts cannot be had here, None if they can."""
    sshd = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
    absent = [name for name in ("ssh", "ssh-keygen", "pdsh") if not shutil.which(name)] + ([] if sshd else ["sshd"])
    return f"needs {', '.join(absent)} (Debian: {PACKAGES})" if absent else None


@pytest.fixture
def ssh_config(tmp_path: Path) -> Iterator[Path]:
    """A running sshd for HOSTS; gives the client's configuration file."""
    reason = missing()
    if reason is not None:
        cannot(reason)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    with socket.socket() as probe:
        probe.bind((HOSTS[0], 0))
        port = probe.getsockname()[1]
    server = [f"ListenAddress {host}:{port}" for host in HOSTS]
    server += [f"HostKey {tmp_path}/host", f"AuthorizedKeysFile {tmp_path}/user.pub", "StrictModes no", "UsePAM no"]
    server += ["PermitRootLogin yes", "PasswordAuthentication no", f"PidFile {tmp_path}/sshd.pid"]
    (tmp_path / "sshd_config").write_text("\n".join(server) + "\n")
    client = [f"Host {' '.join(HOSTS)}", f"Port {port}", f"IdentityFile {tmp_path}/user", "StrictHostKeyChecking no"]
    client += [f"UserKnownHostsFile {tmp_path}/known_hosts", "LogLevel ERROR"]
    (tmp_path / "ssh_config").write_text("\n".join(client) + "\n")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd does not start without it
    path = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
    assert path is not None
    with (tmp_path / "sshd.log").open("w") as log:
        daemon = subprocess.Popen([path, "-D", "-e", "-f", tmp_path / "sshd_config"], stderr=log)
    try:
        until("sshd", lambda: (tmp_path / "sshd.pid").exists() or daemon.poll() is not None)
        assert daemon.poll() is None, (tmp_path / "sshd.log").read_text()
        yield tmp_path / "ssh_config"
    finally:
        daemon.terminate()
        daemon.wait(60)


@pytest.mark.long
def test_deepspeed_on_the_hosts_of_a_hostfile(ssh_config: Path, tmp_path: Path) -> None:
    model_folder(tmp_path / "pruned")
    text_file(tmp_path / "text.jsonl")
    (tmp_path / "hostfile").write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    with socket.socket() as probe:
        probe.bind((HOSTS[0], 0))
        port = str(probe.getsockname()[1])
    launcher = [
        "deepspeed",
        "--hostfile",
        str(tmp_path / "hostfile"),
        "--no_ssh_check",
    ]  # its check knows no ssh_config
    launcher += ["--master_addr", HOSTS[0], "--master_port", port, "launch/train.py"]
    options = ["--model.path", str(tmp_path / "pruned"), "--data.path", str(tmp_path / "text.jsonl")]
    options += ["--data.seq_len", "16", "--output", str(tmp_path / "run"), "--steps", "4", "--seft.interval", "2"]
    options += ["--seft.density", "0.05", "--timeout", "200", "--threads", "1"]
    options += ["--deepspeed", str(ROOT / "ds_configs" / "zero3.json")]
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "PDSH_SSH_ARGS_APPEND": f"-F {ssh_config}"}
    done = subprocess.run([*launcher, *options], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for host in HOSTS:  # pdsh writes each host's name before its lines
        assert f"{host}: " in done.stdout + done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["backend"], result["world_size"], result["sparsity"]["layers_off_target"]) == ("zero3", 2, 0)
