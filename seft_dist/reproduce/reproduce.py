"""The same run several times and on several layouts, each as a user would start it; every run compared with another.

OUTPUT/1-single-1/        the first run: all other layouts are compared with it
      /2-single-1/        its repetition: must be equal, bit for bit
      /3-fsdp-2/          another layout: compared with 1-single-1 ...
      /4-fsdp-2/          ... and its repetition with 3-fsdp-2
      /3-fsdp-2.log       what the run printed
      /3-fsdp-2.json      the comparison
      /reproduce.json     everything in short
"""

import dataclasses
import datetime
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from seft_dist.backends.deepspeed import load_ds_config
from seft_dist.config import ReproduceConfig, TrainConfig
from seft_dist.data.chat_template import uses_date
from seft_dist.data.tokenizer import load_tokenizer
from seft_dist.files import writing
from seft_dist.io.source import open_source
from seft_dist.reproduce.compare import compare, write_json
from seft_dist.session.distributed import find_ranks
from seft_dist.training.manifest import read_manifest
from seft_dist.training.run_folder import is_finished
from seft_dist.training.trace import FILE as TRACE

FILE = "reproduce.json"
_POLL = 0.2
_TAIL = 25
_PATIENCE = 60.0  # seconds that a run gets to save and end after a signal
_BLOCKS = ("optimizer", "scheduler", "gradient_clipping")


@dataclass(frozen=True)
class Planned:
    """One run that is to be made."""

    name: str
    layout: str
    command: list[str]
    against: str | None
    """Name of the run that it is compared with; None: the first one."""


@dataclass
class Outcome:
    """What became of one run."""

    name: str
    layout: str
    against: str | None
    command: str
    status: str = "waiting"
    """waiting, done, failed or stopped."""
    seconds: float | None = None
    """Of wall time, start and export included."""
    loss: float | None = None
    """Of the last record."""
    digest: str | None = None
    """Of all final supports, masks and weights."""
    verdict: str | None = None
    why: str | None = None
    held: bool | None = None
    """Whether docs/numerics.md is kept, compared with ``against``; None: not compared."""


def plan(config: ReproduceConfig, train: TrainConfig, options: list[str], script: Path) -> list[Planned]:
    """Work out every command.

    Args:
        config: Which runs.
        train: What ``options`` mean.
        options: Of launch/train.py, as they were given.
        script: launch/train.py.

    Raises:
        ValueError: A layout cannot be read, or the runs would not be the same run.
    """
    layouts = [_parse_layout(entry) for entry in config.layouts.split(",") if entry.strip()]
    own = load_ds_config(train.deepspeed) if train.deepspeed else None
    dtype = _dtype(train, own)
    global_batch = train.global_batch or train.batch_size * layouts[0][1]
    planned: list[Planned] = []
    first_of: dict[str, str] = {}
    for backend, ranks, extra in layouts:
        label = f"{backend}:{ranks}" + (f" {shlex.join(extra)}" if extra else "")
        for _ in range(config.runs):
            name = f"{len(planned) + 1}-{backend}-{ranks}"
            against = first_of.get(label, planned[0].name if planned else None)
            first_of.setdefault(label, name)
            given = [
                *options,
                *_layout_options(backend, train, own, dtype, script),
                *("--global_batch", str(global_batch), "--threads", str(train.threads or 1)),
                *("--model.dtype", dtype, "--trace", str(train.is_seft).lower(), "--trackers", "[]"),
                *extra,
                *("--output", str(Path(config.output) / name)),
            ]
            command = [*_launcher(config.launcher, ranks), str(script), *given]
            planned.append(Planned(name, label, command, against))
    return planned


def _parse_layout(entry: str) -> tuple[str, int, list[str]]:
    words = shlex.split(entry)
    found = re.fullmatch(r"(single|ddp|fsdp|zero[0-3]|zero3_offload):(\d+)", words[0])
    if found is None or int(found[2]) < 1 or (found[1] == "single" and found[2] != "1"):
        raise ValueError(
            f"layouts has {words[0]!r}: needs BACKEND:RANKS with single (1 rank), ddp, fsdp, zero0 to zero3 or zero3_offload, "
            'e.g. "single:1, fsdp:2, zero3:2"'
        )
    return found[1], int(found[2]), words[1:]


