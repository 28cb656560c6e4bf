"""The output of a run while it trains: a progress bar, ``metrics.jsonl``, experiment trackers. Rank 0 only.

A line of metrics.jsonl, one for each logged step (and for each step with an evolution):

    {"step": 60, "loss": 3.1, "lr": 0.001, "grad_norm": 0.8, "tokens": 61440, "tokens_per_second": 910.5,
     "seconds": 67.5, "evolution": {"first": false, "dropped": 10627, "grown": 10627, "reactivated": 3719,
                                    "pruned": 3719, "support": 106270, "replaced": 0.1, "seconds": 0.4, "bytes_sent":
                                    120000, "phases": {"window": {"seconds": 2.1, "bytes_sent": 8000000}, "drop":
                                    {...}, "grow": {...},
                                               "adapt": {...}, "commit": {...}, "verify": {...}}, "digest": "..."}}

loss is the mean over ranks and over the steps since the line before; tokens are all ranks' since the run's start.
"""

import dataclasses
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from typing_extensions import TypedDict

from seft_dist.config import TrainConfig
from seft_dist.files.reading import check_kind
from seft_dist.optim.report import EvolutionReport
from seft_dist.training.step_lines import StepLines, as_ranges

FILE = "metrics.jsonl"
_NOT_RECORDED = ("step", "moved", "near_ties")
"""Entries of an evolution's report that are elsewhere: in the line, in topology.jsonl and in trace.jsonl."""
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


def check_trackers(config: TrainConfig) -> None:
    """Refuse trackers that are not installed.

    Raises:
        ValueError: Naming the package.
    """
    for name in config.trackers:
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise ValueError(
                f"trackers has {name}, which is not installed: `pip install {_PACKAGES[name]}`, or leave it out"
            )


class _State(TypedDict, total=False):
    """The state that ``Metrics.state`` gives."""

    tokens: int
    evolutions: int
    reactivated: int
    records: int
    loss: float
    losses: list[float]
    seconds: float


class Metrics:
    """Counts steps on every rank and writes them down on rank 0."""

    def __init__(
        self, config: TrainConfig, *, writes: bool, start: int = 0, state: dict[str, Any] | None = None
    ) -> None:
        """Args:
        config: The run.
        writes: True on rank 0.
        start: Steps already done (a resumed run); later lines of an earlier attempt are removed.
        state: The state that ``state()`` gave after those steps.

        Raises:
            ValueError: ``state`` does not have the entries that ``state()`` gives.
            OSError: The file cannot be read or written.
        """
        state = dict(check_kind(state or {}, TypeAdapter(_State), "the checkpoint's state of the metrics"))
        self.tokens: int = state.get("tokens", 0)
        """Number of tokens that all ranks have processed."""
        self.evolutions: int = state.get("evolutions", 0)
        """Number of evolutions after the first support."""
        self.reactivated: int = state.get("reactivated", 0)
        """Number of reactivated positions in all evolutions, the first support included."""
        self.last_loss: float = state.get("loss", float("nan"))
        """Loss of the last record."""
        self._config, self._writes = config, writes
        self._last_time = time.perf_counter()
        self._begin: float = self._last_time - state.get("seconds", 0.0)
        self._last_tokens = self.tokens
        self._losses: list[float] = state.get("losses", [])
        self._trackers: list[Any] = []
        if not writes:
            return
        self._lines = StepLines(Path(config.output) / FILE, start)
        _warn_of_missing_lines(config, self._lines, start, state.get("records"))
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=config.steps,
            initial=start,
            unit="step",
            desc="train",
            mininterval=0.2 if terminal else 20,
            dynamic_ncols=True,
        )
        self._trackers = _start_trackers(config)

    @property
    def seconds(self) -> float:
        """Seconds since the run's start, without pauses between its attempts."""
        return time.perf_counter() - self._begin

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on counting; JSON."""
        counts = {"tokens": self.tokens, "evolutions": self.evolutions, "reactivated": self.reactivated}
        if self._writes:
            counts["records"] = len(self._lines.steps)
        return counts | {"loss": self.last_loss, "losses": self._losses, "seconds": self.seconds}

    def step(
        self, step: int, *, loss: float, tokens: int, lr: float, grad_norm: float, evolution: EvolutionReport | None
    ) -> None:
        """Record one optimizer step.

        Args:
            step: Counted from 1.
            loss: Mean over the ranks.
            tokens: Number of tokens of this step, over all ranks.
            lr: Learning rate of this step.
            grad_norm: Global norm before clipping.
            evolution: Report of this step's evolution, if there was one.
        """
        self.tokens += tokens
        self._losses.append(loss)
        if evolution is not None:
            self.evolutions += not evolution.first
            self.reactivated += evolution.reactivated
        if self._writes:
            self._bar.update()
        if step % self._config.log_every and evolution is None and step != self._config.steps:
            return
        self.last_loss = sum(self._losses) / len(self._losses)
        self._losses = []
        if self._writes:
            self._record(step, lr, grad_norm, evolution)

    def _record(self, step: int, lr: float, grad_norm: float, evolution: EvolutionReport | None) -> None:
        now = time.perf_counter()
        speed = (self.tokens - self._last_tokens) / max(now - self._last_time, 1e-9)
        self._last_time, self._last_tokens = now, self.tokens
        record: dict[str, Any] = {
            "step": step,
            "loss": self.last_loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": self.tokens,
            "tokens_per_second": round(speed, 1),
            "seconds": round(self.seconds, 3),
        }
        self._bar.set_postfix(loss=f"{self.last_loss:.3f}", lr=f"{lr:.1e}", tokens_s=f"{speed:.0f}", refresh=False)
        if evolution is not None:
            report = dataclasses.asdict(evolution)
            record["evolution"] = {key: value for key, value in report.items() if key not in _NOT_RECORDED}
        self._lines.add(record)
        for tracker in self._trackers:
            tracker.log(_flat(record, numbers_only=True), step=step)

    def sync(self) -> None:
        """Force what was recorded to disk."""
        if self._writes:
            self._lines.sync()

    def close(self) -> None:
        """End the progress bar, the file and the trackers."""
        if not self._writes:
            return
        self._bar.close()
        self._lines.close()
        for tracker in self._trackers:
            tracker.finish()


def print_summary(result: dict[str, Any]) -> None:
    """Print a run's result as a table. For rank 0."""
    table = Table(title="Run", show_header=False)
    for name, value in _flat(result, numbers_only=False).items():
        table.add_row(name, f"{value:,.6g}" if isinstance(value, float) else str(value))
    Console(stderr=True).print(table)


