"""benchmarks/gpu.py on a CPU: all parts run, and each reports what is broken in it while the rest continues."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from seft_dist.kernels import choice
from seft_dist.planning.hardware import read_rates

ROOT = Path(__file__).parents[1]
HIDDEN = (
    *("accelerate", "datasets", "deepspeed", "google", "jsonargparse", "lm_eval", "matplotlib", "mpi4py", "peft"),
    *("psutil", "pydantic", "pydantic_core", "rich", "scipy", "sentencepiece", "tensorboard"),
)
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


@pytest.mark.slow
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
    assert all(report["parts"][name]["chosen_by"] for name in ("step", "70b", "plan"))
    assert list(parts) == ["correct", "sampled", "step", "70b", "plan"]
    assert not [row for rows in parts.values() for row in rows if row["status"] in ("failed", "not run")]

    tests = parts["correct"][-1]["tests"]
    assert len(tests) >= 2 and set(tests.values()) == {"passed"}
    compared = [set(row["largest_difference"]) for row in parts["correct"] if "largest_difference" in row]
    lacks_triton = [row["why"] for row in parts["correct"] if row["status"] == "missing"]
    assert all("not installed" in why or "interpreter does not run" in why for why in lacks_triton)
    forms = {"dense", "sampled_addmm"} | (set() if lacks_triton else {"triton"})
    assert len(compared) == 6 and all(found == forms for found in compared)
    monkeypatch.setattr(choice, "TABLE", output / "sampled_times.json")
    choice.measured_times.cache_clear()
    measured, launch = choice.measured_times("cpu")  # a table as of a card
    choice.measured_times.cache_clear()
    assert len(measured) == 4 and all("dense" in row.seconds for row in measured) and len(launch) == 3

    steps = [row for row in parts["step"] if row["status"] == "ok"]
    methods = {row["method"]: row for row in steps}
    compiled = [methods.pop(f"{method} compiled") for method in ("seft, model", "floor, layers")]
    assert all(row["graphs"] == 1 and row["graph_breaks"] == 0 for row in compiled)
    assert {"floor", "seft", "full", "packed"} <= set(methods)
    assert "lora" not in methods  # peft is hidden
    assert all(row["seconds_x_floor"] > 0 and row["peak"] > 0 for row in [*methods.values(), *compiled])
    assert methods["seft"]["average"] > 0 and methods["packed"]["evolution_phases"]
    plans, largest = parts["70b"]
    assert plans["fitting"] == ["tiny", "tinier"] and largest["model"] == "tiny"
    assert len(largest["steps"]) == 4 and [bool(step["evolution"]) for step in largest["steps"]] == [1, 0, 0, 1]
    assert largest["bytes_packed"] > 0 and largest["plan"]["bytes_of_tensors"] > 0
    planned = [row["case"] for row in parts["plan"] if "memory_ratio" in row]
    assert planned[0] == "tiny on one card"
    assert len(planned) == 1 + len([row for row in steps if row["method"] in ("seft", "packed", "lora", "full")])
    assert read_rates(str(output / "gpu_rates.json"))["bfloat16"].measured
    page = (output / "gpu.md").read_text()
    assert "no table" not in page and all(f"## {name}" in page for name in parts)


NO_MEMORY = 'raise torch.OutOfMemoryError("CUDA out of memory, on purpose")'
BREAK = {
    "seft_dist/kernels/triton_kernels.py": [
        ("    entries, block, warps = launch\n", '    raise RuntimeError("broken on purpose: correct, Triton")\n')
    ],
    "benchmarks/gpu_sampled.py": [
        ("    x, grad, support = draw(kind", '    assert kind != "bfloat16", "broken on purpose: sampled"\n'),
    ],
    "benchmarks/gpu_step.py": [
        (
            "    step = METHODS[method](model, data, 0.0)\n    found",
            '    assert method != "full", "broken on purpose: step"\n',
        ),
        (
            "    config = SeftConfig(density=density, interval=EVERY",
            f'    if method == "packed":\n        {NO_MEMORY}\n',
        ),
        ("    if not compiles:\n", "    compiles = False  # takes long\n"),
    ],
    "benchmarks/gpu_70b.py": [
        ("    checkpointed(model)\n", f'    if name == "tiny":\n        {NO_MEMORY}\n'),
        ("    seft.check_last_step()\n", '    raise RuntimeError("broken on purpose: 70b")\n'),
    ],
    "benchmarks/gpu_plan.py": [
        ('    packing = "resident"', '    assert row["method"] != "seft", "broken on purpose: plan"\n'),
    ],
}
"""For each file: lines, and what is put before them."""
TESTS = """
def test_bf16_cpu():
    pass


