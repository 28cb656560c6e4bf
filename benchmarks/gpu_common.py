"""Shared by the parts of benchmarks/gpu.py: options, isolated cases, clocks and peaks of memory.

A part is a separate program. It writes its JSON file before, in and after every case, so the results are kept when it
is stopped.
"""

import argparse
import ctypes
import gc
import importlib.util
import json
import statistics
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from seft_dist.files.writing import write_json
from seft_dist.kernels import choice


class Part:
    """One part of the check: its options, its cases and their results."""

    def __init__(self, description: str | None) -> None:
        """Args:
        description: For --help.
        """
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--result", type=Path, required=True, help="JSON file; others are written beside it")
        parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
        parser.add_argument(
            "--tiny", action="store_true", help="the same code on shapes that a CPU computes in seconds"
        )
        parser.add_argument(
            "--until",
            type=float,
            default=time.monotonic() + 600,
            help="no case begins once time.monotonic(), which all processes share, is beyond this; default: 10 minutes",
        )
        parser.add_argument("--times", type=Path, help="sampled_times.json that the sampled gradient is chosen by")
        self.options = parser.parse_args()
        self.tiny: bool = self.options.tiny
        self.device = torch.device(self.options.device)
        self.folder: Path = self.options.result.parent
        self.rows: list[dict[str, Any]] = []
        self._broken: str | None = None
        if self.device.type == "cpu":
            torch.set_num_threads(1)  # small operations on a shared machine are faster on one thread
        elif not torch.cuda.is_available():
            raise SystemExit("there is no CUDA device here: use --device cpu --tiny to see that the code runs")
        if self.options.times is not None:
            choice.use_table(self.options.times)

    @property
    def left(self) -> float:
        """Seconds that remain for further cases."""
        return self.options.until - time.monotonic()

    def case(
        self, name: str, run: Callable[[], dict[str, Any]], needs: float = 0.0, about: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Run one case. Any exception is recorded, and the next case can run.

        Args:
            name: Name of the case in tables.
            run: Runs the case and returns its results.
            needs: Seconds that the case takes at least.
            about: Further entries of its row, which are recorded even if it fails.

        Returns:
            The row of the case.
        """
        row: dict[str, Any] = {"case": name, "status": "running"} | (about or {})
        self.rows.append(row)
        began = time.monotonic()
        if self._broken is not None:
            row |= {"status": "not run", "why": f"the device is of no use after {self._broken}"}
        elif self.left < needs:
            row |= {"status": "not run", "why": "no time left"}
        else:
            self._write()
            try:
                row |= run()
                row["status"] = "ok"
            except Exception as error:
                row |= self._outcome_of(name, error)
        row["case_seconds"] = round(time.monotonic() - began, 3)
        print(json.dumps({key: value for key, value in row.items() if key != "traceback"}), flush=True)
        if "traceback" in row:
            print(row["traceback"], flush=True)
        self._write()
        free(self.device)
        return row

    def note(self, found: dict[str, Any]) -> None:
        """Write what the running case has found so far, in case it is stopped or fails."""
        self.rows[-1] |= found
        self._write()

    def missing(self, name: str, why: str) -> None:
        """Record a case that cannot be run, because something is not installed or not supported here."""
        self.rows.append({"case": name, "status": "missing", "why": why})
        self._write()

    def end(self) -> None:
        """Exit with status 1 if a case failed, otherwise 0."""
        self._write()
        raise SystemExit(int(any(row["status"] == "failed" for row in self.rows)))

    def _outcome_of(self, name: str, error: Exception) -> dict[str, Any]:
        if is_out_of_memory(error):  # not an error of the code: the card is too small for the case
            return {"status": "does not fit", "why": str(error).strip().split("\n")[0][:300]}
        # After some errors every later call on the device fails
        if self.device.type == "cuda":
            try:
                torch.ones(1, device=self.device).add_(1).cpu()
            except Exception:
                self._broken = name
        return {"status": "failed", "traceback": traceback.format_exc()}

    def _write(self) -> None:
        write_json(self.options.result, {"chosen_by": choice.describe_choice(self.device), "rows": self.rows})


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the device's memory did not suffice, whichever library raised it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def lacks_triton(device: torch.device) -> str | None:
    """Return why Triton cannot be used here, or None.

    Only Triton's own part is tried, which needs a C compiler and the headers of Python. Errors of this project's
    kernels are those of a case.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    from gpu_triton import add_one

    try:
        assert add_one(torch.zeros(5, device=device)).tolist() == [1.0] * 5
    except Exception as error:  # e.g. Triton 3.6 with numpy 2.4, or no C compiler
        what = "Triton" if device.type == "cuda" else "Triton's interpreter"
        return f"{what} does not run here: {error!r}"
    return None


def free(device: torch.device) -> None:
    """Free all unused memory."""
    gc.collect()
    if device.type == "cuda":
        with suppress(RuntimeError):
            torch.cuda.empty_cache()


def wait(device: torch.device) -> None:
    """Wait until the device has finished all operations."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Duration of one call, including the work on the device, in seconds, and its result."""
    wait(device)
    began = time.perf_counter()
    result = run()
    wait(device)
    return time.perf_counter() - began, result


def seconds_of(run: Callable[[], Any], device: torch.device, repeats: int = 7, warmup: int = 2) -> float:
    """Median duration of several calls, in seconds."""
    for _ in range(warmup):
        run()
    if device.type == "cpu":
        return statistics.median(timed(run, device)[0] for _ in range(repeats))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    wait(device)
    return statistics.median(a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)) / 1e3


def begin_peak(device: torch.device) -> None:
    """Reset the peak of memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Peak memory since ``begin_peak`` in bytes: of all tensors on a GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) << 10