def _dtype(train: TrainConfig, own: dict[str, Any] | None) -> str:
    """The type of weights that all layouts use, whatever their ds_config says."""
    if own is not None:
        return "bfloat16" if own.get("bf16", {}).get("enabled") else "float32"
    return str(open_source(train.model).dtype).removeprefix("torch.")


def _layout_options(
    backend: str, train: TrainConfig, own: dict[str, Any] | None, dtype: str, script: Path
) -> list[str]:
    blocks = [key for key in _BLOCKS if own is not None and own.get(key, "auto") != "auto"]
    if own is not None and backend == f"zero{own.get('zero_optimization', {}).get('stage', 0)}":
        return ["--backend", "deepspeed", "--deepspeed", str(train.deepspeed)]
    if blocks:
        raise ValueError(
            f"{train.deepspeed} has its own {', '.join(blocks)}, which the layout {backend} would not get: give them as "
            "--optim.* options, which hold everywhere"
        )
    if not backend.startswith("zero"):
        return ["--backend", backend, "--deepspeed", "null"]
    file = script.parents[1] / "ds_configs" / (backend + ("_bf16" if dtype == "bfloat16" else "") + ".json")
    return ["--backend", "deepspeed", "--deepspeed", str(file), "--replicas", "1", "--offload", "false"]


def _launcher(template: str | None, ranks: int) -> list[str]:
    if template is not None:
        return shlex.split(template.replace("{ranks}", str(ranks)))
    if ranks == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]


def reproduce(
    config: ReproduceConfig,
    train: TrainConfig,
    options: list[str],
    script: Path,
    tell: Callable[[str], None] = print,
) -> list[Outcome]:
    """Make the runs and compare them. Starts the ranks as processes of their own.

    Args:
        config: Which runs.
        train: What ``options`` mean.
        options: Of launch/train.py.
        script: launch/train.py.
        tell: Shows a line to the user.

    Returns:
        One item for each run, in order.

    Raises:
        ValueError: The check cannot be made so, or its folder holds another one.
    """
    if find_ranks().world_size > 1:
        raise ValueError(
            "started on several ranks: start it once, with python; it starts the ranks of every run itself"
        )
    folder = Path(config.output)
    planned = plan(config, train, [*options, *_date_options(folder, train)], script)
    _open(folder, planned)
    outcomes = [Outcome(run.name, run.layout, run.against, shlex.join(run.command)) for run in planned]
    for number, (run, outcome) in enumerate(zip(planned, outcomes, strict=True), 1):
        _make(folder, run, outcome, train.steps, f"{number}/{len(planned)} {run.layout}", tell)
        if outcome.status == "done" and run.against is not None:
            _judge(folder, outcome, {other.name: other for other in outcomes})
            tell(f"{run.name} against {run.against}: {outcome.verdict}" + (f": {outcome.why}" if outcome.why else ""))
        _write(folder, outcomes)
        if outcome.status == "stopped" or (number == 1 and outcome.status == "failed"):
            break  # a signal; or there is nothing to compare the others with
    return outcomes


def _date_options(folder: Path, train: TrainConfig) -> list[str]:
    """The day that a chat template sees as today, one for all runs: midnight may be between two of them."""
    if train.data.date is not None:
        return []
    if (folder / FILE).is_file():  # a check that goes on
        words = shlex.split(json.loads((folder / FILE).read_text())["runs"][0]["command"])
        return words[words.index("--data.date") :][:2] if "--data.date" in words else []
    dated = uses_date(load_tokenizer(train.model))
    return ["--data.date", datetime.date.today().isoformat()] if dated else []


def held(outcomes: list[Outcome]) -> bool:
    """Whether every run was made, and every comparison kept docs/numerics.md."""
    return all(outcome.status == "done" for outcome in outcomes) and all(outcome.held for outcome in outcomes[1:])


