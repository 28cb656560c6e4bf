"""All programs of launch/ on a model of a real shape, on one machine: duration, peak memory and disk space of each.

    python benchmarks/walk.py --shape Llama-2-7B --output /tmp/walk             all steps
    python benchmarks/walk.py --shape Llama-2-7B --output /tmp/walk --steps plan evaluate
    python benchmarks/walk.py --shape Llama-2-13B --density 0.002 --seq_len 8 --output /tmp/walk13 \
      --steps make prune_wanda train_short
    python benchmarks/walk.py --output /tmp/walk --show                          the table again

The model has random values, whose costs are those of a trained model. It is written one layer at a time, with a
tokenizer that is trained on CPython's documentation; the same text is used for pruning, training and evaluation. A step
that is finished is not repeated; its log is in OUTPUT/logs. A run that was killed and
resumed must end with the deltas of the one that was not, and removing a delta must give back the model, both bit for
bit. Memory is that of all processes of a step together: "own" counts anonymous pages, and "resident" also pages of
files, which the kernel reclaims when it needs them.
"""

import argparse
import json
import math
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from walk_checks import CHECKS
from walk_model import TINY, make_model, make_tokenizer

from seft_dist.files.writing import write_json
from seft_dist.planning.architectures import ARCHITECTURES

ROOT = Path(__file__).parents[1]


@dataclass
class Cost:
    """Costs of one step."""

    seconds: float
    own_bytes: int
    """Peak of the anonymous memory of all processes of the step."""
    resident_bytes: int
    """Peak of their resident memory, including pages of mapped files."""
    disk_bytes: int
    """Bytes of the files that it wrote."""


