"""Files with a line of JSON for each step (metrics.jsonl, trace.jsonl), which the next attempt of a run continues."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from seft_dist.files.writing import put_aside, write_text


class StepLines:
    """A file with a line of JSON for each step, open for the steps to come. On rank 0."""

    def __init__(self, path: Path, done: int) -> None:
        """Keep the lines of the steps done, and remove later ones, of an attempt that was stopped.

        A file with lines that cannot be read is put aside as a whole; those that can are kept.

        Args:
            path: The file; it may be missing.
            done: Number of steps done.

        Raises:
            OSError: It cannot be read or written.
        """
        lines, damaged = _read(path)
        self.put_aside: Path | None = put_aside(path) if damaged else None
        """New name of the old file if it had lines that cannot be read, else None."""
        kept = {step: text for step, (text, _) in lines.items() if step <= done}
        self.steps = sorted(kept)
        """Steps with a line."""
        write_text(path, "".join(kept[step] for step in self.steps))
        self._file = path.open("a", buffering=1, encoding="utf-8")

    @staticmethod
    def read(path: Path) -> dict[int, dict[str, Any]]:
        """Read the lines that can be read, by step."""
        return {step: record for step, (_, record) in _read(path)[0].items()}

    def add(self, record: dict[str, Any]) -> None:
        """Write the line of a step."""
        self._file.write(json.dumps(record) + "\n")
        self.steps.append(record["step"])

    def sync(self) -> None:
        """Force what was written to disk: a checkpoint must not outlive the lines of its steps."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def as_ranges(steps: Iterable[int]) -> str:
    """Write steps as ranges, e.g. "1-5, 8"."""
    ranges: list[list[int]] = []
    for step in sorted(steps):
        if ranges and step == ranges[-1][1] + 1:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def _read(path: Path) -> tuple[dict[int, tuple[str, dict[str, Any]]], bool]:
    """Read the lines that can be read, by step, and whether others are damaged; a last line may have been cut."""
    lines: dict[int, tuple[str, dict[str, Any]]] = {}
    last, damaged = 0, False
    for raw in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        if not raw.endswith(b"\n"):  # the line was cut when the run was stopped
            continue
        try:
            record = json.loads(raw)
            step = record["step"]
        except (ValueError, KeyError, TypeError, RecursionError):
            step = None
        if isinstance(step, int) and step > last:
            lines[step] = (raw.decode(), record)
            last = step
        else:
            damaged = True
    return lines, damaged
