"""Check of a GPU in one command, without a network: correctness, duration of a step, largest model that fits.

    python benchmarks/gpu.py --output runs/gpu
    python benchmarks/gpu.py --output runs/gpu --parts sampled step --minutes 3
    python benchmarks/gpu.py --output /tmp/check --device cpu --tiny        # the same code on a CPU: shows that it runs

Each part is a separate process with a time limit. If it fails, hangs or breaks the device, its traceback is recorded
and the next part runs. The results are gpu.json, gpu.md and the files of the parts, which docs/gpu.md describes, also
what is needed. The exit status is 1 if anything failed, was stopped, or a part ran nothing; a case that does not fit
the card is no failure.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpu_about import about
from gpu_report import markdown

HERE = Path(__file__).resolve().parent
LEAST = {"correct": 110.0, "sampled": 20.0, "step": 40.0, "70b": 40.0, "plan": 30.0}
"""Seconds that a part gets first: its imports and its most important cases. Less if all together have less."""
SHARES = {"correct": 0.35, "sampled": 0.10, "step": 0.30, "70b": 0.20, "plan": 0.05}
"""Share of the rest of the time for each part. Time that a part does not use goes to the later parts."""
_GRACE = 10.0
"""Seconds by which a case may exceed its part's time, and that a part has to end after a signal."""


def seconds_for(parts: list[str], left: float) -> float:
    """Return the seconds for the first of the parts that remain.

    Args:
        parts: The parts that remain.
        left: Seconds for all of them together.
    """
    least = sum(LEAST[name] for name in parts)
    share = SHARES[parts[0]] / sum(SHARES[name] for name in parts)
    return LEAST[parts[0]] * min(1.0, max(0.0, left) / least) + max(0.0, left - least) * share


def wait_for(pid: int, seconds: float) -> bool:
    """Return whether a child process ends in time. The process is not reaped; the caller does that."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return True
        time.sleep(0.05)
    return False


def run_part(
    name: str, options: argparse.Namespace, seconds: float, variables: dict[str, str] | None = None
) -> dict[str, Any]:
    """Run one part in a process group of its own, and kill the group when its time is over.

    Args:
        name: Name of the part.
        options: Options of this program.
        seconds: Time of the part, from now on.
        variables: Environment variables for it.
    """
    result, log = options.output / f"{name}.json", options.output / f"{name}.log"
    result.unlink(missing_ok=True)
    began = time.monotonic()
    command = [sys.executable, str(HERE / f"gpu_{name}.py"), "--result", str(result), "--device", options.device]
    command += ["--until", f"{began + max(1.0, seconds - _GRACE):.3f}"] + ["--tiny"] * options.tiny
    times = options.output / "sampled_times.json"
    if name in ("step", "70b", "plan") and times.is_file():
        command += ["--times", str(times)]
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    environment |= variables or {}
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
    found = json.loads(result.read_text()) if result.is_file() else {"rows": []}
    why = "" if ended else f"not over after {seconds + _GRACE:.0f} s"
    last_words = f"exit code {code}\n{log.read_text(errors='replace')[-6000:]}"
    seconds_taken = round(time.monotonic() - began, 1)
    return judge(found["rows"], code, why, last_words) | found | {"seconds": seconds_taken}


def judge(rows: list[dict[str, Any]], code: int, why: str, last_words: str) -> dict[str, Any]:
    """Tell how a part ended, and complete the row of a case that it was ended in.

    Args:
        rows: Its rows.
        code: Its exit code.
        why: Reason for which it was stopped; empty if it ended by itself.
        last_words: What it printed last.
    """
    for row in rows:
        if row["status"] == "running":
            row |= {"status": "stopped", "why": why} if why else {"status": "failed", "traceback": last_words}
    if why:
        return {"status": "stopped", "why": why}
    if code == 0 and any(row["status"] == "not run" for row in rows) and not any(map(_ran, rows)):
        return {"status": "not run", "why": "there was no time for any case"}
    if code == 0:
        return {"status": "ok"}
    failed = any(row["status"] == "failed" for row in rows)  # else it began no case
    return {"status": "failed"} | ({} if failed else {"traceback": last_words})


def _ran(row: dict[str, Any]) -> bool:
    return row["status"] not in ("not run", "missing")


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
    machine, variables = about(options.device)
    report: dict[str, Any] = {"command": command, "about": machine, "parts": {}}
    parts = [name for name in SHARES if name in options.parts]
    for number, name in enumerate(parts):
        seconds = seconds_for(parts[number:], end - time.monotonic())
        print(f"{name}: {seconds:.0f} s at most ...", flush=True)
        report["parts"][name] = found = run_part(name, options, seconds, variables)
        print(f"{name}: {found['status']} after {found['seconds']:.0f} s", flush=True)
        (options.output / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.output / "gpu.md").write_text(markdown(report))
    print(re.sub(r"\n{3,}", "\n\n", markdown(report)))
    sys.exit(int(any(part["status"] != "ok" for part in report["parts"].values())))


if __name__ == "__main__":
    main()
