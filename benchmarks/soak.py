"""Soak test: kill runs again and again, resume them on other layouts and launchers, and check each time what is left.

    python benchmarks/soak.py --output /tmp/soak --kills 300
    python benchmarks/soak.py --config launch/recipes/quickstart.yaml --steps 16 --kills 6 --output /tmp/soak_real

Each attempt starts launch/train.py with a random launcher, and ends it at a random moment of its start, its steps or
its export, by SIGKILL to a rank, to the launcher or to all processes, or sometimes by a signal that asks it to stop. A
run is killed until it is finished, at most ``--kills_of_a_run`` times; then the next run begins. Without --config a
tiny random model and text are made, so that a kill costs only seconds.

After each attempt these are checked: no process is left; the exit code is one of docs/checkpoints.md; the newest
checkpoint is intact and not older than before; there are not too many checkpoints; metrics.jsonl and trace.jsonl have
every step from 1 to at least that checkpoint exactly once; losses are those of the undisturbed run. Of a finished run
also masks, supports, weights and zeros are compared, and its folder must hold the same files as that of the undisturbed
run.

OUTPUT/kills.jsonl has a line for each attempt, and the same command continues from there. Random choices depend only on
the seed and the numbers of run and attempt.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.soak_checks import LIMIT, compare, lines, newest, wrong_code, wrong_state  # noqa: E402
from seft_dist.reproduce.promise import LOSS_RELATIVE  # noqa: E402
from seft_dist.training.run_folder import is_finished  # noqa: E402

SCRIPT = "launch/train.py"
LAYOUTS: dict[str, tuple[list[str], list[str]]] = {
    "single": ([sys.executable], ["--backend", "single"]),
    "fsdp": (["torchrun"], ["--backend", "fsdp"]),
    "ddp": (["torchrun"], ["--backend", "ddp"]),
    "zero2": (["deepspeed"], ["--deepspeed", "ds_configs/zero2.json"]),
    "zero3": (["deepspeed"], ["--deepspeed", "ds_configs/zero3.json"]),
    "mpi": (["mpirun"], ["--backend", "fsdp"]),
}
"""Launcher and options of each layout; all have two ranks except the first."""
HOW = {
    "SIGKILL to a rank": 6,
    "SIGKILL to the launcher": 4,
    "SIGKILL to everything": 4,
    "SIGTERM to the launcher": 1,
    "SIGINT to the launcher": 1,
    "SIGUSR1 to a rank": 1,
}
"""Kinds of kills, with their relative frequencies."""
PHASES = ("start-up", "steps", "export")


def launcher(layout: str) -> list[str]:
    """Return the launcher's part of the command."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    name = LAYOUTS[layout][0][0]
    return {
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port],
        "deepspeed": [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", port],
        "mpirun": ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable],
    }.get(name, [sys.executable])