def test_resident_cpu():
    raise RuntimeError("broken on purpose: correct, tests")
"""


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """gpu.json, and gpu.md as ``page``, of a check of which every part is broken in some cases."""
    folder = tmp_path_factory.mktemp("broken")
    for name in ("benchmarks", "seft_dist"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests").mkdir()
    (folder / "tests" / "test_gpu.py").write_text(TESTS)
    for name, changes in BREAK.items():
        text = (folder / name).read_text()
        for line, before in changes:
            assert text.count(line) == 1, f"{name}: {line}"
            text = text.replace(line, before + line)
        (folder / name).write_text(text)
    done = check(folder / "benchmarks" / "gpu.py", folder / "out", "--minutes", "12")
    assert done.returncode == 1, done.stdout + done.stderr
    report: dict[str, Any] = json.loads((folder / "out" / "gpu.json").read_text())
    return report | {"page": (folder / "out" / "gpu.md").read_text()}


def rows_of(broken: dict[str, Any], name: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Status of each case of a broken part by its name, and all rows by their names."""
    rows = broken["parts"][name]["rows"]
    assert "no table" not in broken["page"]
    return {row["case"]: row["status"] for row in rows}, {row["case"]: row for row in rows}


def with_status(statuses: dict[str, str], status: str) -> list[str]:
    return [case for case, found in statuses.items() if found == status]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["correct", "sampled", "step", "70b", "plan"])
def test_a_broken_case_of_any_part_is_reported_and_the_others_run(broken: dict[str, Any], name: str) -> None:
    part = broken["parts"][name]
    assert part["status"] == "failed" and "traceback" not in part
    failed = [row for row in part["rows"] if row["status"] == "failed"]
    assert any(f"broken on purpose: {name}" in row["traceback"] for row in failed)
    assert [row for row in part["rows"] if row["status"] == "ok"]
    assert f"broken on purpose: {name}" in broken["page"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_a_broken_check_reports(broken: dict[str, Any]) -> None:
    statuses, rows = rows_of(broken, "correct")
    failed = with_status(statuses, "failed")
    assert failed[-1] == "tests marked gpu" and rows[failed[-1]]["tests"] == {
        "test_bf16_cpu": "passed",
        "test_resident_cpu": "failed",
    }
    assert (
        "broken on purpose: correct, tests" in rows[failed[-1]]["traceback"]
        and "| test_bf16_cpu | passed |" in broken["page"]
    )
    if "triton" not in statuses:  # our kernel is broken, not Triton
        assert len([case for case in failed if case.startswith("sampled gradient")]) == 6
    statuses, _ = rows_of(broken, "sampled")
    kinds = [(case.split()[0], status) for case, status in statuses.items() if "tokens" in case]
    assert kinds == [("bfloat16", "failed")] * 2 + [("float32", "ok")] * 2

    statuses, rows = rows_of(broken, "step")
    setting = "tiny, 2 x 32, checkpointing off"
    assert with_status(statuses, "failed") == [f"{setting}: full"]
    assert with_status(statuses, "does not fit") == [f"{setting}: packed 1%"]
    assert "CUDA out of memory" in rows[f"{setting}: packed 1%"]["why"]
    statuses, rows = rows_of(broken, "70b")
    assert statuses == {"plans": "ok", "tiny on one card": "does not fit", "tinier on one card": "failed"}
    assert len(rows["tinier on one card"]["steps"]) == 4 and rows["tiny on one card"]["bytes_packed"] > 0
    statuses, rows = rows_of(broken, "plan")
    assert with_status(statuses, "failed") == [f"{setting}: seft 1%", f"{setting}: seft 5%"]
    for case in (f"{setting}: packed 1%", "tiny on one card"):  # what did not fit is planned too
        assert rows[case]["measured"] == "does not fit" and rows[case]["planned_bytes"] > 0
