"""The output of a run while it trains: its progress, ``metrics.jsonl``, experiment trackers. Rank 0 only.

A line of metrics.jsonl, one for each logged step (and for each step with an evolution or an evaluation):

    {"step": 60, "loss": 3.1, "lr": 0.001, "grad_norm": 0.8, "tokens": 61440, "tokens_per_second": 910.5,
     "seconds": 67.5, "evolution": {"first": false, "dropped": 10627, "grown": 10627, "reactivated": 3719,
                                    "pruned": 3719, "support": 106270, "replaced": 0.1, "seconds": 0.4, "bytes_sent":
                                    120000, "phases": {"window": {"seconds": 2.1, "bytes_sent": 8000000}, "drop":
                                    {...}, "grow": {...},
                                               "adapt": {...}, "commit": {...}, "verify": {...}}, "digest": "..."},
     "validation": {"loss": 3.2, "perplexity": 24.5, "tokens": 9709, "seconds": 3.1}}

loss is the mean over all learnt tokens of a step, and over the steps since the line before; tokens are all ranks' since
the run's start.
tokens_per_second leaves out the time of evaluations.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from typing_extensions import TypedDict

from seft_dist.config import TrainConfig
from seft_dist.files.kinds import check_kind
from seft_dist.optim.report import EvolutionReport
from seft_dist.training.progress import Progress, print_line
from seft_dist.training.step_lines import StepLines, as_ranges
from seft_dist.training.trackers import Trackers, flat
from seft_dist.training.validation import Evaluated

FILE = "metrics.jsonl"
_NOT_RECORDED = ("step", "moved", "near_ties")
"""Entries of an evolution's report that are elsewhere: in the line, in topology.jsonl and in trace.jsonl."""


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
        self,
        config: TrainConfig,
        device: torch.device,
        *,
        writes: bool,
        start: int = 0,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Args:
        config: The run.
        device: Device whose memory is shown.
        writes: True on rank 0.
        start: Steps already done (a resumed run); later lines of an earlier attempt are removed.
        state: The state that ``state()`` gave after those steps.

        Raises:
            ValueError: ``state`` does not have the entries that ``state()`` gives, or a tracker cannot be started.
            OSError: The file cannot be read or written.
        """
        state = dict(check_kind(state or {}, _State, "the checkpoint's state of the metrics"))
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
        if not writes:
            return
        self._lines = StepLines(Path(config.output) / FILE, start)
        _warn_of_missing_lines(config, self._lines, start, state.get("records"))
        self._trackers = Trackers(config, start, print_line)
        self._progress = Progress(config.total_steps, start, device)

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
        self,
        step: int,
        *,
        loss: float,
        tokens: int,
        lr: float,
        grad_norm: float,
        evolution: EvolutionReport | None,
        validation: Evaluated | None = None,
    ) -> None:
        """Record one optimizer step.

        Args:
            step: Counted from 1.
            loss: Mean over all tokens of the step that are learnt.
            tokens: Number of tokens of this step, over all ranks.
            lr: Learning rate of this step.
            grad_norm: Global norm before clipping.
            evolution: Report of this step's evolution, if there was one.
            validation: Result of the evaluation after this step, if there was one.
        """
        self.tokens += tokens
        self._losses.append(loss)
        if evolution is not None:
            self.evolutions += not evolution.first
            self.reactivated += evolution.reactivated
        if self._writes:
            self._progress.advance()
        is_special = evolution is not None or validation is not None or step == self._config.total_steps
        if step % self._config.log_every and not is_special:
            return
        self.last_loss = sum(self._losses) / len(self._losses)
        self._losses = []
        if self._writes:
            self._record(step, lr, grad_norm, evolution, validation)

    def _record(
        self, step: int, lr: float, grad_norm: float, evolution: EvolutionReport | None, validation: Evaluated | None
    ) -> None:
        """Write the line of a logged step to the file, the trackers and the progress bar."""
        now = time.perf_counter()
        seconds = now - self._last_time - (validation.seconds if validation is not None else 0.0)
        speed = (self.tokens - self._last_tokens) / max(seconds, 1e-9)
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
        if evolution is not None:
            report = dataclasses.asdict(evolution)
            record["evolution"] = {key: value for key, value in report.items() if key not in _NOT_RECORDED}
        if validation is not None:
            record["validation"] = validation.record()
        self._lines.add(record)
        self._progress.show(record)
        self._trackers.log(record, step)

    def sync(self) -> None:
        """Force what was recorded to disk."""
        if self._writes:
            self._lines.sync()

    def close(self) -> None:
        """End the progress, the file and the trackers."""
        if not self._writes:
            return
        self._progress.close()
        self._lines.close()
        self._trackers.close()


def print_summary(result: dict[str, Any]) -> None:
    """Print a run's result as a table. For rank 0."""
    table = Table(title="Run", show_header=False)
    for name, value in flat(result, numbers_only=False).items():
        table.add_row(name, f"{value:,.6g}" if isinstance(value, float) else str(value))
    Console(stderr=True).print(table)


def print_stopped(config: TrainConfig, signal: str, step: int) -> None:
    """Print that a signal has stopped the run. For rank 0."""
    print_line(
        f"stopped by {signal} after step {step} of {config.total_steps}; the state is saved in {config.output}, the "
        "same command goes on from there"
    )


def _warn_of_missing_lines(config: TrainConfig, lines: StepLines, done: int, records: int | None) -> None:
    """Print a warning if lines of steps done are missing.

    Args:
        config: The run.
        lines: The lines that are there.
        done: Number of steps done.
        records: Number of lines that there were when the checkpoint was saved; None if it does not say.
    """
    missing = {step for step in range(1, done + 1) if step % config.log_every == 0} - set(lines.steps)
    count = len(missing) if records is None else records - len(lines.steps)
    if lines.put_aside is not None:
        print_line(f"{Path(config.output) / FILE} had lines that cannot be read: it is now {lines.put_aside.name}")
    if count > 0:
        named = f", among them those of steps {as_ranges(missing)}" if missing else ""
        print_line(
            f"{Path(config.output) / FILE} lacks {count} records of the steps up to {done}{named}; the run itself has "
            "them"
        )