def start(layout: str, args: argparse.Namespace, output: Path) -> subprocess.Popen[bytes]:
    """Start an attempt in its own process session, with its output in OUTPUT.log."""
    ranks = 1 if layout == "single" else 2
    command = [*launcher(layout), SCRIPT, "--config", str(args.config), "--output", str(output)]
    command += [
        "--steps",
        str(args.steps),
        "--global_batch",
        str(args.global_batch),
        "--save_every",
        str(args.save_every),
    ]
    command += ["--batch_size", str(max(1, args.global_batch // ranks)), "--threads", "1", "--trace", "true"]
    command += [*LAYOUTS[layout][1], *args.options]
    known = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {key: value for key, value in os.environ.items() if key not in known}
    env |= {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    with open(f"{output}.log", "ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)


def processes(output: Path) -> dict[int, bool]:
    """Find the processes that belong to a run's folder; True for a rank, False for a launcher."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # the process has just ended
            continue
        if str(output) in words and SCRIPT in words:
            before = [word for word in words[1 : words.index(SCRIPT)] if word != "-u"]
            found[int(entry.parent.name)] = not before and Path(words[0]).name.startswith("python")
    return found


def identity(path: Path) -> int | None:
    """Inode number of a file, which changes when the file is replaced; None if there is no file."""
    return path.stat().st_ino if path.exists() else None


def last_step(output: Path, earlier: int | None) -> int | None:
    """Last step that an attempt has recorded; None while metrics.jsonl is still the file of the ``earlier`` attempt."""
    path = output / "metrics.jsonl"
    if identity(path) in (None, earlier):
        return None
    found = lines(path)
    return found[-1]["step"] if found else 0


def wait_for(
    moment: str,
    process: subprocess.Popen[bytes],
    args: argparse.Namespace,
    output: Path,
    earlier: int | None,
    draw: random.Random,
) -> None:
    """Wait for a random moment of an attempt, or for its end."""
    begun, steps = time.monotonic(), args.steps
    if moment == "start-up":
        delay = draw.uniform(0, args.startup) if draw.random() < 0.8 else draw.uniform(0, 1)
        while process.poll() is None and time.monotonic() < begun + delay:
            time.sleep(0.01)
        return
    first = newest(output)
    until = steps if moment == "export" else min(steps, first + draw.randint(1, max(1, steps - first)))
    delay = draw.uniform(0, 2.0 if moment == "export" else 0.3)
    while process.poll() is None and (last_step(output, earlier) or 0) < until and time.monotonic() < begun + LIMIT:
        time.sleep(0.01)
    time.sleep(delay)


def hit(process: subprocess.Popen[bytes], output: Path, how: str, draw: random.Random) -> str | None:
    """Send the chosen signal, to the launcher if there is no rank yet; returns what was sent, None if nothing runs."""
    running = processes(output)
    ranks = sorted(pid for pid, is_rank in running.items() if is_rank)
    if how.endswith("rank") and not ranks:
        how = how.replace("a rank", "the launcher")
    victims = {
        "rank": ranks and [draw.choice(ranks)],
        "launcher": [process.pid],
        "everything": [process.pid, *running],
    }[how.split()[-1]]
    if process.poll() is not None:
        return None
    for victim in victims:
        try:
            os.kill(victim, signal.Signals[how.split()[0]])
        except ProcessLookupError:
            continue
    return how


def attempt(args: argparse.Namespace, output: Path, draw: random.Random, disturbed: bool) -> dict[str, Any]:
    """Run one attempt until all of its processes have ended; returns what happened and the problems found."""
    layout, how = draw.choice(args.layouts), draw.choices(list(HOW), list(HOW.values()))[0]
    moment = draw.choices(PHASES, (3, 4, 3))[0]
    for pid in processes(output):  # left over from an earlier call of this script
        os.kill(pid, signal.SIGKILL)
    before, earlier, begun = newest(output), identity(output / "metrics.jsonl"), time.monotonic()
    process = start(layout, args, output)
    found: dict[str, Any] = {"layout": layout, "from": before, "how": "finished"}
    if disturbed:
        wait_for(moment, process, args, output, earlier, draw)
        step, saving = last_step(output, earlier), bool(list((output / "checkpoints").glob("partial-*")))
        sent = hit(process, output, how, draw)
        if sent:
            phase = "start-up" if step is None else "export" if step == args.steps else "steps"
            found |= {"how": sent, "phase": phase, "saving": saving}
    try:
        found["code"] = process.wait(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        found["code"] = None
    left = set(processes(output))
    while left and time.monotonic() < begun + 2 * LIMIT:
        time.sleep(0.05)
        left = set(processes(output))
    for pid in left | ({process.pid} if found["code"] is None else set()):
        os.kill(pid, signal.SIGKILL)
    found |= {"to": newest(output), "seconds": round(time.monotonic() - begun, 1), "finished": is_finished(output)}
    problems = [f"left running: {sorted(left)}"] if left else []
    return found | {"problems": problems + wrong_code(found) + wrong_state(args, output, before)}


def make_inputs(folder: Path) -> Path:
    """Write a tiny random model, text for it, and a recipe."""
    from tests.folders import model_folder, text_file

    folder.mkdir(parents=True, exist_ok=True)
    model_folder(folder / "pruned")
    text_file(folder / "text.jsonl")
    recipe = {
        "model": {"path": str(folder / "pruned")},
        "data": {"path": str(folder / "text.jsonl"), "seq_len": 16},
        "seft": {"density": 0.05, "interval": 4, "window": 2},
        "optim": {"lr": 0.003},
        "timeout": 60.0,
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    return folder / "recipe.yaml"


def soak(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run attempts until there are enough kills; returns every line of the log."""
    log_file = args.output / "kills.jsonl"
    log = lines(log_file)
    if log_file.exists():  # the attempt of an incomplete line is repeated
        log_file.write_text("".join(json.dumps(line) + "\n" for line in log))
    begun = time.monotonic()
    run = log[-1]["run"] if log else 0
    closed = not log or log[-1]["finished"] or bool(log[-1]["problems"])
    while not (closed and sum(line["how"] != "finished" for line in log) >= args.kills):
        run += closed
        output, own = args.output / "runs" / f"{run:04d}", [line for line in log if line["run"] == run]
        output.parent.mkdir(parents=True, exist_ok=True)
        draw = random.Random(f"{args.seed} {run} {len(own)}")
        kills = sum(line["how"] != "finished" for line in log)
        line = attempt(args, output, draw, kills < args.kills and len(own) < args.kills_of_a_run)
        line = {"run": run, "attempt": len(own) + 1} | line
        if line["finished"]:
            end = compare(args, output)
            line |= {"loss": end["loss"], "weights": end["weights"], "problems": line["problems"] + end["problems"]}
        with log_file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        log.append(line)
        closed = line["finished"] or bool(line["problems"])
        if line["finished"] and not line["problems"]:
            shutil.rmtree(output)
            Path(f"{output}.log").unlink()
        kills, minutes = sum(one["how"] != "finished" for one in log), (time.monotonic() - begun) / 60
        print(
            f"kill {kills} of {args.kills}, run {run}.{line['attempt']}, {minutes:.0f} min: {line['layout']:<6} from "
            f"step {line['from']} to {line['to']}, {line['how']} {line.get('phase', '')}, exit code {line['code']}"
            f"{'; PROBLEM: ' + '; '.join(line['problems']) if line['problems'] else ''}",
            flush=True,
        )
    return log


def summarize(log: list[dict[str, Any]]) -> None:
    """Print a summary of the attempts and the problems."""
    table = Table(title="Kills by layout and moment")
    for name in ("layout", "how", *PHASES, "while saving", "all"):
        table.add_column(name, justify="left" if name in ("layout", "how") else "right")
    kills = [line for line in log if line["how"] != "finished"]
    for (layout, how), count in sorted(Counter((line["layout"], line["how"]) for line in kills).items()):
        own = [line for line in kills if (line["layout"], line["how"]) == (layout, how)]
        phases = [str(sum(line["phase"] == phase for line in own)) for phase in PHASES]
        table.add_row(layout, how, *phases, str(sum(line["saving"] for line in own)), str(count))
    phases = [str(sum(line["phase"] == phase for line in kills)) for phase in PHASES]
    table.add_row("all", "", *phases, str(sum(line["saving"] for line in kills)), str(len(kills)), style="bold")
    Console(width=120).print(table)
    ended = [line for line in log if line["finished"]]
    wrong = [line for line in log if line["problems"]]
    summary = {
        "attempts": len(log),
        "kills": len(kills),
        "finished runs": len(ended),
        "largest relative difference of a loss": max((line["loss"] for line in ended), default=None),
        "largest difference of a weight": max((line["weights"] for line in ended), default=None),
        "median seconds of an attempt": statistics.median(line["seconds"] for line in log) if log else None,
        "problems": [f"run {line['run']}.{line['attempt']}: {'; '.join(line['problems'])}" for line in wrong],
    }
    print(json.dumps(summary, indent=1))


def main() -> None:
    """Run the undisturbed run, and then those that are killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="a recipe of launch/train.py; default: a tiny random model")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--global_batch", type=int, default=4)
    parser.add_argument("--save_every", type=int, default=1)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--kills_of_a_run", type=int, default=8)
    parser.add_argument("--startup", type=float, default=20.0, help="seconds of start-up in which kills are drawn")
    parser.add_argument("--tolerance", type=float, default=LOSS_RELATIVE, help="relative, of losses")
    parser.add_argument("--seed", type=int, default=0)
    there = [name for name in LAYOUTS if name != "mpi" or shutil.which("mpirun")]
    parser.add_argument("--layouts", nargs="+", default=there, choices=list(LAYOUTS))
    args, args.options = parser.parse_known_args()
    args.output = args.output.resolve()
    args.whole = args.output / "whole"
    args.output.mkdir(parents=True, exist_ok=True)
    if args.config is None:
        args.config = args.output / "inputs" / "recipe.yaml"
        if not args.config.exists():
            make_inputs(args.config.parent)
    if not is_finished(args.whole):
        code = start(args.layouts[0], args, args.whole).wait()
        if code:
            sys.exit(f"the undisturbed run failed with code {code}: see {args.whole}.log")
    log = soak(args)
    summarize(log)
    sys.exit(any(line["problems"] for line in log))


if __name__ == "__main__":
    main()
