"""Check of a GPU in one command, without a network: correctness, duration of a step, largest model that fits.

    python benchmarks/gpu.py --output runs/gpu
    python benchmarks/gpu.py --output runs/gpu --parts sampled step --minutes 3
    python benchmarks/gpu.py --output /tmp/check --device cpu --tiny        # the same code on a CPU: shows that it runs

Each part is a separate process with a time limit. If it fails, hangs or breaks the device, its traceback is recorded
and the next part runs. The results are gpu.json, gpu.md and the files of the parts, which docs/gpu.md describes. The
exit status is 1 if anything failed. torch and transformers are needed, and pytest for the tests; other missing packages
are recorded.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from gpu_report import markdown

HERE = Path(__file__).resolve().parent
SHARES = {"correct": 0.28, "sampled": 0.12, "step": 0.30, "70b": 0.25, "plan": 0.05}
"""Share of the time for each part. Time that a part does not use goes to the later parts."""
PACKAGES = ("torch", "triton", "transformers", "safetensors", "accelerate", "peft", "deepspeed", "numpy", "pytest")
_GRACE = 10.0
"""Seconds by which a case may exceed its part's time, and that a part has to end after a signal."""


def about(device: str) -> dict[str, Any]:
    """Describe card, driver and versions, without importing torch: a driver that hangs must not stop this program."""
    found: dict[str, Any] = {"date": f"{datetime.now(timezone.utc):%F %H:%M} UTC", "python": platform.python_version()}
    found |= {"platform": platform.platform(), "device": device}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    script = (
        "import torch; print(torch.version.cuda, torch.cuda.get_device_name() if torch.cuda.is_available() else None)"
    )
    for key, command in {"card": query, "cuda": [sys.executable, "-c", script]}.items():
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            found[key] = done.stdout.strip() or done.stderr.strip()[-300:]
        except (OSError, subprocess.TimeoutExpired) as error:
            found[key] = f"unknown ({type(error).__name__})"
    return found


def wait_for(pid: int, seconds: float) -> bool:
    """Return whether a child process ends in time. The process is not reaped; the caller does that."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return True
        time.sleep(0.05)
    return False


def run_part(name: str, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Run one part in a process group of its own, and kill the group when its time is over."""
    result, log = options.output / f"{name}.json", options.output / f"{name}.log"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / f"gpu_{name}.py"), "--result", str(result), "--device", options.device]
    command += ["--seconds", f"{max(1.0, seconds - _GRACE):.0f}"] + ["--tiny"] * options.tiny
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    # Large tensors are allocated and freed in turn; without this setting the allocator would fragment
    environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    began = time.monotonic()
    found: dict[str, Any] = {"status": "ok", "rows": []}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True, cwd=HERE.parent
        )
        try:
            ended = wait_for(process.pid, seconds + _GRACE)
        finally:
            # Kills the part and its children. It was not reaped yet, so its number cannot belong to another process.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    if result.is_file():
        found["rows"] = json.loads(result.read_text())["rows"]
    failed = [row for row in found["rows"] if row["status"] == "failed"]
    if not ended:
        found |= {"status": "stopped", "why": f"not over after {seconds + _GRACE:.0f} s"}
    elif code != 0:
        found["status"] = "failed"
        if not failed:  # the part began no case, or was killed in one
            found["traceback"] = f"exit code {code}\n{log.read_text(errors='replace')[-6000:]}"
    return found | {"seconds": round(time.monotonic() - began, 1)}


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--parts", nargs="+", default=list(SHARES), choices=list(SHARES))
    parser.add_argument("--minutes", type=float, default=6.0, help="for all parts together")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="shapes that a CPU computes in seconds")
    options = parser.parse_args()
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu needs --tiny: it shows that the code runs, its times mean nothing")
    options.output = options.output.resolve()
    options.output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    command = " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]])
    report: dict[str, Any] = {"command": command, "about": about(options.device), "parts": {}}
    parts = [name for name in SHARES if name in options.parts]
    for number, name in enumerate(parts):
        share = SHARES[name] / sum(SHARES[other] for other in parts[number:])
        seconds = max(0.0, end - time.monotonic()) * share
        print(f"{name}: {seconds:.0f} s at most ...", flush=True)
        report["parts"][name] = found = run_part(name, options, seconds)
        print(f"{name}: {found['status']} after {found['seconds']:.0f} s", flush=True)
        (options.output / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.output / "gpu.md").write_text(markdown(report))
    print(re.sub(r"\n{3,}", "\n\n", markdown(report)))
    sys.exit(int(any(part["status"] != "ok" for part in report["parts"].values())))


if __name__ == "__main__":
    main()
