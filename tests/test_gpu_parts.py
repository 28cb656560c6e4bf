"""benchmarks/gpu.py: how it divides the time, stops a part, and keeps what is known; no model is trained here."""

import argparse
import importlib
import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from seft_dist.config import ClusterConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/gpu.py as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu")


def run_part(gpu: Any, folder: Path, program: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (folder / "gpu_step.py").write_text(program)
    monkeypatch.setattr(gpu, "HERE", folder)
    monkeypatch.setattr(gpu, "_GRACE", 0.5)
    found: dict[str, Any] = gpu.run_part("step", argparse.Namespace(output=folder, device="cpu", tiny=True), 1.5)
    return found


def test_a_part_that_hangs_is_stopped_and_keeps_what_it_had(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = f"""
import json, pathlib, subprocess, sys, time
rows = [{{"case": "one", "status": "ok"}}, {{"case": "two", "status": "running", "steps": 3}}]
pathlib.Path({str(tmp_path / "step.json")!r}).write_text(json.dumps({{"rows": rows}}))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path({str(tmp_path / "child")!r}).write_text(str(child.pid))
time.sleep(600)
"""
    found = run_part(gpu, tmp_path, program, monkeypatch)
    one, two = found["rows"]
    assert found["status"] == two["status"] == "stopped" and two["why"] == found["why"] == "not over after 2 s"
    assert one == {"case": "one", "status": "ok"} and two["steps"] == 3
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


def test_a_part_knows_its_deadline_and_the_measured_times(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = f"""
import json, pathlib, sys, time
until = float(sys.argv[sys.argv.index("--until") + 1]) - time.monotonic()
row = {{"case": "arguments", "status": "ok", "left": until, "rest": sys.argv}}
pathlib.Path({str(tmp_path / "step.json")!r}).write_text(json.dumps({{"chosen_by": "a table", "rows": [row]}}))
"""
    found = run_part(gpu, tmp_path, program, monkeypatch)
    assert found["status"] == "ok" and found["chosen_by"] == "a table"
    assert found["rows"][0]["left"] < 1.0 and "--times" not in found["rows"][0]["rest"]  # its start is counted
    (tmp_path / "sampled_times.json").write_text("{}")
    (row,) = run_part(gpu, tmp_path, program, monkeypatch)["rows"]
    assert row["rest"][-2:] == ["--times", str(tmp_path / "sampled_times.json")]


@pytest.mark.parametrize(
    ("statuses", "wanted"),
    [
        (["ok", "not run"], "ok"),
        (["does not fit"], "ok"),
        (["missing", "ok"], "ok"),
        (["missing", "not run", "not run"], "not run"),
    ],
)
def test_a_part_without_time_for_a_case_is_not_ok(gpu: ModuleType, statuses: list[str], wanted: str) -> None:
    assert gpu.judge([{"status": status} for status in statuses], 0, "", "")["status"] == wanted


def test_every_part_gets_its_least_time_first(gpu: ModuleType) -> None:
    parts = list(gpu.SHARES)
    assert set(gpu.LEAST) == set(parts) and sum(gpu.SHARES.values()) == pytest.approx(1.0)
    left = 360.0
    for number, name in enumerate(parts):
        seconds = gpu.seconds_for(parts[number:], left)
        assert seconds >= gpu.LEAST[name]
        left -= seconds
    assert left == pytest.approx(0.0)
    assert gpu.seconds_for(["step", "70b"], 40.0) == pytest.approx(20.0)
    assert gpu.seconds_for(["plan"], -1.0) == 0.0


def test_the_used_card_is_marked_in_one_line(gpu: ModuleType) -> None:
    about = importlib.import_module("gpu_about")
    two = "GPU-11-aa, NVIDIA X, 550, 81559 MiB\nGPU-22-bb, NVIDIA X, 550, 81559 MiB\n"
    assert about.cards(two, "22-bb") == "NVIDIA X, 550, 81559 MiB; NVIDIA X, 550, 81559 MiB (used)"
    assert "(used)" not in about.cards(two, "33-cc")
    assert about.cards(two.splitlines()[0], "") == "NVIDIA X, 550, 81559 MiB (used)"
    page = importlib.import_module("gpu_report").table(["what", "is"], [["card", "one\ntwo | three"]])
    assert page[-1] == "| card | one two / three |"


@pytest.mark.parametrize(("segments", "plain"), [(True, True), (False, True), (False, False)])
def test_the_allocator_is_tried_once(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, segments: bool, plain: bool
) -> None:
    about = importlib.import_module("gpu_about")

    def run(command: list[str], variables: dict[str, str] | None = None) -> tuple[bool, str]:
        works = segments if variables else plain
        return works, "13.0\nNVIDIA X\n22-bb" if works else "no such driver"

    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(about, "_run", run)
    found, variables = about.about("cuda")
    assert variables == ({"PYTORCH_CUDA_ALLOC_CONF": about.SEGMENTS} if segments else {})
    says = about.SEGMENTS if segments else "does not work here: no such driver" if plain else "not tried"
    assert says in found["allocator"]
    assert found["cuda"] == ("13.0 NVIDIA X" if plain else "no such driver")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    found, variables = about.about("cuda")
    assert not variables and found["allocator"] == "as given: PYTORCH_ALLOC_CONF=max_split_size_mb:64"


def test_a_case_is_written_while_it_runs_and_memory_that_lacks_is_no_failure(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "part.json"
    monkeypatch.setattr(sys, "argv", ["part", "--result", str(file), "--device", "cpu"])
    part = importlib.import_module("gpu_common").Part(None)

    def run() -> dict[str, Any]:
        assert json.loads(file.read_text())["rows"][-1] == {"case": "one", "status": "running"}
        part.note({"steps": 2})
        assert json.loads(file.read_text())["rows"][-1]["steps"] == 2
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate\nmore")

    row = part.case("one", run)
    assert row["status"] == "does not fit" and row["why"].endswith("cublasCreate") and row["steps"] == 2
    with pytest.raises(SystemExit) as caught:
        part.end()
    assert caught.value.code == 0
    part.case("two", lambda: json.loads("no JSON"))
    with pytest.raises(SystemExit) as caught:
        part.end()
    assert caught.value.code == 1


def test_the_tests_that_ended_are_known_when_the_others_are_stopped(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    correct = importlib.import_module("gpu_correct")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_gpu.py").write_text(
        "import time\nimport pytest\n\n\ndef test_bf16_cpu():\n    pass\n\n\n"
        "def test_resident_cpu():\n    pytest.skip('no peft')\n\n\ndef test_resident_cpu_long():\n    time.sleep(60)\n"
    )
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    monkeypatch.setattr(correct, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["part", "--result", str(tmp_path / "correct.json"), "--device", "cpu"])
    part = importlib.import_module("gpu_common").Part(None)
    monkeypatch.setattr(correct, "LEAST", 4.0)
    part.options.until = time.monotonic() + 1.0
    row = part.case("tests", lambda: correct.suite(part))
    assert row["status"] == "failed" and "running: ['test_resident_cpu_long']" in row["traceback"]
    assert row["tests"] == {
        "test_bf16_cpu": "passed",
        "test_resident_cpu": "skipped: Skipped: no peft",
        "test_resident_cpu_long": "running",
    }


def test_a_plan_is_made_for_the_memory_that_is_free(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = importlib.import_module("gpu_planned")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    sheet = planned.sheet_of(torch.device("cuda"))
    assert sheet.gpu == "A100-80GB" and sheet.memory_gb == 35.0


def test_models_are_traced_once_and_tried_from_the_largest_that_fits(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest, planned = importlib.import_module("gpu_70b"), importlib.import_module("gpu_planned")
    monkeypatch.setattr(sys, "argv", ["part", "--result", str(tmp_path / "part.json"), "--device", "cpu", "--tiny"])
    part = importlib.import_module("gpu_common").Part(None)
    planned.traced.cache_clear()

    def plans(memory_gb: float) -> Any:
        sheet = ClusterConfig(nodes=1, gpus_per_node=1, memory_gb=memory_gb)
        monkeypatch.setattr(largest, "sheet_of", lambda device: sheet)
        return part.case("plans", lambda: largest.plans(part, largest.TINY))

    found = plans(3.0)
    assert found["fitting"] == ["tiny", "tinier"]
    assert plans(found["plans"]["tiny"]["bytes"] / 1e9 - 1e-6)["fitting"] == ["tinier"]
    assert planned.traced.cache_info().misses == 2
    none = plans(1.0)
    assert none["status"] == "does not fit"
    assert none["why"] == "by the plans none fits: tinier needs 2.0 GB, 1.0 GB are free"


def test_a_cpu_needs_tiny_shapes(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path), "--device", "cpu"])
    with pytest.raises(SystemExit) as caught:
        gpu.main()
    assert caught.value.code == 2 and "--device cpu needs --tiny" in capsys.readouterr().err