def _open(folder: Path, planned: list[Planned]) -> None:
    plans = [dataclasses.asdict(run) for run in planned]
    if (folder / FILE).is_file():
        before = json.loads((folder / FILE).read_text())
        if [run["command"] for run in before["runs"]] != [shlex.join(run.command) for run in planned]:
            raise ValueError(f"{folder} holds another check: repeat that very command, or choose another output")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output={folder} is there and holds no check: choose another")
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, [Outcome(run["name"], run["layout"], run["against"], shlex.join(run["command"])) for run in plans])


def _make(folder: Path, run: Planned, outcome: Outcome, steps: int, title: str, tell: Callable[[str], None]) -> None:
    """Make one run, unless it is there already."""
    output, log = folder / run.name, folder / f"{run.name}.log"
    if not is_finished(output):
        began = time.perf_counter()
        with log.open("ab") as file, _progress(output / TRACE, steps, title) as show:
            code, stopped = _wait(subprocess.Popen(run.command, stdout=file, stderr=subprocess.STDOUT), show)
        outcome.seconds = round(time.perf_counter() - began, 1)
        if stopped or (code == 0 and not is_finished(output)):
            outcome.status = "stopped"
            tell(f"{run.name} was stopped; the same command goes on from its last checkpoint")
            return
        if code:
            outcome.status = "failed"
            lines = log.read_text(errors="replace").splitlines()[-_TAIL:]
            tell("\n".join([f"{run.name} failed with exit status {code}; the end of {log}:", *lines]))
            tell(f"its command was\n{shlex.join(run.command)}")
            return
    outcome.status = "done"
    final = read_manifest(output)["final"]
    outcome.loss, outcome.digest = final["loss"], final["digest"]


def _wait(process: subprocess.Popen[bytes], show: Callable[[], None]) -> tuple[int, bool]:
    """Wait for a run; a signal to us is handed on to it.

    Returns:
        Its exit status, and whether a signal came.
    """
    came: list[int] = []

    def hand_on(number: int, _: Any) -> None:
        came.append(number)
        process.send_signal(signal.SIGTERM if number == signal.SIGINT else number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        deadline = float("inf")
        while process.poll() is None:
            time.sleep(_POLL)
            show()
            if came and deadline == float("inf"):
                deadline = time.monotonic() + _PATIENCE
            if time.monotonic() > deadline:
                process.kill()
        return process.returncode, bool(came)
    finally:
        if process.poll() is None:
            process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _progress(trace: Path, steps: int, title: str) -> Iterator[Callable[[], None]]:
    """A bar that counts the lines of a growing trace."""
    interval = 0.2 if sys.stderr.isatty() else 30
    with tqdm(total=steps, desc=title, unit="step", mininterval=interval, dynamic_ncols=True) as bar:
        read = 0

        def show() -> None:
            nonlocal read
            if trace.is_file():
                read = read if read <= trace.stat().st_size else 0  # a run that goes on has cut it
                with trace.open("rb") as file:
                    file.seek(read)
                    new = file.read()
                read += len(new)
                bar.update(min(new.count(b"\n"), steps - bar.n))
            bar.refresh() if sys.stderr.isatty() else None

        yield show
        show()


def _judge(folder: Path, outcome: Outcome, others: dict[str, Outcome]) -> None:
    assert outcome.against is not None
    if others[outcome.against].status != "done":
        outcome.verdict, outcome.why, outcome.held = "cannot be judged", f"{outcome.against} has no result", False
        return
    found = compare(folder / outcome.against, folder / outcome.name)
    write_json(found, folder / f"{outcome.name}.json")
    outcome.verdict, outcome.why, outcome.held = found.verdict, found.why, found.held


def _write(folder: Path, outcomes: list[Outcome]) -> None:
    content = {"held": held(outcomes), "runs": [dataclasses.asdict(outcome) for outcome in outcomes]}
    writing.write_json(folder / FILE, content)
