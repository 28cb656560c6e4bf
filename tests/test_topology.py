"""topology.jsonl and layers.json against the models of tiny runs, on several layouts and after interruptions."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import tests.preload  # noqa: F401
from seft_dist.training import topology
from tests.models import moving
from tests.runs import STEPS, make_config, records, run_config, run_train

LAST_EVOLUTION = 6  # of a run of STEPS with evolutions every 3 steps, which must end with an update


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints after steps 5 and 10."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_train(make_config(inputs, folder, save_every=5))
    return folder


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "topology.jsonl").read_text().splitlines()]


def interrupt(run: Path, copy: Path) -> None:
    """Copy a finished run as it was when its first checkpoint had been written."""
    shutil.copytree(run, copy)
    for name in ("result.json", "layers.json", "delta.safetensors"):
        (copy / name).unlink()
    for name in ("model", f"checkpoints/step-{STEPS:08d}"):
        shutil.rmtree(copy / name)
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace(str(run), str(copy)))


def test_totals_are_those_of_the_metrics_and_kept_is_what_the_models_share(inputs: Path, whole: Path) -> None:
    lines, moved = lines_of(whole), [r["evolution"] | {"step": r["step"]} for r in records(whole) if "evolution" in r]
    assert [line["step"] for line in lines] == [e["step"] for e in moved] and lines[-1]["step"] >= LAST_EVOLUTION
    assert [line["evolutions"] for line in lines] == list(range(1, len(moved) + 1)) and lines[0]["since"] == 0
    for k, line in enumerate(lines):
        totals = [sum(column) for column in zip(*line["moved"], strict=True)][:4]
        assert totals == [sum(e[n] for e in moved[: k + 1]) for n in ("dropped", "grown", "reactivated", "pruned")]
    assert sum(row[2] for row in lines[-1]["moved"]) > 0
    before = load_file(inputs / "pruned" / "model.safetensors")
    after = load_file(whole / "model" / "model.safetensors")
    for (name, (numel, active)), row in zip(lines[0]["targets"].items(), lines[-1]["moved"], strict=True):
        old, new = before[f"{name}.weight"], after[f"{name}.weight"]
        assert (numel, active) == (old.numel(), int((old != 0).sum())), name
        assert row[4] == int(((old != 0) & (new != 0)).sum()), name


def test_layers_has_the_zeros_of_the_model(whole: Path) -> None:
    after = load_file(whole / "model" / "model.safetensors")
    targets = json.loads((whole / "layers.json").read_text())["targets"]
    assert len(targets) == 14
    for name, row in targets.items():
        assert row["zeros"] == row["target"] == int((after[f"{name}.weight"] == 0).sum())
        assert row["numel"] == after[f"{name}.weight"].numel() and row["trained"] > 0


def test_two_ranks_record_what_one_does(inputs: Path, whole: Path, tmp_path: Path) -> None:
    run_train(run_config(inputs, tmp_path / "run", backend="fsdp", trace=False, export=False), world_size=2)
    assert lines_of(tmp_path / "run") == lines_of(whole)


def test_a_run_that_goes_on_has_the_totals_of_the_whole_one(inputs: Path, whole: Path, tmp_path: Path) -> None:
    interrupt(whole, tmp_path / "run")
    run_train(make_config(inputs, tmp_path / "run", save_every=5))
    assert lines_of(tmp_path / "run") == lines_of(whole)


def test_a_run_of_an_older_version_is_recorded_from_where_it_goes_on(inputs: Path, whole: Path, tmp_path: Path) -> None:
    interrupt(whole, tmp_path / "run")
    (tmp_path / "run" / "topology.jsonl").unlink()
    run_train(make_config(inputs, tmp_path / "run", save_every=5))
    lines, expected = lines_of(tmp_path / "run"), lines_of(whole)
    assert lines[0]["since"] == 5 and lines[0]["evolutions"] == 1 and "targets" in lines[0]
    earlier = next(line for line in reversed(expected) if line["step"] <= 5)
    for row, then, now in zip(lines[-1]["moved"], earlier["moved"], expected[-1]["moved"], strict=True):
        assert row[:4] == [b - a for a, b in zip(then[:4], now[:4], strict=True)] and row[4] == now[4]


def test_many_evolutions_need_few_lines_and_lose_no_count(
    inputs: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topology, "MOST_LINES", 1)
    run_train(make_config(inputs, tmp_path / "run", export=False))
    lines, expected = lines_of(tmp_path / "run"), lines_of(whole)
    assert len(lines) < len(expected) and lines[-1]["moved"] == expected[-1]["moved"]
    assert lines[-1]["evolutions"] == expected[-1]["evolutions"]


def test_a_mask_that_cannot_move_is_not_recorded(inputs: Path, tmp_path: Path) -> None:
    seft = moving(density=0.05, static=True, init="random")
    run_train(make_config(inputs, tmp_path / "run", seft=seft, export=False))
    assert not (tmp_path / "run" / "topology.jsonl").exists() and (tmp_path / "run" / "layers.json").exists()
