"""Studies: what is chosen and what is run, by a stand-in for the processes; seeds, resuming, failures, changed YAML."""

import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from seft_dist.export.demo import write_tiny
from seft_dist.session.signals import StopRequest
from seft_dist.study import runner
from seft_dist.study.state import TRAIN, Task
from seft_dist.study.tables import write_tables
from seft_dist.training.writer_lock import only_writer
from tests.studies import Fake, cells, model_files, run, study_config, text

ROOT = Path(__file__).parents[1]
ALL = (
    2 * (3 + 3 + 1 + 2 + 2) + 2
)  # two methods: searches, their validation, the other seed, test, forgetting; and a base


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses between two looks at processes that end at once."""
    monkeypatch.setattr(runner, "_POLL", 0.001)


def rows(results: Any) -> dict[str, Any]:
    return {row["method"]: row for row in results["rows"]}


def test_each_method_chooses_on_validation_and_is_measured_on_test(tmp_path: Path) -> None:
    config, fake = study_config(tmp_path), Fake()
    status, results, said = run(config, fake)
    assert status == 0 and len(fake.labels) == ALL == results["done"] == results["total"]
    assert len(set(fake.labels)) == ALL  # nothing twice
    assert {name: row["setting"] for name, row in rows(results).items()} == {
        "a": "optim.lr=0.002",
        "b": "optim.lr=0.004",
        "none": "-",
    }
    # The search has one seed, only the chosen setting has the others
    trains = [label for label in fake.labels if label.startswith("train a")]
    assert trains == [
        *(f"train a optim.lr={lr} seed 0" for lr in (0.001, 0.002, 0.004)),
        "train a optim.lr=0.002 seed 1",
    ]
    tested = [label for label in fake.labels if label.startswith("test of a")]
    assert tested == [f"test of a optim.lr=0.002 seed {seed}" for seed in (0, 1)]
    assert not any(label.startswith("validation of a optim.lr=0.002 seed 1") for label in fake.labels)
    a, b, none = rows(results).values()
    assert (a["test"]["mean"], a["forgetting"]["mean"]) == pytest.approx((21.05, 120.05))
    assert a["test"]["deviation"] == pytest.approx(statistics.stdev([21.0, 21.1]))
    # b - a is 0.5 and 0.6: 0.55 +- 12.7062 * sd / sqrt(2)
    assert b["versus"]["mean"] == pytest.approx(0.55)
    assert b["versus"]["high"] - b["versus"]["mean"] == pytest.approx(12.7062047 * 0.0707106781 / 2**0.5)
    assert (none["test"]["mean"], none["trainable"], none["test"]["deviation"]) == (51.0, 0, None)
    assert none["versus"]["mean"] == pytest.approx(51.0 - 21.05)
    assert (a["tokens"], a["steps"], a["seconds_per_step"]["mean"], a["off_target"]) == (160, 5, 0.5, 0)
    assert (a["trainable"], a["peak_memory_bytes"], a["tasks"]["quiz acc"]["mean"]) == (77, 5 << 20, 0.5)
    searches = {search["method"]: search for search in results["searches"]}
    assert searches["a"]["edges"] == [] and searches["b"]["edges"] == ["optim.lr=0.004 is the largest tried"]
    assert [tried["validation"] for tried in searches["a"]["tried"]] == [21.0, 20.0, 21.0]
    assert "Every method could choose among 3." in said and "optim.lr=0.004 is the largest tried" in said


def test_tables_in_files(tmp_path: Path) -> None:
    config = study_config(tmp_path)
    _, results, _ = run(config, Fake())
    study = Path(config.output)
    markdown = (study / "results.md").read_text()
    assert "| a | base | optim.lr=0.002 | 21.050 ± 0.071 | - | 2 | 120.050 ± 0.071 | 0.5000 ± 0.0000 |" in markdown
    assert "| b | base | optim.lr=0.004 | 21.600 ± 0.141 | +0.550 [-0.085, +1.185] | 2 |" in markdown
    with (study / "results.csv").open() as file:
        table = {line["method"]: line for line in csv.DictReader(file)}
    assert float(table["a"]["test mean"]) == pytest.approx(21.05) and table["a"]["tried"] == "3"
    assert table["none"]["test deviation"] == "" and table["none"]["zeros"] == "0.6"
    with (study / "runs.csv").open() as file:
        runs = list(csv.DictReader(file))
    assert [(line["method"], line["seed"], line["quiz acc"]) for line in runs] == [
        *((name, seed, "0.5") for name in "ab" for seed in "01"),
        ("none", "", "0.5"),
    ]
    with (study / "search.csv").open() as file:
        tried = [(line["method"], line["validation"], line["chosen"]) for line in csv.DictReader(file)]
    assert len(tried) == 6 and tried[1] == ("a", "20.0", "True") and tried[3] == ("b", "22.5", "False")
    before = {path.name: path.read_bytes() for path in study.iterdir() if path.is_file()}
    write_tables(results, study)  # from results.json alone
    assert before == {path.name: path.read_bytes() for path in study.iterdir() if path.is_file()}


def test_a_done_study_runs_nothing(tmp_path: Path) -> None:
    config = study_config(tmp_path)
    _, first, _ = run(config, Fake())
    again = Fake()
    status, second, _ = run(config, again)
    assert status == 0 and again.labels == []
    assert second["rows"] == first["rows"] and len(second["starts"]) == 2


@pytest.mark.parametrize("after", [5, 20])
def test_a_stopped_study_goes_on_and_repeats_nothing(after: int, tmp_path: Path) -> None:
    config, request = study_config(tmp_path), StopRequest()

    def code(task: Task) -> int:
        if len(first.labels) == after:
            request.remember(15, None)
            return -15
        return 0

    first, second = Fake(code), Fake()
    status, partial, said = run(config, first, request)
    assert status == 0 and "stopped by SIGTERM" in said and partial["failures"] == []
    assert (partial["done"], partial["total"]) == (after - 1, ALL)
    status, results, _ = run(config, second)
    assert status == 0 and len(second.labels) == ALL - (after - 1)
    assert not set(first.labels[:-1]) & set(second.labels) and first.labels[-1] in second.labels
    assert rows(results)["a"]["test"]["mean"] == pytest.approx(21.05)


def test_a_failure_stops_no_other_and_is_tried_again(tmp_path: Path) -> None:
    config = study_config(tmp_path)
    broken = "train a optim.lr=0.004 seed 0"
    status, results, said = run(config, Fake(lambda task: 1 if task.label == broken else 0))
    # without all of its search a chooses nothing
    assert status == 1 and rows(results)["b"]["runs"] == 2 and rows(results)["a"]["runs"] == 0
    (failure,) = results["failures"]
    assert failure["code"] == 1 and "a-lr0.004-seed0" in failure["log"] and failure["log"] in said
    again = Fake()
    status, results, _ = run(config, again)
    assert status == 0 and broken in again.labels and not any(" b " in label for label in again.labels)
    assert results["failures"] == [] and rows(results)["a"]["setting"] == "optim.lr=0.002"


def test_two_failures_of_one_run_are_two(tmp_path: Path) -> None:
    config = study_config(tmp_path)
    status, results, _ = run(config, Fake(lambda task: int(task.kind in ("test", "forgetting") and task.method == "b")))
    assert status == 1
    failed = {(Path(one["log"]).parent.name, one["task"]) for one in results["failures"]}
    assert len(failed) == len(results["failures"]) and {kind for _, kind in failed} == {"test", "forgetting"}


def test_a_run_that_diverges_has_lost_and_is_not_tried_again(tmp_path: Path) -> None:
    config = study_config(tmp_path)

    def code(task: Task) -> int:
        if task.kind != TRAIN or task.cell is None or task.cell.config is None or task.cell.config.optim.lr < 4e-3:
            return 0
        (task.folder / "run" / "diagnosis").mkdir(parents=True)
        (task.folder / "run" / "diagnosis" / "r.json").write_text(json.dumps({"error": "FloatingPointError: nan"}))
        return 2

    status, results, said = run(config, Fake(code))
    assert status == 0 and "optim.lr=0.004: diverged" in said
    assert {name: row["setting"] for name, row in rows(results).items()} == {
        "a": "optim.lr=0.002",
        "b": "optim.lr=0.002",
        "none": "-",
    }
    again = Fake()
    assert run(config, again)[0] == 0 and again.labels == []


@pytest.mark.parametrize("inside", ["", "run"], ids=["another runner", "a run whose runner was killed"])
def test_two_runners_share_the_work(inside: str, tmp_path: Path) -> None:
    """One holds a cell for a while: the other leaves it alone, does the rest, and waits."""
    config = study_config(tmp_path)
    run(config, Fake(lambda task: 1))  # nothing is done, but the cells have their names
    (held,) = cells(config, "a-lr0.002-seed0-*")
    free, done = threading.Event(), []

    def hold() -> None:
        with only_writer(held / inside):
            free.wait(30)
            time.sleep(0.2)
            done.append(time.monotonic())

    def code(task: Task) -> int:
        assert task.folder != held or done
        if len(fake.labels) == 14:  # all that can be done without it: b, the base, two searches of a
            free.set()
        return 0

    fake = Fake(code)
    other = threading.Thread(target=hold)
    other.start()
    try:
        status, results, _ = run(config, fake)
    finally:
        free.set()
        other.join()
    assert status == 0 and len(fake.labels) == ALL and results["done"] == ALL


def test_what_a_changed_study_keeps(tmp_path: Path) -> None:
    config = study_config(tmp_path)
    _, before, _ = run(config, Fake())
    fake = Fake()
    more = study_config(
        tmp_path,
        seeds=(0, 1, 2),
        methods=config.methods | {"c": {"optim.lr": [1e-3, 2e-3, 8e-3], "seft.interval": 2, "seft.reactivation": 1}},
        unequal_grids=False,
    )
    _, results, _ = run(more, fake)
    # c tries what a has tried, but for one; both have chosen the same
    assert sorted(fake.labels) == sorted(
        [
            *(
                f"{what} {name} optim.lr={lr} seed 2"
                for name, lr in (("a", 0.002), ("b", 0.004))
                for what in ("train", "test of", "forgetting of")
            ),
            "train c optim.lr=0.008 seed 0",
            "validation of c optim.lr=0.008 seed 0",
        ]
    )
    assert (
        rows(results)["a"]["runs"] == rows(results)["c"]["runs"] == 3
        and rows(results)["c"]["test"] == rows(results)["a"]["test"]
    )
    assert (tmp_path / "study" / "study-1.yaml").is_file()
    fewer = study_config(tmp_path)
    again = Fake()
    _, results, _ = run(fewer, again)
    assert again.labels == [] and results["rows"] == before["rows"]


def test_another_measurement_takes_the_models_that_are_there(tmp_path: Path) -> None:
    """Chosen runs keep their models; a search must train again what it has dropped."""
    config = study_config(tmp_path)
    run(config, Fake())
    kept = {path.parent.parent.name.rpartition("-")[0] for path in Path(config.output).glob("cells/*/run/model")}
    assert kept == {"a-lr0.002-seed0", "a-lr0.002-seed1", "b-lr0.004-seed0", "b-lr0.004-seed1"}
    fake = Fake()
    run(study_config(tmp_path, evaluate={"stride": 8}), fake)
    trained = [label for label in fake.labels if label.startswith("train")]
    assert trained == [
        f"train {name} optim.lr={lr} seed 0" for name, lr in (("a", 0.001), ("a", 0.004), ("b", 0.001), ("b", 0.002))
    ]
    assert sum(label.startswith("test") for label in fake.labels) == 5
    none = study_config(tmp_path, output=str(tmp_path / "none"), keep="none")
    run(none, Fake())
    assert not list((tmp_path / "none").glob("cells/*/run/model"))


def test_a_pruned_base_is_made_first_and_once(tmp_path: Path) -> None:
    prune = {"model.path": str(tmp_path / "base"), "method": "magnitude", "sparsity": 0.5}
    config = study_config(tmp_path, bases={"p": prune, "base": {"path": str(tmp_path / "base")}})
    fake = Fake()
    run(config, fake)
    assert fake.labels[0] == "prune p" and len(fake.labels) == ALL + 1
    assert (tmp_path / "study" / "bases" / "p" / "prune.yaml").read_text().count("sparsity: 0.5") == 1
    again = Fake()
    run(config, again)
    assert again.labels == []
    with pytest.raises(ValueError, match="results of another base p"):
        run(study_config(tmp_path, bases={"p": prune | {"sparsity": 0.7}}), again)
    assert again.labels == []


def test_a_base_that_was_replaced_is_noticed(tmp_path: Path) -> None:
    config = study_config(tmp_path)
    run(config, Fake())
    model_files(tmp_path / "base")  # the same bytes at another time
    run(config, Fake())
    (tmp_path / "base" / "model.safetensors").write_bytes(b"others")
    with pytest.raises(ValueError, match="results of another base base"):
        run(config, Fake())


def test_a_text_that_was_replaced_is_noticed(tmp_path: Path) -> None:
    config = study_config(tmp_path)
    run(config, Fake())
    text(tmp_path / "test.jsonl", 900)
    with pytest.raises(ValueError, match="begun with another text: test has other records"):
        run(config, Fake())


def test_commands_say_all_that_was_run(tmp_path: Path) -> None:
    config = study_config(tmp_path, launcher="torchrun --gpu {slot}")
    fake = Fake()
    run(config, fake)
    train = next(command for command in fake.commands if command[3].endswith("train.py"))
    assert train[:3] == ["torchrun", "--gpu", "0"] and train[-1] == "--threads=1"
    (cell,) = cells(config, "a-lr0.002-seed1-*")
    lines = [json.loads(line) for line in (cell / "commands.jsonl").read_text().splitlines()]
    assert [(line["task"], line.get("code")) for line in lines[:2]] == [("train", None), ("train", 0)]
    lines = lines[1::2]  # of the ends
    assert [line["task"] for line in lines] == ["train", "test", "forgetting"]
    assert all(line["code"] == 0 and line["command"].startswith("torchrun --gpu 0 launch/") for line in lines)
    settings = (cell / "train.yaml").read_text()
    assert "steps: 5" in settings and settings.count("seed: 1") == 2  # of the data order, and of SEFT
    about = json.loads((tmp_path / "study" / "study.json").read_text())
    assert (
        about["starts"][0]["versions"]["torch"]
        and about["starts"][0]["code"]["source"]
        and about["parts"]["test"]["records"] == 3
    )


def wait_for(what: str, check: Callable[[], object], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 150
    while not check():
        assert process.poll() is None and time.monotonic() < deadline, f"{what} did not come\n{log.read_text()}"
        time.sleep(0.05)


@pytest.mark.long
def test_a_real_study_that_is_killed_goes_on(tmp_path: Path) -> None:
    """One method, one seed, no search; study and run are killed, and the next start resumes from the checkpoint."""
    write_tiny(tmp_path / "tiny")
    study = {
        "output": str(tmp_path / "study"),
        "bases": {"dense": {"path": str(tmp_path / "tiny" / "model")}},
        "data": {
            "split": {"path": str(tmp_path / "tiny" / "text.jsonl"), "shares": {"train": 4, "validation": 1, "test": 1}}
        },
        "methods": {"seft": {"seft.density": 0.05, "seft.interval": 10, "seft.allow_dense": True}},
        "train": {"data.seq_len": 32, "batch_size": 2, "save_every": 2},
        "tokens": 60 * 64,
        "seeds": [0],
        "threads": 1,
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    command = [sys.executable, str(ROOT / "launch" / "study.py"), "--config", str(tmp_path / "study.yaml")]
    log = tmp_path / "log"
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as first:
        checkpoints = "cells/*/run/checkpoints/step-*"
        wait_for("a checkpoint", lambda: list((tmp_path / "study").glob(checkpoints)), first, log)
        first.kill()
    (lock,) = (tmp_path / "study").glob("cells/*/run/run.lock")
    os.kill(int(lock.read_text().split()[1]), signal.SIGKILL)
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    (cell,) = (tmp_path / "study" / "cells").iterdir()
    steps = [json.loads(line)["step"] for line in (cell / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 61))
    attempts = json.loads((cell / "run" / "manifest.json").read_text())["attempts"]
    assert len(attempts) == 2 and attempts[1]["first_step"] > 1
    assert "[2/2] test of seft seed 0: done" in done.stdout
    assert (tmp_path / "study" / "figures" / "curves.png").is_file()
    shown = subprocess.run(
        [*command[:2], "--show", str(tmp_path / "study")], capture_output=True, text=True, timeout=100
    )
    tables = done.stdout[done.stdout.index("Quality") :].partition("Written in")[0]
    assert shown.returncode == 0 and tables.strip() == shown.stdout.strip()


def test_cells_keep_their_names_across_versions(tmp_path: Path) -> None:
    """Names that an earlier version gave: options that came later must not orphan what users have run."""
    study_config(tmp_path)
    parts = ("train", "validation", "test", "forgetting")
    data = {name: {"path": str(tmp_path / f"{name}.jsonl"), "date": "2026-01-01"} for name in parts}
    methods: dict[str, dict[str, Any]] = {
        "moving": {"optim.lr": [1e-3], "seft.reactivation": 1},
        "fixed": {"method": "seft_fixed_mask"},
        "lora": {"method": "masked_lora"},
    }
    config = study_config(tmp_path, data=data, methods=methods, seeds=(0,))
    run(config, Fake())
    names = ["fixed-seed0-af13767e88", "lora-seed0-b7105c1b8e", "moving-lr0.001-seed0-2c2260b9db"]
    assert [cell.name for cell in cells(config)] == names
    measured = {file.name for cell in cells(config) for file in cell.glob("*-*.json")}
    assert measured == {"forgetting-5d4b2cad2d.json", "test-b7455d7f4a.json"}


def test_a_base_that_is_no_model_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "outer" / "model").mkdir(parents=True)
    fake = Fake()
    with pytest.raises(ValueError, match=r"bases.base: .*outer has no config.json"):
        run(study_config(tmp_path, bases={"base": {"path": str(tmp_path / "outer")}}), fake)
    assert fake.labels == []


def test_the_end_of_swaps_makes_another_cell_only_where_there_are_swaps(tmp_path: Path) -> None:
    model_files(tmp_path / "parent")
    swaps = {"parent": str(tmp_path / "parent"), "seft.swap_fraction": 0.1}

    def hashes(name: str, **options: Any) -> set[str]:
        method = {"seft.interval": 2, **options}
        config = study_config(tmp_path, output=str(tmp_path / name), methods={"a": method}, tokens=320)
        run(config, Fake())
        return {path.name.rpartition("-")[2] for path in cells(config)}

    by_default = hashes("default", **swaps)
    assert by_default.isdisjoint(hashes("last", **swaps, **{"seft.swap_end": 8}))  # of 10 steps
    assert by_default.isdisjoint(hashes("none"))
    assert hashes("none again", **{"seft.swap_end": 8}) == hashes("none")
