"""Building the C++ kernels: without a compiler, twice at a time, after a builder was killed."""

import importlib.util
import multiprocessing as mp
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from seft_dist.kernels import choice
from seft_dist.kernels.build import lacks_triton, library, triton_kernels
from seft_dist.kernels.choice import choose
from seft_dist.kernels.describe import describe
from seft_dist.kernels.sampled import sampled_grad_

FORK = mp.get_context("fork")
Results = Any  # multiprocessing's queue


def use_kernels(folder: Path, environment: dict[str, str], results: Results) -> None:
    """Use the kernels in a process with its own folder for them, and send back gradient, description and warnings."""
    os.setpgrp()
    os.environ.update({"TORCH_EXTENSIONS_DIR": str(folder)} | environment)
    library.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = torch.zeros(2)
        crow, col = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([1, 0], dtype=torch.int32)
        sampled_grad_(out, (2, 2), crow, col, torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
        said = describe(torch.device("cpu"))
    results.put((out.tolist(), said, [str(one.message) for one in caught if "kernels" in str(one.message)]))


def start(folder: Path, **environment: str) -> tuple[BaseProcess, Results]:
    results = FORK.SimpleQueue()
    process = FORK.Process(target=use_kernels, args=(folder, environment, results))
    process.start()
    return process, results


def result(started: tuple[BaseProcess, Results]) -> tuple[list[float], str, list[str]]:
    process, results = started
    process.join(60)
    assert process.exitcode == 0
    return results.get()


def compiler(folder: Path, script: str) -> str:
    """A compiler that is a shell script."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"PATH": "/nowhere"}, "install g++"),
        ({"CXX": "false"}, "exit code 1"),
        ({"CXX": "c++ '-O1"}, "cannot be split"),
        ({"CXX": ""}, "CXX is empty"),
    ],
    ids=["no compiler", "it fails", "open quote", "empty"],
)
def test_without_a_library_torch_does_it_and_says_why_once(
    tmp_path: Path, environment: dict[str, str], said: str
) -> None:
    out, used, warned = result(start(tmp_path, **environment))
    assert (out, used) == ([6.0, 4.0], "torch (no C++ library)")
    assert len(warned) == 1 and said in warned[0]
    assert not list(tmp_path.rglob("*.so"))


def test_two_processes_build_one_library_and_a_node_without_compiler_uses_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    counting = compiler(tmp_path, f'[ "$1" = --version ] || echo "$1" >>{log}; exec c++ "$@"')
    for started in [start(tmp_path, CXX=counting) for _ in range(2)]:
        out, used, warned = result(started)
        assert out == [6.0, 4.0] and used.startswith("C++") and not warned
    assert log.read_text().splitlines() == ["-std=c++17", "-shared"]
    assert len(list(tmp_path.rglob("*.so"))) == 1 and not list(tmp_path.rglob("*.part"))
    out, used, warned = result(start(tmp_path, CXX="missing"))
    assert out == [6.0, 4.0] and used.startswith("C++") and not warned


def test_options_for_another_processor_are_named_in_the_compilers_variable(tmp_path: Path) -> None:
    log = tmp_path / "log"
    counting = compiler(tmp_path, f'echo "$@" >>{log}; exec c++ "$@"')
    out, used, warned = result(start(tmp_path, CXX=f"{counting} -march=x86-64 -O1"))
    assert out == [6.0, 4.0] and not warned
    assert used.endswith(", 4 lanes, -march=x86-64, -O1)") or "x86" not in platform.machine(), used
    assert log.read_text().count("-march=x86-64 -O1") == 2  # compiled and linked with them
    assert result(start(tmp_path, CXX=counting))[1] != used and len(list(tmp_path.rglob("*.so"))) == 2


def test_a_killed_builder_leaves_nothing_that_hangs(tmp_path: Path) -> None:
    sleeping = compiler(tmp_path, '[ "$1" = --version ] || exec sleep 100; exec c++ "$@"')
    victim, _ = start(tmp_path, CXX=sleeping)
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("*.part")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert victim.pid is not None
    os.killpg(victim.pid, 9)
    victim.join()
    assert list(tmp_path.rglob("*.part"))
    out, used, _ = result(start(tmp_path, CXX=compiler(tmp_path, 'exec c++ "$@"')))
    assert out == [6.0, 4.0] and used.startswith("C++")
    assert not list(tmp_path.rglob("*.part"))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.device]]:
    """Triton on a card, without a C compiler: every launch fails."""
    seen: list[torch.device] = []

    def try_out(device: torch.device) -> None:
        seen.append(device)
        raise RuntimeError("Failed to find C compiler.\n  Please specify via CC environment variable")

    kernels = ModuleType("seft_dist.kernels.triton_kernels")
    monkeypatch.setattr(kernels, "try_out", try_out, raising=False)
    monkeypatch.setitem(sys.modules, kernels.__name__, kernels)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # also where Triton is not installed
    monkeypatch.setattr(choice, "card_name", lambda device: "a card")
    lacks_triton.cache_clear()
    choice._choose_on_cuda.cache_clear()
    yield seen
    lacks_triton.cache_clear()
    choice._choose_on_cuda.cache_clear()


def test_where_triton_cannot_launch_torch_does_the_work(launches: list[torch.device]) -> None:
    devices = [torch.device("cuda", index) for index in (0, 0, 1, 0)]
    with pytest.warns(UserWarning, match="no Triton kernels.*needs a C compiler") as caught:
        assert [triton_kernels(device) for device in devices] == [None] * 4
    assert launches == [devices[0], devices[2]] and len(caught) == 2  # once for each device
    shape, few = (4096, 4096), 4096
    assert choose(shape, few, devices[0]) == "dense"
    assert choose(shape, few, devices[0], dtype=torch.float32) in ("dense", "sampled_addmm")
    reason = "Triton does not run here (RuntimeError: Failed to find C compiler. Please specify via CC"
    assert describe(devices[0]).startswith(f"torch ({reason}")


def test_triton_that_is_not_installed_is_no_reason_to_warn(
    launches: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert triton_kernels(torch.device("cuda", 0)) is None
    assert describe(torch.device("cuda", 0)) == "torch (Triton is not installed)" and not launches
