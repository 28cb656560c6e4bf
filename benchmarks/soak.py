"""Kill a run again and again, go on with other ranks and other backends, and compare the end with an uninterrupted run.

    python benchmarks/soak.py --config launch/recipes/quickstart.yaml --steps 16 --global_batch 4 --kills 6 --output /tmp/soak

Every attempt starts launch/train.py on a drawn layout and ends it at a drawn moment: SIGKILL of one rank, of all processes or
of torchrun alone, SIGUSR1 to a rank, or SIGTERM to torchrun; the last three save first. Prints what happened and the
differences in losses, masks, supports and weights.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "single": (1, ["--backend", "single"]),
    "fsdp": (2, ["--backend", "fsdp"]),
    "ddp": (2, ["--backend", "ddp"]),
    "zero2": (2, ["--deepspeed", "ds_configs/zero2.json", "--backend", "auto"]),
    "zero3": (2, ["--deepspeed", "ds_configs/zero3.json", "--backend", "auto"]),
}

HOW = {
    "SIGKILL to one rank": signal.SIGKILL,
    "SIGKILL to everything": signal.SIGKILL,
    "SIGKILL to torchrun": signal.SIGKILL,
    "SIGTERM to torchrun": signal.SIGTERM,
    "SIGUSR1 to one rank": signal.SIGUSR1,
}


def start(layout: str, args: argparse.Namespace, output: Path) -> subprocess.Popen[bytes]:
    """Start an attempt in a session of its own."""
    ranks, options = LAYOUTS[layout]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--master-port", str(random.Random().randint(20000, 31000)), "launch/train.py", "--config", args.config]
    command += ["--output", str(output), "--steps", str(args.steps), "--global_batch", str(args.global_batch)]
    command += ["--save_every", str(args.save_every), "--threads", "1", *options, *args.options]
    with open(f"{output}.log", "ab") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)


def ranks_of(agent: int) -> list[int]:
    """Processes of the ranks that an agent has started."""
    found = subprocess.run(["ps", "--ppid", str(agent), "-o", "pid=", "-o", "args="], capture_output=True, text=True)
    return [int(line.split()[0]) for line in found.stdout.splitlines() if "launch/train.py" in line]


def newest(output: Path) -> str:
    """Name of the newest checkpoint."""
    found = sorted(path.parent.name for path in (output / "checkpoints").glob("step-*/checkpoint.json"))
    return found[-1] if found else "none"


def records(output: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl."""
    path = output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def disturb(process: subprocess.Popen[bytes], output: Path, draw: random.Random) -> str:
    """Wait until an attempt has made some steps and a random while more, then hit it."""
    before = len(records(output))
    while process.poll() is None and len(records(output)) <= before + draw.randint(0, 2):
        time.sleep(0.2)
    time.sleep(draw.uniform(0, 4))
    if process.poll() is not None:
        return "ended by itself"
    how = draw.choice(list(HOW))
    ranks = ranks_of(process.pid)
    # torchrun gives ranks sessions of their own
    one = [draw.choice(ranks)] if ranks else []
    victims = {"rank": one, "torchrun": [process.pid], "everything": [process.pid, *ranks]}[how.split()[-1]]
    for victim in victims:
        os.kill(victim, HOW[how])
    code = process.wait(timeout=300)
    end = time.monotonic() + 300
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < end, f"ranks {ranks} are left behind"
        time.sleep(0.1)
    return f"{how}, exit code {code}"


def compare(found: Path, whole: Path) -> dict[str, Any]:
    """Largest differences between two finished runs."""
    ours, theirs = records(found), records(whole)
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (found, whole))
    evolutions = [[line["evolution"]["digest"] for line in lines if "evolution" in line] for lines in (ours, theirs)]
    return {
        "steps": [line["step"] for line in ours] == [line["step"] for line in theirs],
        "loss, relative": max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(ours, theirs, strict=True)),
        "evolutions": len(evolutions[0]),
        "equal masks and supports": sum(a == b for a, b in zip(*evolutions, strict=True)),
        "weights, largest difference": max(float((one[name] - other[name]).abs().max()) for name in one),
        "zeros that differ": sum(int(((one[name] == 0) != (other[name] == 0)).sum()) for name in one),
    }


def main() -> None:
    """Run the uninterrupted run, then the one that is killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--global_batch", type=int, default=4)
    parser.add_argument("--save_every", type=int, default=2)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    args, rest = parser.parse_known_args()
    args.options = rest
    args.output.mkdir(parents=True, exist_ok=True)
    draw = random.Random(args.seed)
    whole, run = args.output / "whole", args.output / "run"
    if not (whole / "result.json").exists():
        code = start(args.layouts[0], args, whole).wait()
        assert code == 0, f"the uninterrupted run failed: see {whole}.log"
    attempt = 0
    while not (run / "result.json").exists():
        layout = draw.choice(args.layouts)
        process = start(layout, args, run)
        begun = newest(run)
        what = disturb(process, run, draw) if attempt < args.kills else f"left alone, exit code {process.wait()}"
        attempt += 1
        print(f"attempt {attempt}: {layout:<7} from {begun:<14} to {newest(run):<14} {what}", flush=True)
        assert attempt < args.kills + 5, f"the run does not end: see {run}.log"
    print(json.dumps(compare(run, whole), indent=1))


if __name__ == "__main__":
    main()
