"""Repetition of a run, several times and on several layouts, with a comparison of each run with an earlier one.

Each run is a process of its own, started as a user would start it.

OUTPUT/1-single-1/        the first run, with which the first run on every other layout is compared
      /2-single-1/        its repetition, which must be equal bit for bit
      /3-fsdp-2/          a run on another layout, compared with 1-single-1
      /4-fsdp-2/          its repetition, compared with 3-fsdp-2
      /3-fsdp-2.log       the output of the run
      /3-fsdp-2.json      the comparison
      /reproduce.json     a summary of all runs
"""

import dataclasses
import datetime
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
from typing import Annotated, Any

from tqdm import tqdm
from typing_extensions import TypedDict

from seft_dist.backends.deepspeed import load_ds_config
from seft_dist.config import ReproduceConfig, TrainConfig
from seft_dist.data.chat_template import uses_date
from seft_dist.data.tokenizer import load_tokenizer
from seft_dist.files import writing
from seft_dist.files.kinds import Within, lenient
from seft_dist.files.reading import read_json
from seft_dist.io.source import open_source
from seft_dist.reproduce.comparable import read_comparable
from seft_dist.reproduce.compare import compare, write_comparison
from seft_dist.session.distributed import find_ranks
from seft_dist.training.run_folder import is_finished
from seft_dist.training.trace import FILE as TRACE

FILE = "reproduce.json"
_POLL_INTERVAL = 0.2
"""Seconds between two looks at a running process."""
_SHOWN_LINES = 25
"""Number of lines of a failed run's log that are shown."""
_STOP_TIMEOUT = 60.0
"""Seconds that a run has to save and end after a signal; then it is killed."""
_BLOCKS = ("optimizer", "scheduler", "gradient_clipping")
"""Blocks of a ds_config that change the result, and that layouts without DeepSpeed would not get."""


@dataclass(frozen=True)
class PlannedRun:
    """A run to be started."""

    name: str
    """Name of its folder."""
    layout: str
    """Layout as the user wrote it, e.g. "fsdp:2"."""
    command: list[str]
    against: str | None
    """Name of the run that it is compared with; None for the first run."""


@dataclass
class RunOutcome:
    """The state or result of one run; an entry of reproduce.json."""

    name: str
    layout: str
    against: str | None
    command: str
    status: str = "waiting"
    """waiting, done, failed or stopped."""
    seconds: float | None = None
    """Wall time, including start and export."""
    loss: float | None = None
    """Loss of the last record."""
    digest: str | None = None
    """Digest of all final supports, masks and weights."""
    verdict: str | None = None
    """Verdict of the comparison with ``against``."""
    why: str | None = None
    """Reason for the verdict, in words."""
    held: bool | None = None
    """The comparison with ``against`` keeps docs/numerics.md; None if it was not made."""


def plan_runs(config: ReproduceConfig, train: TrainConfig, options: list[str], script: Path) -> list[PlannedRun]:
    """Construct the command of every run.

    All runs get options that make them the same run on different layouts: the global batch, the number of threads and
    the dtype are given explicitly, because their defaults depend on the layout.

    Args:
        config: The layouts and the number of runs on each.
        train: The configuration that ``options`` result in.
        options: Options of seft train as the user gave them.
        script: Path of launch/train.py.

    Raises:
        ValueError: A layout cannot be read, or a layout would change more than how the work is divided.
    """
    layouts = [_parse_layout(entry) for entry in config.layouts.split(",") if entry.strip()]
    ds_config = load_ds_config(train.deepspeed) if train.deepspeed else None
    dtype = _dtype(train, ds_config)
    global_batch = train.global_batch or train.batch_size * layouts[0][1]
    planned: list[PlannedRun] = []
    first_of: dict[str, str] = {}
    for backend, ranks, extra in layouts:
        label = f"{backend}:{ranks}" + (f" {shlex.join(extra)}" if extra else "")
        for _ in range(config.runs):
            name = f"{len(planned) + 1}-{backend}-{ranks}"
            against = first_of.get(label, planned[0].name if planned else None)
            first_of.setdefault(label, name)
            fixed = {
                "--global_batch": str(global_batch),
                "--threads": str(train.threads or 1),
                "--model.dtype": dtype,
                "--trace": str(train.is_seft).lower(),
                "--trackers": "[]",
            }
            run_options = [*options, *_layout_options(backend, train, ds_config, dtype, script)]
            run_options += [word for option in fixed.items() for word in option]
            run_options += [*extra, "--output", str(Path(config.output) / name)]
            command = [*_launcher(config.launcher, ranks), str(script), *run_options]
            planned.append(PlannedRun(name, label, command, against))
    return planned


