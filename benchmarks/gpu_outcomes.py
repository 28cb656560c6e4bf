"""Plug-in of pytest: writes the outcome of each test to the file $GPU_OUTCOMES as soon as it is known.

pytest's own reports come at the end, and are lost when it is stopped.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest


def _add(nodeid: str, outcome: str) -> None:
    with Path(os.environ["GPU_OUTCOMES"]).open("a") as file:
        file.write(json.dumps([nodeid.rpartition("::")[2], outcome]) + "\n")


def pytest_runtest_logstart(nodeid: str, location: Any) -> None:
    """Record that a test begins."""
    _add(nodeid, "running")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Record how the test, or what was set up for it, ended."""
    if report.skipped:
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        _add(report.nodeid, f"skipped: {why}")
    elif report.failed or report.when == "call":
        _add(report.nodeid, report.outcome)


def outcomes(file: Path) -> dict[str, str]:
    """Read the outcomes so far; a test that was begun and has none is "running"."""
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return dict(json.loads(line) for line in lines if line.endswith("\n"))  # the last one may be half written
