"""The progress of a run: a bar on a terminal, elsewhere (a file, a job's log) a line for each logged step.

2026-11-28 17:05:09  step 60/1000  loss 3.1042  val 3.2010 (ppl 24.56)  lr 9.8e-04  911 tokens/s  ETA 0:17:12
memory 1.84 GB                                                                                   (on one line)
"""

import sys
import time
from datetime import timedelta
from typing import Any

import torch
from tqdm import tqdm

from seft_dist.session import facts


def print_line(line: str) -> None:
    """Print a line about the run. For rank 0."""
    print(line, file=sys.stderr, flush=True)


class Progress:
    """Shows the progress of a run. For rank 0."""

    def __init__(self, total: int, done: int, device: torch.device) -> None:
        """Args:
        total: Steps of the run.
        done: Steps done by earlier attempts.
        device: Device whose memory is shown.
        """
        self._total, self._first, self._device = total, done, device
        self._begin = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, unit="step", desc="train", mininterval=0.2, dynamic_ncols=True)

    def advance(self) -> None:
        """Count a step."""
        if self._bar is not None:
            self._bar.update()

    def show(self, record: dict[str, Any]) -> None:
        """Show a logged step.

        Args:
            record: Its line of metrics.jsonl.
        """
        step, lr, speed = record["step"], f"{record['lr']:.1e}", f"{record['tokens_per_second']:.0f}"
        loss, validation = f"{record['loss']:.4f}", record.get("validation")
        memory = f"{facts.peak_memory(self._device) / 1e9:.2f} GB"
        if self._bar is not None:
            values = {"loss": loss} | ({"val": f"{validation['loss']:.4f}"} if validation else {})
            self._bar.set_postfix(values | {"lr": lr, "tokens_s": speed, "memory": memory}, refresh=False)
            return
        parts = [time.strftime("%Y-%m-%d %H:%M:%S"), f"step {step}/{self._total}", f"loss {loss}"]
        if validation:
            parts.append(f"val {validation['loss']:.4f} (ppl {validation['perplexity']:.2f})")
        parts += [f"lr {lr}", f"{speed} tokens/s", f"ETA {self._left(step)}", f"memory {memory}"]
        if "evolution" in record:
            moved = record["evolution"]
            parts.append(f"evolution: {moved['grown']:,} grown, {moved['reactivated']:,} pruned ones back")
        print_line("  ".join(parts))

    def _left(self, step: int) -> timedelta:
        """Estimate the time until the last step by the mean of this attempt's steps."""
        mean = (time.monotonic() - self._begin) / max(1, step - self._first)
        return timedelta(seconds=round(mean * (self._total - step)))

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