def _parse_layout(entry: str) -> tuple[str, int, list[str]]:
    words = shlex.split(entry)
    match = re.fullmatch(r"(single|ddp|fsdp|zero[0-3]|zero3_offload):(\d+)", words[0])
    if match is None or int(match[2]) < 1 or (match[1] == "single" and match[2] != "1"):
        raise ValueError(
            f"layouts has {words[0]!r}: needs BACKEND:RANKS with single (1 rank), ddp, fsdp, zero0 to zero3 or "
            'zero3_offload, e.g. "single:1, fsdp:2, zero3:2"'
        )
    return match[1], int(match[2]), words[1:]


def _dtype(train: TrainConfig, ds_config: dict[str, Any] | None) -> str:
    """Return the dtype of the weights on all layouts: that of the user's ds_config, or of the model."""
    if ds_config is not None:
        return "bfloat16" if ds_config.get("bf16", {}).get("enabled") else "float32"
    return str(open_source(train.model).dtype).removeprefix("torch.")


def _layout_options(
    backend: str, train: TrainConfig, ds_config: dict[str, Any] | None, dtype: str, script: Path
) -> list[str]:
    """Return the options of seft train that choose a layout; the user's ds_config is kept if its ZeRO stage fits."""
    blocks = [key for key in _BLOCKS if ds_config is not None and ds_config.get(key, "auto") != "auto"]
    if ds_config is not None and backend == f"zero{ds_config.get('zero_optimization', {}).get('stage', 0)}":
        return ["--backend", "deepspeed", "--deepspeed", str(train.deepspeed)]
    if blocks:
        raise ValueError(
            f"{train.deepspeed} has its own {', '.join(blocks)}, which the layout {backend} would not get: give them "
            "as --optim.* options, which hold everywhere"
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
    print_line: Callable[[str], None] = print,
) -> list[RunOutcome]:
    """Start the runs one after the other, and compare them. The ranks of a run are processes of their own.

    Args:
        config: The layouts and the number of runs on each.
        train: The configuration that ``options`` result in.
        options: Options of seft train as the user gave them.
        script: Path of launch/train.py.
        print_line: Function that prints a line for the user.

    Returns:
        The outcome of each run, in order.

    Raises:
        ValueError: This was started on several ranks, the layouts cannot be compared, or the folder holds another
            check.
    """
    if find_ranks().world_size > 1:
        raise ValueError(
            "started on several ranks: start it once, as one process; it starts the ranks of every run itself"
        )
    folder = Path(config.output)
    planned = plan_runs(config, train, [*options, *_date_options(folder, train)], script)
    _open_folder(folder, planned)
    outcomes = [RunOutcome(run.name, run.layout, run.against, shlex.join(run.command)) for run in planned]
    steps = train.total_steps if train.epochs is None else None  # epochs: only the runs read the data
    for number, (run, outcome) in enumerate(zip(planned, outcomes, strict=True), 1):
        _execute(folder, run, outcome, steps, f"{number}/{len(planned)} {run.layout}", print_line)
        if outcome.status == "done" and run.against is not None:
            _compare(folder, outcome, {other.name: other for other in outcomes})
            reason = f": {outcome.why}" if outcome.why else ""
            print_line(f"{run.name} against {run.against}: {outcome.verdict}{reason}")
        _write(folder, outcomes)
        if outcome.status == "stopped" or (number == 1 and outcome.status == "failed"):
            break  # a signal came, or there is no first run to compare the others with
    return outcomes


def _date_options(folder: Path, train: TrainConfig) -> list[str]:
    """Return options that fix the date for the chat template: midnight may fall between two runs."""
    if train.data.date is not None:
        return []
    if (folder / FILE).is_file():  # this check was begun earlier: its day is used
        words = shlex.split(_read(folder)[0]["command"])
        return words[words.index("--data.date") :][:2] if "--data.date" in words else []
    dated = uses_date(load_tokenizer(train.model))
    return ["--data.date", datetime.date.today().isoformat()] if dated else []


@lenient
class _Run(TypedDict):
    command: str


@lenient
class _Record(TypedDict):
    """The entries of reproduce.json that are read again."""

    runs: Annotated[list[_Run], Within(1)]


def all_held(outcomes: list[RunOutcome]) -> bool:
    """Return whether every run is done, and every comparison keeps docs/numerics.md."""
    return all(outcome.status == "done" for outcome in outcomes) and all(outcome.held for outcome in outcomes[1:])