def print_line(line: str) -> None:
    """Print a line about the run. For rank 0."""
    print(line, file=sys.stderr, flush=True)


def print_stopped(config: TrainConfig, signal: str, step: int) -> None:
    """Print that a signal has stopped the run. For rank 0."""
    print_line(
        f"stopped by {signal} after step {step} of {config.steps}; the state is saved in {config.output}, the same "
        "command goes on from there"
    )


def _start_trackers(config: TrainConfig) -> list[Any]:
    if not config.trackers:
        return []
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    PartialState()  # the trackers log through it; it joins the process group that is there and talks to no other rank
    folder = Path(config.output).resolve()
    trackers: list[Any] = []
    for name in config.trackers:
        if name == "tensorboard":
            trackers.append(TensorBoardTracker("tensorboard", logging_dir=str(folder)))
        else:
            trackers.append(WandBTracker("seft_dist", name=folder.name, dir=str(folder)))
    for tracker in trackers:
        tracker.start()
        tracker.store_init_configuration(_flat(dataclasses.asdict(config), numbers_only=False))
    return trackers


def _warn_of_missing_lines(config: TrainConfig, lines: StepLines, done: int, records: int | None) -> None:
    """Print a warning if lines of steps done are missing.

    Args:
        config: The run.
        lines: The lines that are there.
        done: Number of steps done.
        records: Number of lines that there were when the checkpoint was saved; None if it does not say.
    """
    wanted = {step for step in range(1, done + 1) if step % config.log_every == 0} - set(lines.steps)
    count = len(wanted) if records is None else records - len(lines.steps)
    if lines.put_aside is not None:
        print_line(f"{Path(config.output) / FILE} had lines that cannot be read: it is now {lines.put_aside.name}")
    if count > 0:
        named = f", among them those of steps {as_ranges(wanted)}" if wanted else ""
        print_line(
            f"{Path(config.output) / FILE} lacks {count} records of the steps up to {done}{named}; the run itself has "
            "them"
        )


def _flat(tree: dict[str, Any], numbers_only: bool, prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts to one with dotted names; values that are no numbers become text or are left out."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, numbers_only, f"{prefix}{key}.")
        elif isinstance(value, (bool, int, float)) and not (
            numbers_only and (isinstance(value, bool) or key == "step")
        ):
            flat[f"{prefix}{key}"] = value
        elif not numbers_only:
            flat[f"{prefix}{key}"] = str(value)
    return flat
