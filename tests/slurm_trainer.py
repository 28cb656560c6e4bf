"""Stands in for launch/train.py where only Slurm is tested: steps that sleep, checkpoints, and the same ends.

SIGUSR1 or SIGTERM: save, exit 0. A finished run: result.json. The environment says what goes wrong:
STEPS, STEP_SECONDS, SAVE_SECONDS   length of the run, of a step in the first attempt, of a save after a signal
FAIL_AT, FAIL_CODE                  rank 0 exits with this code before step FAIL_AT, after FAIL_RESTARTS restarts
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

received: list[int] = []


def remember(number: int, frame: FrameType | None) -> None:
    """Only takes a note; the loop looks at it between two steps."""
    received.append(number)


def output() -> Path:
    """The value of the last --output."""
    values = [b for a, b in zip(sys.argv, sys.argv[1:], strict=False) if a == "--output"]
    values += [a.partition("=")[2] for a in sys.argv if a.startswith("--output=")]
    return Path(values[-1])


def save(folder: Path, step: int) -> None:
    """Publish a checkpoint as the real one is: the file in a folder that appears whole."""
    (folder / "partial").mkdir(parents=True, exist_ok=True)
    (folder / "partial" / "checkpoint.json").write_text(json.dumps({"step": step}))
    if not (folder / f"step-{step:08d}").exists():
        (folder / "partial").rename(folder / f"step-{step:08d}")


def number(name: str, default: float) -> float:
    """A number from the environment."""
    return float(os.environ.get(name, default))


def main() -> None:
    """Train until the end, a signal, or the failure that was ordered."""
    if "--print_config" in sys.argv:
        sys.exit(2 if "--unknown" in sys.argv else 0)
    signal.signal(signal.SIGUSR1, remember)
    signal.signal(signal.SIGTERM, remember)
    rank, restarts = int(os.environ["SLURM_PROCID"]), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    folder = output()
    checkpoints = folder / "checkpoints"
    done = max((int(path.name[5:]) for path in checkpoints.glob("step-*")), default=0)
    print(f"rank {rank} on {os.uname().nodename} from step {done}, MARK={os.environ.get('MARK', '')}", flush=True)
    for step in range(done + 1, int(number("STEPS", 3)) + 1):
        if rank == 0 and step == number("FAIL_AT", -1) and restarts < number("FAIL_RESTARTS", 99):
            sys.exit(int(number("FAIL_CODE", 1)))
        time.sleep(number("STEP_SECONDS", 0.1) if restarts == 0 else 0.1)
        if received:
            time.sleep(number("SAVE_SECONDS", 0))
            if rank == 0:
                save(checkpoints, step)
            print(f"rank {rank} stopped by {signal.Signals(received[0]).name} after step {step}", flush=True)
            return
        if rank == 0 and "--save_every" in sys.argv:
            save(checkpoints, step)
    if rank == 0:
        sparsity = {"final": 0.5, "layers_off_target": 0}
        result = {"steps": int(number("STEPS", 3)), "loss": 1.0, "seconds": 0.5, "sparsity": sparsity}
        (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
