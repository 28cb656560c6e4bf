"""Checks of benchmarks/soak.py: exit codes and files of attempts, and a finished run against the undisturbed one."""

import argparse
import json
import signal
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from seft_dist.io.checkpoint import KEEP, complete, read_manifest
from seft_dist.io.checkpoint.files import rank_file, verify_checksum
from seft_dist.reproduce.promise import WEIGHT_ABSOLUTE, WEIGHT_RELATIVE
from seft_dist.training.writer_lock import LOCK

LIMIT = 400.0
"""Seconds within which all processes must end after a kill. During the start, a rank waits for a missing one as long
as --timeout says."""

LEFT_BY_KILLS = (LOCK, "diagnosis")
"""Names in a run's folder that a killed attempt may leave: its lock, and what a rank wrote whose peer was gone."""


def lines(path: Path) -> list[dict[str, Any]]:
    """Read the complete lines of a file of JSON lines."""
    text = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith(b"\n")]


def newest(output: Path) -> int:
    """Step of the newest checkpoint; 0 if there is none."""
    found = complete(output / "checkpoints")
    return int(found[-1].name.rpartition("-")[2]) if found else 0


def wrong_code(found: dict[str, Any]) -> list[str]:
    """Check the exit code against docs/checkpoints.md; that of a launcher may differ from those of its ranks."""
    code, how, single = found["code"], found["how"], found["layout"] == "single"
    if code is None:
        return [f"did not end within {LIMIT:.0f} s"]
    if found["finished"] and code in (0, 130):
        return []
    if how == "finished":
        return [f"exit code {code} without having been disturbed"] if code else ["exit code 0 and no result"]
    number = signal.Signals[how.split()[0]]
    if number == signal.SIGKILL:
        allowed = {-9} if single or not how.endswith("rank") else {1} if found["layout"] in ("fsdp", "ddp") else None
    elif single:  # the signal kills Python if it is still starting
        allowed = {130 if number == signal.SIGINT else 0} | ({-number, 1} if found["phase"] == "start-up" else set())
    else:
        allowed = None
    if allowed is None:  # torchrun, deepspeed and mpirun may give any code except that for "do not retry"
        return ["exit code 2"] if code == 2 else []
    return [] if code in allowed else [f"exit code {code} after {how}: needs {sorted(allowed)}"]


def wrong_state(args: argparse.Namespace, output: Path, before: int) -> list[str]:
    """Check the files that every attempt must leave, however it ended."""
    problems = []
    found = complete(output / "checkpoints")
    step = newest(output)
    if step < before:
        problems.append(f"the newest checkpoint was of step {before} and is of {step}")
    if len(found) > KEEP + 1:  # a kill may come before the old one is removed
        problems.append(f"{len(found)} checkpoints")
    for path in found[-1:]:
        try:
            manifest = read_manifest(path)
            for rank, digest in enumerate(manifest["sha256"]):
                verify_checksum(path / rank_file(rank, manifest["world_size"]), digest)
        except (ValueError, OSError) as error:
            problems.append(f"the newest checkpoint cannot be read: {error}")
    for name in ("metrics.jsonl", "trace.jsonl"):
        steps = [line["step"] for line in lines(output / name)]
        if steps != list(range(1, len(steps) + 1)) or len(steps) < step:
            problems.append(f"{name} has steps {steps} at checkpoint {step}")
    whole = {line["step"]: line["loss"] for line in lines(args.whole / "metrics.jsonl")}
    worst = max((abs(line["loss"] / whole[line["step"]] - 1) for line in lines(output / "metrics.jsonl")), default=0.0)
    if worst > args.tolerance:
        problems.append(f"losses differ by {worst:.1e}")
    aside = [path.name for folder in (output, output / "checkpoints") for path in folder.glob("damaged-*")]
    return problems + ([f"put aside: {aside}"] if aside else [])


def compare(args: argparse.Namespace, output: Path) -> dict[str, Any]:
    """Compare a finished run with the undisturbed one."""
    ours, theirs = (lines(folder / "metrics.jsonl") for folder in (output, args.whole))
    digests = [[line["evolution"]["digest"] for line in one if "evolution" in line] for one in (ours, theirs)]
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (output, args.whole))
    names = [
        {path.name for path in folder.glob("*") if path.suffix != ".diff" and path.name not in LEFT_BY_KILLS}
        for folder in (output, args.whole)
    ]
    far = [name for name in one if not one[name].allclose(other[name], rtol=WEIGHT_RELATIVE, atol=WEIGHT_ABSOLUTE)]
    zeros = [name for name in one if not (one[name] == 0).equal(other[name] == 0)]
    kept = sorted(path.name for path in (output / "checkpoints").iterdir())
    checks = {
        "steps": [line["step"] for line in ours] == list(range(1, args.steps + 1)),
        "masks and supports": digests[0] == digests[1],
        f"weights of {far[:3]}": not far,
        f"zeros of {zeros[:3]}": not zeros,
        f"names in the folder: {sorted(names[0] ^ names[1])}": names[0] == names[1],
        f"checkpoints: {kept}": len(kept) == min(KEEP, len(complete(args.whole / "checkpoints"))),
        "layers off target": json.loads((output / "result.json").read_text())["sparsity"]["layers_off_target"] == 0,
    }
    return {
        "loss": max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(ours, theirs, strict=False)),
        "weights": max(float((one[name] - other[name]).abs().max()) for name in one),
        "problems": [f"the finished run differs in {what}" for what, holds in checks.items() if not holds],
    }