class Walk:
    """The steps, in the order of a user's work. Each is a method named ``do_*`` that returns a command."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.root = args, Path(args.output).resolve()
        self.model, self.text = self.root / "model", self.root / "text"
        self.pruned, self.run = self.root / "pruned-wanda", self.root / "run-single"
        self.data = ["--data.path", str(self.text / "train.jsonl"), "--data.seq_len", str(args.seq_len)]

    def weights(self) -> int:
        """Number of values in the model."""
        folder = self.model if self.model.exists() else self.pruned
        total = 0
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        return total

    def command(self, name: str, *options: str, ranks: int = 1) -> list[str]:
        """Command line that starts a program of launch/ on a number of ranks."""
        started = [sys.executable]
        if ranks > 1:
            started += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        return [*started, str(ROOT / "launch" / f"{name}.py"), *options]

    def do_make(self) -> list[str]:
        return [sys.executable, __file__, "--shape", self.args.shape, "--output", str(self.root), "--make"]

    def do_prune_magnitude(self) -> list[str]:
        return self._prune("magnitude", self.root / "pruned-magnitude")

    def do_prune_wanda(self) -> list[str]:
        return self._prune("wanda", self.pruned, *self.data, "--sequences", "4")

    def _prune(self, method: str, output: Path, *options: str) -> list[str]:
        given = ["--model.path", str(self.model), "--method", method, "--sparsity", "0.6"]
        return self.command("prune", *given, "--output", str(output), *options)

    def train(self, output: Path, *options: str, steps: int = 4, ranks: int = 1) -> list[str]:
        """Command for training: first support, an evolution in step 2, a checkpoint every two steps."""
        given = [
            "--model.path",
            str(self.pruned),
            *self.data,
            "--output",
            str(output),
            "--steps",
            str(steps),
            "--save_every",
            "2",
        ]
        given += ["--global_batch", "2", "--model.activation_checkpointing", "true", "--packing", "resident"]
        given += ["--seft.density", str(self.args.density), "--seft.interval", "2", "--seft.window", "1"]
        given += ["--seft.end", "2", "--seft.window_store", "factored"]
        return self.command("train", *given, *options, ranks=ranks)

    def do_train_single(self) -> list[str]:
        return self.train(self.run)

    def do_train_killed(self) -> list[str]:
        """Train, and kill the run as soon as the checkpoint of step 2 is complete; the next step resumes it."""
        return self.train(self.root / "run-killed", "--export", "false")

    def do_train_resumed(self) -> list[str]:
        return self.train(self.root / "run-killed", "--export", "false")

    def do_train_fsdp(self) -> list[str]:
        return self.train(self.root / "run-fsdp", "--backend", "fsdp", "--export", "false", ranks=2)

    def do_train_short(self) -> list[str]:
        """Train two steps on the first support, without an export: for shapes that are too large for the rest."""
        return self.train(self.root / "run-short", "--export", "false", "--seft.static", "true", steps=2)

    def do_export_hf(self) -> list[str]:
        return self.command("export", "hf", "--run", str(self.run), "--output", str(self.root / "exported"))

    def do_export_pack(self) -> list[str]:
        return self.command("export", "pack", "--model", str(self.run / "model"), "--output", str(self.root / "packed"))

    def do_evaluate(self) -> list[str]:
        data = ["--data.path", str(self.text / "heldout.jsonl"), "--data.seq_len", str(self.args.seq_len)]
        given = ["--models.repaired", str(self.run / "model"), *data, "--data.max_records", "2"]
        return self.command("evaluate", *given, "--output", str(self.root / "eval.json"))

    def do_delta_apply(self) -> list[str]:
        delta = ["--delta", str(self.run / "delta.safetensors")]
        return self.command(
            "export", "delta", "apply", "--base", str(self.pruned), *delta, "--output", str(self.root / "applied")
        )

    def do_delta_remove(self) -> list[str]:
        delta = ["--delta", str(self.run / "delta.safetensors")]
        return self.command(
            "export",
            "delta",
            "remove",
            "--model",
            str(self.root / "applied"),
            *delta,
            "--output",
            str(self.root / "removed"),
        )

    def do_plan(self) -> list[str]:
        cluster = ["--cluster.nodes", "1", "--cluster.gpus_per_node", "2"]
        given = ["--model", str(self.pruned), "--seq_len", str(self.args.seq_len), "--global_batch", "2"]
        return self.command("plan", *given, *cluster, "--seft.density", str(self.args.density))

    # Files that each step writes, for the disk space
    LEAVES = {
        "make": ["model"],
        "prune_magnitude": ["pruned-magnitude"],
        "prune_wanda": ["pruned-wanda"],
        "train_single": ["run-single/checkpoints"],
        "train_killed": ["run-killed/checkpoints"],
        "train_resumed": ["run-killed/checkpoints"],
        "train_fsdp": ["run-fsdp/checkpoints"],
        "train_short": ["run-short/checkpoints"],
        "export_hf": ["exported"],
        "export_pack": ["packed"],
        "delta_apply": ["applied"],
        "delta_remove": ["removed"],
    }

    # Folders that no later step reads: a 7B model in bf16 takes 13.5 GB each time it is written out.
    DROPS = {
        "prune_magnitude": ["pruned-magnitude"],
        "prune_wanda": ["model"],
        "train_resumed": ["run-killed"],
        "train_fsdp": ["run-fsdp"],
        "train_short": ["run-short"],
        "export_hf": ["exported"],
        "export_pack": ["packed"],
        "evaluate": ["run-single/model"],
        "delta_remove": ["applied", "removed"],
    }


STEPS = [name.removeprefix("do_") for name in vars(Walk) if name.startswith("do_")]
BY_DEFAULT = [name for name in STEPS if name != "train_short"]


def take_step(walk: Walk, name: str) -> Cost:
    """Run one step's command, and measure the memory of its processes.

    Raises:
        RuntimeError: The command failed; the message names its log.
    """
    log = walk.root / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    killed = name == "train_killed"
    began, own, resident = time.monotonic(), 0, 0
    with log.open("wb") as file:
        process = psutil.Popen(getattr(walk, f"do_{name}")(), stdout=file, stderr=file, cwd=ROOT)
        while process.poll() is None:
            now = _memory(process)
            own, resident = max(own, now[0]), max(resident, now[1])
            if killed and (walk.root / "run-killed/checkpoints/step-00000002/checkpoint.json").exists():
                process.send_signal(signal.SIGKILL)
            time.sleep(0.02 if killed else 0.2)
    if process.returncode != (-signal.SIGKILL if killed else 0):
        raise RuntimeError(f"{name} ended with exit code {process.returncode}: see {log}")
    if check := CHECKS.get(name):
        check(walk.root)
    left = [walk.root / place for place in walk.LEAVES.get(name, [])]
    disk = sum(path.stat().st_size for place in left for path in place.rglob("*") if path.is_file())
    return Cost(time.monotonic() - began, own, resident, disk)


def _memory(process: psutil.Process) -> tuple[int, int]:
    """Anonymous and resident memory of a process and all its descendants, in bytes."""
    own = resident = 0
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.Error:
        return 0, 0
    for one in family:
        try:
            info = one.memory_info()
        except psutil.Error:  # the process has just ended
            continue
        own, resident = own + info.rss - info.shared, resident + info.rss
    return own, resident


def show(found: dict[str, Any], console: Console) -> None:
    """Print the steps that were run."""
    facts = found["machine"]
    title = f"{found['shape']}, {found['weights']:,} weights; "
    title += f"{facts['cores']} cores, {facts['memory_gb']} GB; {facts['date']}"
    table = Table(title=title)
    for column in ("step", "seconds", "own GB", "resident GB", "on disk GB"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for name, row in found["steps"].items():
        sizes = [f"{row[key] / 1e9:.2f}" for key in ("own_bytes", "resident_bytes", "disk_bytes")]
        table.add_row(name.replace("_", " "), f"{row['seconds']:.0f}", *sizes)
    console.print(table)


def machine() -> dict[str, Any]:
    """Describe the machine of the measurements."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cores": psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "python": platform.python_version(),
        "processor": next(
            (
                line.split(":")[1].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if "model name" in line
            ),
            platform.machine(),
        ),
        "versions": {name: version(name) for name in ("torch", "transformers", "safetensors")},
    }


