"""Triton's interpreter has to be asked for before the import, so in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path


def test_triton_kernels_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/triton_cases.py"],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    passed = re.search(r"(\d+) passed", done.stdout)  # all of them, not none because nothing was found
    assert done.returncode == 0 and passed and int(passed[1]) >= 20, done.stdout + done.stderr
