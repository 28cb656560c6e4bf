"""The tests of the C++ kernels with a sanitizer, which ends the process at an access outside of an array."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = [f"tests/test_kernels_{name}.py" for name in ("adamw", "masks", "packing", "sampled", "scatter")]
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1")

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run_python(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs Python with the sanitizers loaded and the kernels built with them, in a folder of their own."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler {compiler}")
    # The sanitizer comes before every other library, and the C++ runtime must be there when it looks for exceptions.
    found = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    if not all(Path(path).is_absolute() for path in found):
        message = f"{compiler} comes without its sanitizers"
        pytest.fail(message) if "CI" in os.environ else pytest.skip(message)
    environment = os.environ | {
        "CXX": " ".join([compiler, *SANITIZERS]),
        "TORCH_EXTENSIONS_DIR": str(tmp_path_factory.mktemp("sanitized")),
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)

    return run


@pytest.mark.long
def test_an_access_outside_of_an_array_is_found(run_python: Run) -> None:
    """The next test relies on this."""
    script = """
import ctypes, sys, torch
from seft_dist.kernels.build import library
functions, count, bits = library(), ctypes.c_int64(), torch.zeros(1000, dtype=torch.uint8)
assert functions.popcount_bits(bits.data_ptr(), int(sys.argv[1]), ctypes.byref(count)) == 0
"""
    done = run_python("-W", "error", "-c", script, "1000")
    assert done.returncode == 0, done.stderr
    done = run_python("-W", "error", "-c", script, "1100")
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr and "popcount" in done.stderr, done.stderr


@pytest.mark.long
def test_the_kernels_stay_inside_their_arrays(run_python: Run) -> None:
    # One form is C++ alone; the others are torch, which is not built with sanitizers.
    chosen = ["-k", "not sampled_addmm and not dense-", "--hypothesis-profile", "few"]
    # A process that ends at once takes captured output with it: "-s".
    done = run_python("-m", "pytest", "-s", "-v", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *TESTS, *chosen)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[:4000]}"
    assert " passed" in done.stdout and "SKIPPED" not in done.stdout, done.stdout