def main() -> None:
    """Read the options, take the steps, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="Llama-2-7B", choices=["tiny", *ARCHITECTURES])
    parser.add_argument("--output", required=True, help="folder for models, runs, logs and walk.json")
    parser.add_argument("--steps", nargs="+", default=BY_DEFAULT, choices=STEPS)
    parser.add_argument("--seq_len", type=int, default=64)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--again", action="store_true", help="take the named steps again, though they are done")
    parser.add_argument("--keep", action="store_true", help="keep every folder, also those that no later step reads")
    parser.add_argument("--show", action="store_true", help="only print the table")
    parser.add_argument(
        "--make", action="store_true", help=argparse.SUPPRESS
    )  # the step "make", in a process of its own
    args = parser.parse_args()
    walk = Walk(args)
    shape = TINY if args.shape == "tiny" else ARCHITECTURES[args.shape]
    if args.make:
        from seft_dist.export.demo import write_text

        make_model(shape, walk.model)
        make_tokenizer(shape["vocab_size"], walk.model)
        write_text(walk.text)
        return
    results = walk.root / "walk.json"
    found: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    if not args.show:
        walk.root.mkdir(parents=True, exist_ok=True)
        for name in args.steps:
            if name in found.get("steps", {}) and not args.again:
                continue
            for place in walk.LEAVES.get(name, []) if name != "train_resumed" else []:
                shutil.rmtree(walk.root / Path(place).parts[0], ignore_errors=True)
            print(f"{time.strftime('%H:%M:%S')} {name} ...", flush=True)
            cost = take_step(walk, name)
            steps = found.get("steps", {}) | {name: asdict(cost)}
            found = {"shape": args.shape, "weights": walk.weights(), "machine": machine()}
            found |= {"options": {"seq_len": args.seq_len, "density": args.density}, "steps": steps}
            write_json(results, found)
            for place in [] if args.keep else walk.DROPS.get(name, []):
                shutil.rmtree(walk.root / place)
    show(found, Console())


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, subprocess.SubprocessError) as error:
        sys.exit(f"walk.py: {error}")