def _open_folder(folder: Path, planned: list[PlannedRun]) -> None:
    """Create the folder of a check, or make sure that one that exists holds the same check."""
    plans = [dataclasses.asdict(run) for run in planned]
    if (folder / FILE).is_file():
        if [run["command"] for run in _read(folder)] != [shlex.join(run.command) for run in planned]:
            raise ValueError(f"{folder} holds another check: repeat that very command, or choose another output")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output={folder} is there and holds no check: choose another")
    folder.mkdir(parents=True, exist_ok=True)
    _write(
        folder, [RunOutcome(run["name"], run["layout"], run["against"], shlex.join(run["command"])) for run in plans]
    )


def _execute(
    folder: Path, run: PlannedRun, outcome: RunOutcome, steps: int | None, title: str, print_line: Callable[[str], None]
) -> None:
    """Start one run and wait for it, unless it is finished already, and enter status and result in the outcome."""
    output, log = folder / run.name, folder / f"{run.name}.log"
    if not is_finished(output):
        began = time.perf_counter()
        with log.open("ab") as file, _progress(output / TRACE, steps, title) as show:
            code, stopped = _wait(subprocess.Popen(run.command, stdout=file, stderr=subprocess.STDOUT), show)
        outcome.seconds = round(time.perf_counter() - began, 1)
        if stopped or (code == 0 and not is_finished(output)):
            outcome.status = "stopped"
            print_line(f"{run.name} was stopped; the same command goes on from its last checkpoint")
            return
        if code:
            outcome.status = "failed"
            lines = log.read_text(errors="replace").splitlines()[-_SHOWN_LINES:]
            print_line("\n".join([f"{run.name} failed with exit status {code}; the end of {log}:", *lines]))
            print_line(f"its command was\n{shlex.join(run.command)}")
            return
    outcome.status = "done"
    final = read_comparable(output)["final"]
    if final is None:
        raise ValueError(f"{output} has a result, but its manifest has no end: remove the folder, and repeat the run")
    outcome.loss, outcome.digest = final["loss"], final["digest"]


def _wait(process: subprocess.Popen[bytes], show: Callable[[], None]) -> tuple[int, bool]:
    """Wait for a run, and forward SIGTERM and SIGINT to it, as SIGTERM, so that it saves before it ends.

    Args:
        process: The run.
        show: Updates the progress bar.

    Returns:
        The exit status of the run, and whether a signal was forwarded.
    """
    received: list[int] = []

    def forward(number: int, _: Any) -> None:
        received.append(number)
        process.send_signal(signal.SIGTERM if number == signal.SIGINT else number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        deadline = float("inf")
        while process.poll() is None:
            time.sleep(_POLL_INTERVAL)
            show()
            if received and deadline == float("inf"):
                deadline = time.monotonic() + _STOP_TIMEOUT
            if time.monotonic() > deadline:
                process.kill()
        return process.returncode, bool(received)
    finally:
        if process.poll() is None:
            process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _progress(trace: Path, steps: int | None, title: str) -> Iterator[Callable[[], None]]:
    """Show a progress bar that counts the lines of a growing trace; yields the function that updates it."""
    interval = 0.2 if sys.stderr.isatty() else 30
    with tqdm(total=steps, desc=title, unit="step", mininterval=interval, dynamic_ncols=True) as bar:
        read = 0

        def show() -> None:
            nonlocal read
            if trace.is_file():
                read = read if read <= trace.stat().st_size else 0  # a resumed run has truncated it
                with trace.open("rb") as file:
                    file.seek(read)
                    new = file.read()
                read += len(new)
                lines = new.count(b"\n")
                bar.update(lines if steps is None else min(lines, steps - bar.n))
            if sys.stderr.isatty():
                bar.refresh()

        yield show
        show()


def _compare(folder: Path, outcome: RunOutcome, others: dict[str, RunOutcome]) -> None:
    """Compare a run with the one that it is to be compared with, and record the verdict."""
    assert outcome.against is not None
    if others[outcome.against].status != "done":
        outcome.verdict, outcome.why, outcome.held = "cannot be judged", f"{outcome.against} has no result", False
        return
    comparison = compare(folder / outcome.against, folder / outcome.name)
    write_comparison(comparison, folder / f"{outcome.name}.json")
    outcome.verdict, outcome.why, outcome.held = comparison.verdict, comparison.why, comparison.held


def _read(folder: Path) -> list[_Run]:
    """Read the runs of a check that was begun earlier."""
    return read_json(folder / FILE, _Record)["runs"]


def _write(folder: Path, outcomes: list[RunOutcome]) -> None:
    content = {"held": all_held(outcomes), "runs": [dataclasses.asdict(outcome) for outcome in outcomes]}
    writing.write_json(folder / FILE, content)
