"""benchmarks/gpu.py on a CPU: all parts run, and a failure is reported while the other parts continue."""

import argparse
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from seft_dist.kernels import choice
from seft_dist.planning.hardware import read_rates

ROOT = Path(__file__).parents[1]
HIDDEN = ("datasets", "jsonargparse", "deepspeed", "mpi4py", "sentencepiece", "rich", "matplotlib")
"""Packages that GPU machines often lack, and that the check must not need."""
HIDING = f"""
import importlib.machinery
import types

plain = importlib.machinery.PathFinder.find_spec


def find_spec(finder, name, path=None, target=None):
    return None if name.split(".")[0] in {HIDDEN!r} else plain(name, path, target)


importlib.machinery.PathFinder.find_spec = types.MethodType(find_spec, importlib.machinery.PathFinder)
"""


def check(program: Path, output: Path, *options: str, paths: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run it as a user would."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*paths, ROOT]))}
    command = [sys.executable, str(program), "--output", str(output), "--device", "cpu", "--tiny", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_whole_check_runs_without_what_gpu_machines_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hiding").mkdir()
    (tmp_path / "hiding" / "sitecustomize.py").write_text(HIDING)
    output = tmp_path / "out"
    done = check(ROOT / "benchmarks" / "gpu.py", output, "--minutes", "12", paths=(tmp_path / "hiding",))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((output / "gpu.json").read_text())
    assert report["about"]["torch"] and "card" in report["about"]
    parts = {name: part["rows"] for name, part in report["parts"].items()}
    assert list(parts) == ["correct", "sampled", "step", "70b", "plan"]
    assert not [row for rows in parts.values() for row in rows if row["status"] in ("failed", "not run")]

    tests = parts["correct"][-1]["tests"]
    assert len(tests) >= 2 and set(tests.values()) == {"passed"}
    compared = [set(row["largest_difference"]) for row in parts["correct"] if "largest_difference" in row]
    assert len(compared) == 6 and all(forms >= {"dense", "sampled_addmm"} for forms in compared)
    monkeypatch.setattr(choice, "TABLE", output / "sampled_times.json")
    choice.measured_times.cache_clear()
    measured, launch = choice.measured_times("cpu")  # a table as of a card
    choice.measured_times.cache_clear()
    assert len(measured) == 4 and all("dense" in row.seconds for row in measured) and len(launch) == 3

    steps = [row for row in parts["step"] if row["status"] == "ok"]
    methods = {row["method"]: row for row in steps}
    assert {"floor", "seft", "full", "packed"} <= set(methods)
    assert ("lora" in methods) == (importlib.util.find_spec("peft") is not None)
    assert all(row["seconds_x_floor"] > 0 and row["peak"] > 0 for row in methods.values())
    assert methods["seft"]["average"] > 0 and methods["packed"]["evolution_phases"]
    (largest,) = parts["70b"]
    assert len(largest["steps"]) == 4 and [bool(step["evolution"]) for step in largest["steps"]] == [1, 0, 0, 1]
    assert largest["bytes_packed"] > 0 and largest["plan"]["bytes_of_tensors"] > 0
    assert len([row for row in parts["plan"] if "memory_ratio" in row]) == len(
        steps
    )  # all but the floor, and the largest
    assert read_rates(str(output / "gpu_rates.json"))["bfloat16"].measured
    page = (output / "gpu.md").read_text()
    assert "no table" not in page and all(f"## {name}" in page for name in parts)


def test_a_broken_part_is_recorded_and_the_next_one_runs(tmp_path: Path) -> None:
    benchmarks = tmp_path / "benchmarks"
    shutil.copytree(ROOT / "benchmarks", benchmarks, ignore=shutil.ignore_patterns("__pycache__"))
    step = benchmarks / "gpu_step.py"
    step.write_text(step.read_text().replace('"""One training step', 'raise RuntimeError("cannot even start")\n"""', 1))
    sampled = benchmarks / "gpu_sampled.py"
    text = sampled.read_text()
    broken = text.replace(
        "    kind, tokens, shape, density = problem\n    x, grad",
        '    kind, tokens, shape, density = problem\n    assert kind != "bfloat16", "broken on purpose"\n    x, grad',
    )
    assert broken != text
    sampled.write_text(broken)
    done = check(benchmarks / "gpu.py", tmp_path / "out", "--parts", "sampled", "step", "--minutes", "8")
    assert done.returncode == 1, done.stdout + done.stderr
    parts = json.loads((tmp_path / "out" / "gpu.json").read_text())["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {"sampled": "failed", "step": "failed"}
    statuses = [row["status"] for row in parts["sampled"]["rows"] if "tokens" in row["case"]]
    assert statuses == ["failed", "failed", "ok", "ok"]
    assert "broken on purpose" in parts["sampled"]["rows"][-3]["traceback"]
    assert "cannot even start" in parts["step"]["traceback"]
    page = (tmp_path / "out" / "gpu.md").read_text()
    assert "broken on purpose" in page and "cannot even start" in page


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/gpu.py as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu")


def run_part(gpu: Any, folder: Path, program: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (folder / "gpu_step.py").write_text(program)
    monkeypatch.setattr(gpu, "HERE", folder)
    monkeypatch.setattr(gpu, "_GRACE", 0.5)
    return gpu.run_part("step", argparse.Namespace(output=folder, device="cpu", tiny=True), 1.5)


def test_a_part_that_hangs_is_stopped_and_keeps_what_it_had(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = f"""
import json, pathlib, subprocess, sys, time
pathlib.Path({str(tmp_path / "step.json")!r}).write_text(json.dumps({{"rows": [{{"case": "one", "status": "ok"}}]}}))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path({str(tmp_path / "child")!r}).write_text(str(child.pid))
time.sleep(600)
"""
    found = run_part(gpu, tmp_path, program, monkeypatch)
    assert found["status"] == "stopped" and found["rows"] == [{"case": "one", "status": "ok"}]
    child = Path("/proc") / (tmp_path / "child").read_text() / "stat"
    for _ in range(200):  # a signal that was sent is not yet a process that has ended
        with suppress(OSError):
            if child.read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.05)
                continue
        return
    raise AssertionError("what the part had started still runs")


def test_a_part_that_dies_is_told_by_its_last_words(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run_part(gpu, tmp_path, "import os; print('illegal memory access', flush=True); os._exit(3)", monkeypatch)
    assert found["status"] == "failed"
    assert "exit code 3" in found["traceback"] and "illegal memory access" in found["traceback"]


def test_a_cpu_needs_tiny_shapes(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path), "--device", "cpu"])
    with pytest.raises(SystemExit) as caught:
        gpu.main()
    assert caught.value.code == 2 and "--device cpu needs --tiny" in capsys.readouterr().err
