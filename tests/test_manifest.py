"""Content of manifests; manifest and trace survive a restart, and do not depend on the layout."""

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import tests.preload  # noqa: F401
from seft_dist.session import facts
from seft_dist.session.distributed import launch_facts
from seft_dist.sparsity.hashes import hash_of_weight
from seft_dist.training.fingerprint import as_hex
from seft_dist.training.manifest import lasting_attempts, read_manifest
from seft_dist.training.trace import read_trace
from tests.runs import STEPS, ds_file, run_config, run_train


@pytest.fixture(scope="module")
def single(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one process."""
    config = run_config(inputs, tmp_path_factory.mktemp("runs") / "single", save_every=4)
    run_train(config)
    return Path(config.output)


def test_manifest_of_a_run(single: Path, inputs: Path) -> None:
    manifest = read_manifest(single)
    assert manifest == read_manifest(single / "manifest.json")
    (attempt,) = manifest["attempts"]
    assert attempt["first_step"] == 1 and attempt["started"] <= attempt["finished"]
    assert attempt["layout"]["backend"] == "single" and attempt["layout"]["threads"] == 1
    assert attempt["config"]["seft"]["density"] == 0.05 and attempt["config"]["model"]["path"] == str(inputs / "pruned")
    assert attempt["versions"]["torch"] and attempt["versions"]["python"] and attempt["hosts"][0]["ranks"] == 1
    assert attempt["seeds"] == {"data order": 0, "random criteria and first support": 0}
    assert len(attempt["code"]["source"]) == 16
    if attempt["code"].get("diff"):
        assert (single / attempt["code"]["diff"]).is_file()
    lines = [json.loads(line) for line in (single / "metrics.jsonl").read_text().splitlines()]
    told = [{"step": line["step"], "digest": line["evolution"]["digest"]} for line in lines if "evolution" in line]
    assert manifest["evolutions"] == told and [entry["step"] for entry in told] == [1, 3, 6]
    assert manifest["data"]["global_batch"] == 12 and manifest["dtype"] == "float32"
    assert manifest["final"]["step"] == STEPS and manifest["final"]["loss"] == lines[-1]["loss"]
    weights = load_file(single / "model" / "model.safetensors")
    assert len(manifest["final"]["layers"]) == 14
    for name, (_, _, digest) in manifest["final"]["layers"].items():
        assert digest == as_hex(int(hash_of_weight(weights[f"{name}.weight"].view(-1), 0)))


def test_trace_of_a_run(single: Path) -> None:
    lines = list(read_trace(single))
    metrics = [json.loads(line) for line in (single / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line, other in zip(lines, metrics, strict=True):
        assert all(line[key] == other[key] for key in ("loss", "grad_norm", "lr"))
        assert ("topology" in line) == ("evolution" in other)
    assert len({line["batch"] for line in lines}) == STEPS
    final = read_manifest(single)["final"]["layers"]
    for name, row in lines[-1]["layers"].items():
        assert row[:2] == final[name][:2]
    for before, after in zip(lines, lines[1:], strict=False):
        for name, row in after["layers"].items():
            assert row[2] != before["layers"][name][2]  # every step moves the deltas
            assert "topology" in after or row[:2] == before["layers"][name][:2]


LAYOUTS: list[tuple[str, int, dict[str, Any]]] = [
    ("ddp", 2, {"backend": "ddp"}),
    ("fsdp", 2, {"backend": "fsdp"}),
    ("zero3", 2, {}),
    ("hsdp", 4, {"replicas": 2, "batch_size": 3}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "world_size", "over"), LAYOUTS)
def test_equal_contents_have_equal_hashes_on_every_layout(
    backend: str, world_size: int, over: dict[str, Any], inputs: Path, single: Path, tmp_path: Path
) -> None:
    if backend == "zero3":
        over = {"deepspeed": ds_file(tmp_path, {"zero_optimization": {"stage": 3}})}
    run_train(run_config(inputs, tmp_path / "run", **over), world_size)
    ours, theirs = read_manifest(tmp_path / "run"), read_manifest(single)
    for key in ("model", "data", "evolutions", "dtype"):
        assert ours[key] == theirs[key], key
    assert (
        ours["attempts"][0]["layout"]["backend"] == backend and ours["attempts"][0]["hosts"][0]["ranks"] == world_size
    )
    for one, other in zip(read_trace(tmp_path / "run"), read_trace(single), strict=True):
        assert one["batch"] == other["batch"] and one["tokens"] == other["tokens"]
        for name, row in one["layers"].items():
            assert row[:2] == other["layers"][name][:2], (one["step"], name)
        for name, row in one.get("topology", {}).items():
            assert row == other["topology"][name], (one["step"], name)
    # The sums over two ranks of a replicated model are those of one process here, bit for bit; so the hashes are, too.
    if backend in ("ddp", "fsdp"):
        assert ours["final"]["layers"] == theirs["final"]["layers"]


def as_if_killed(run: Path, step: int) -> None:
    """Take a finished run back to the moment after a checkpoint, in the middle of writing later lines."""
    for name in ("result.json", "delta.safetensors"):
        (run / name).unlink()
    for path in (run / "checkpoints").glob("step-*"):
        if path.name > f"step-{step:08d}":
            shutil.rmtree(path)
    for name in ("metrics.jsonl", "trace.jsonl"):
        lines = (run / name).read_text()
        (run / name).write_text(lines[: lines.index(f'{{"step": {step + 2},') + 20])


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_manifest_and_trace_outlive_a_restart(world_size: int, inputs: Path, single: Path, tmp_path: Path) -> None:
    whole = read_manifest(single)
    run = shutil.copytree(single, tmp_path / "run")
    as_if_killed(run, 8)
    over = {"backend": "ddp"} if world_size == 2 else {}
    run_train(run_config(inputs, run, save_every=4, **over), world_size)
    after = read_manifest(run)
    assert [attempt["first_step"] for attempt in after["attempts"]] == [1, 9]
    assert after["attempts"][0] == whole["attempts"][0]
    assert after["attempts"][1]["layout"]["world_size"] == world_size
    for key in ("model", "data", "evolutions"):
        assert after[key] == whole[key], key
    if world_size == 1:
        assert after["final"] == whole["final"]
        ours, theirs = (list(read_trace(path)) for path in (run, single))
        for line in ours:
            line.pop("topology", None)  # the first line of an attempt has one although nothing moved
        for line in theirs:
            line.pop("topology", None)
        assert ours == theirs


def test_a_start_from_the_first_step_forgets_what_was_lost(inputs: Path, tmp_path: Path) -> None:
    config = run_config(inputs, tmp_path / "run", steps=5, trace=False)
    run_train(config)
    first = read_manifest(tmp_path / "run")
    (tmp_path / "run/result.json").unlink()
    shutil.rmtree(tmp_path / "run/checkpoints")
    run_train(dataclasses.replace(config, seed=1))
    second = read_manifest(tmp_path / "run")
    assert [attempt["config"]["seed"] for attempt in second["attempts"]] == [0, 1]
    assert [attempt["config"]["seed"] for attempt in lasting_attempts(second)] == [1]
    assert len(second["evolutions"]) == len(first["evolutions"]) and second["evolutions"] != first["evolutions"]


@pytest.mark.parametrize(
    ("starts", "lasting"), [([1], [1]), ([1, 5, 9], [1, 5, 9]), ([1, 5, 5, 9], [1, 5, 9]), ([1, 5, 9, 3], [1, 3])]
)
def test_attempts_that_lasted(starts: list[int], lasting: list[int]) -> None:
    attempts = [{"first_step": step, "number": i} for i, step in enumerate(starts)]
    found = lasting_attempts({"attempts": attempts})
    assert [attempt["first_step"] for attempt in found] == lasting and found[-1]["number"] == len(starts) - 1


@pytest.mark.parametrize("content", [None, "no json", "[]", '{"format": "something else"}'])
def test_what_is_no_manifest(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match="manifest"):
        read_manifest(tmp_path)


def test_code_of_a_repository_and_outside_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "repository" / "package"
    package.mkdir(parents=True)
    file = package / "__init__.py"
    file.write_text("a = 1\n")
    monkeypatch.setattr(facts, "PACKAGE", package)
    about, diff = facts.code()
    assert about["commit"] is None and about["git"] and not diff

    def git(*command: str) -> str:
        names = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        return subprocess.run(
            ["git", *names, *command], cwd=package, check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "-q", "..")
    about, _ = facts.code()
    assert about["commit"] is None  # a package that git does not know is not part of the repository around it
    git("add", ".")
    git("commit", "-qm", "first")
    clean, diff = facts.code()
    assert clean["commit"] == git("rev-parse", "HEAD") and not clean["dirty"] and not diff
    file.write_text("a = 2\n")
    (package / "new.py").write_text("")
    dirty, diff = facts.code()
    assert dirty["dirty"] and b"+a = 2" in diff and dirty["untracked"] == ["package/new.py"]
    assert dirty["source"] != clean["source"]
    monkeypatch.setattr(facts, "MAX_DIFF", 20)
    assert len(facts.code()[1]) < 60


def test_the_environment_in_a_manifest() -> None:
    env = {"OMP_NUM_THREADS": "4", "HF_TOKEN": "secret", "NCCL_ALGO": "Ring", "PATH": "/bin", "SLURM_JOB_ID": "7"}
    found = launch_facts(env | {"SLURM_RESTART_COUNT": "2", "SLURM_JOB_NODELIST": "n[1-2]"})
    assert found["environment"] == {"NCCL_ALGO": "Ring", "OMP_NUM_THREADS": "4"}
    assert found["slurm"] == {"job_id": "7", "restart_count": 2, "nodes": "n[1-2]"}
    assert launch_facts({})["slurm"] is None
