"""Studies: files that were replaced, damaged or left behind by a kill, values that are not finite, and odd names."""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import tests.studies
from seft_dist.config import ModelConfig, PruneConfig
from seft_dist.pruning.prune import prune_folder
from seft_dist.session import extras
from seft_dist.study import runner
from seft_dist.study.collect import made_with
from seft_dist.study.folder import open_study
from seft_dist.study.inputs import is_as_made, is_made
from seft_dist.study.runner import launch
from seft_dist.study.state import State, Task
from seft_dist.training.manifest import FORMAT
from seft_dist.training.writer_lock import TakenError, only_writer
from tests.folders import model_folder
from tests.studies import Fake, cells, model_files, run, study_config, text


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses between two looks at processes that end at once."""
    monkeypatch.setattr(runner, "_POLL", 0.001)


def rows(results: Any) -> dict[str, Any]:
    return {row["method"]: row for row in results["rows"]}


def lose(monkeypatch: pytest.MonkeyPatch, **where: Any) -> None:
    """Let fake models whose learning rate is at least ``lr`` have no finite perplexity, on one part or all."""
    usual = tests.studies.perplexity

    def perplexity(task: Task) -> float:
        config = task.cell.config if task.cell else None
        is_lost = config is not None and config.optim.lr >= where["lr"] and task.kind == where.get("part", task.kind)
        return math.inf if is_lost else usual(task)

    monkeypatch.setattr(tests.studies, "perplexity", perplexity)


def test_a_model_without_a_finite_perplexity_has_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lose(monkeypatch, lr=2e-3)
    status, results, said = run(study_config(tmp_path), Fake())
    assert status == 0 and {row["setting"] for row in results["rows"]} == {"optim.lr=0.001", "-"}
    assert "optim.lr=0.002: diverged" in said


def test_all_settings_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lose(monkeypatch, lr=0.0)
    status, results, said = run(study_config(tmp_path), Fake())
    assert status == 0 and results["searches"][0]["chosen"] is None and "none: all diverged" in said
    assert rows(results)["none"]["runs"] == 1


def test_a_final_run_without_a_finite_perplexity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lose(monkeypatch, lr=0.0, part="test")
    status, results, said = run(study_config(tmp_path), Fake())
    assert status == 0 and (rows(results)["a"]["diverged"], rows(results)["a"]["test"]) == (2, None)
    assert "0 of 2 (2 diverged)" in said


def test_a_base_that_is_pruned_again_from_a_moved_model(tmp_path: Path) -> None:
    """It has the same weights, whatever its settings and its description say."""
    model_folder(tmp_path / "dense", sparsity=0)
    model = tmp_path / "bases" / "p" / "model"
    settings: dict[str, Any] = {"output": str(model), "method": "magnitude", "sparsity": 0.5}
    prune_folder(PruneConfig(model=ModelConfig(path=str(tmp_path / "dense")), **settings), progress=False)
    assert not is_made(model) and is_as_made(model) and is_made(model)
    shutil.rmtree(model)
    (tmp_path / "dense").rename(tmp_path / "moved")
    prune_folder(PruneConfig(model=ModelConfig(path=str(tmp_path / "moved")), **settings), progress=False)
    assert not is_made(model) and is_as_made(model) and is_made(model)


def test_a_base_whose_runner_was_killed_is_looked_at_before_it_is_used(tmp_path: Path) -> None:
    """Its process went on, and nobody has remembered what it made."""
    config = study_config(tmp_path, bases=study_config(tmp_path).bases | pruned(tmp_path))
    model = tmp_path / "study" / "bases" / "p" / "model"

    def code(task: Task) -> int:
        if task.kind == "train" and not model.exists():
            model_files(model)
            assert not is_made(model)
        return int(task.kind == "prune")

    status, _, _ = run(config, Fake(code))
    assert status == 1 and model.exists()
    fake = Fake()
    status, _, _ = run(config, fake)
    assert status == 0 and is_made(model) and not any(label.startswith("prune") for label in fake.labels)


def pruned(folder: Path) -> dict[str, Any]:
    return {"p": {"model.path": str(folder / "base"), "method": "magnitude", "sparsity": 0.5}}


def test_a_pruned_base_that_was_replaced_is_refused(tmp_path: Path) -> None:
    config = study_config(tmp_path, bases=study_config(tmp_path).bases | pruned(tmp_path))
    run(config, Fake())
    model = tmp_path / "study" / "bases" / "p" / "model"
    model_files(model)  # the same bytes at another time
    run(config, Fake())
    (model / "model.safetensors").write_bytes(b"others")
    fake = Fake()
    with pytest.raises(ValueError, match="results of another base p than"):
        run(config, fake)
    assert fake.labels == []


def test_a_base_that_becomes_another_when_it_is_pruned_again(tmp_path: Path) -> None:
    config = study_config(tmp_path, bases=study_config(tmp_path).bases | pruned(tmp_path))
    run(config, Fake())
    model = tmp_path / "study" / "bases" / "p" / "model"
    shutil.rmtree(model)

    def code(task: Task) -> int:
        if task.kind == "prune":
            model_files(model)
            (model / "model.safetensors").write_bytes(b"others")
            return 1  # so that the stand-in writes nothing itself
        return 0

    status, _, said = run(config, Fake(code))
    assert status == 1 and "made another model" in said
    assert not model.exists() and (model.parent / "another").is_dir()
    run(config, Fake())
    assert is_as_made(model)


INPUTS = [
    ("questions.jsonl", {"evaluate": {"tasks": "quiz", "task_files.quiz": "QUESTIONS"}}, "task_files.quiz="),
    ("teacher/model.safetensors", {"train": {"data.seq_len": 16, "batch_size": 2, "teacher.path": "TEACHER"}}, "teach"),
    ("base/tokenizer.json", {}, "tokenizer of bases.base"),
    ("tasks/quiz.yaml", {"evaluate": {"tasks": "quiz", "tasks_path": "TASKS"}}, "tasks_path="),
]


@pytest.mark.parametrize(("name", "over", "said"), INPUTS, ids=[said for _, _, said in INPUTS])
def test_other_files_that_were_replaced_are_noticed(name: str, over: Any, said: str, tmp_path: Path) -> None:
    text_of = json.dumps(over)
    text_of = text_of.replace("QUESTIONS", str(tmp_path / "questions.jsonl")).replace(
        "TEACHER", str(tmp_path / "teacher")
    )
    text_of = text_of.replace("TASKS", str(tmp_path / "tasks"))
    config = study_config(tmp_path, **json.loads(text_of))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    run(config, Fake())
    (tmp_path / name).write_text("{}")
    (tmp_path / name).parent.joinpath("__pycache__").mkdir()  # importing a task's code writes it
    (tmp_path / name).parent.joinpath("__pycache__", "utils.pyc").touch()
    again = Fake()
    run(config, again)
    assert again.labels == []
    (tmp_path / name).write_text("others")
    with pytest.raises(ValueError, match=f"depend on .*{said}.* with other contents"):
        run(config, again)
    assert again.labels == []


def test_the_test_part_is_not_measured_while_training(tmp_path: Path) -> None:
    for over in ({"evaluate": {"data.split": "test"}}, {"evaluate": {"data.max_records": 1}}):
        with pytest.raises(ValueError, match=r"needs it under data\.PART"):
            open_study(study_config(tmp_path, **over))
    train = {"data.seq_len": 16, "batch_size": 2, "eval.every": 2}

    def mix(*names: str) -> dict[str, str]:
        return {
            "eval.data.mix": json.dumps(
                {name: {"path": str(tmp_path / f"{name}.jsonl"), "weight": 1} for name in names}
            )
        }

    open_study(study_config(tmp_path, train=train | {"eval.data.path": str(tmp_path / "validation.jsonl")}))
    open_study(study_config(tmp_path, train=train | mix("validation")))
    (tmp_path / "link.jsonl").symlink_to("test.jsonl")
    for other in (
        {"eval.data.path": str(tmp_path / "test.jsonl")},
        {"eval.data.path": str(tmp_path / "link.jsonl")},
        mix("validation", "test"),
    ):
        with pytest.raises(ValueError, match=r"methods\.a measures the test part while it trains"):
            open_study(study_config(tmp_path, train=train | other))


def attempt(threads: int, first_step: int) -> dict[str, Any]:
    host = {"cpu": "c", "device": "cpu", "threads": threads, "ranks": 1}
    return {
        "first_step": first_step,
        "hosts": [host],
        "code": {"source": "s"},
        "versions": {"torch": "2", "transformers": "5"},
    }


def test_how_a_run_was_made_is_known_without_its_runner(tmp_path: Path) -> None:
    """A runner that was killed leaves no line about the end of its processes; a run may have several attempts."""
    (tmp_path / "run").mkdir()
    content = {"format": FORMAT, "attempts": [attempt(1, 1), attempt(2, 4)], "evolutions": []}
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(content))
    made = made_with(tmp_path / "run")
    assert (made["threads"], made["torch"]) == ("1, then 2", "2") and "processes at a time" not in made
    (tmp_path / "commands.jsonl").write_text(json.dumps({"task": "train", "jobs": 2}) + '\n{"cut')
    assert made_with(tmp_path / "run")["processes at a time"] == "2"


def test_runs_of_different_models_are_warned_about(tmp_path: Path) -> None:
    config = study_config(tmp_path)
    run(config, Fake())
    for number, cell in enumerate(cells(config, "a-lr0.002-*")):
        content = {"format": FORMAT, "model": f"hash{number}", "attempts": [attempt(1, 1)], "evolutions": []}
        (cell / "run" / "manifest.json").write_text(json.dumps(content))
    _, results, _ = run(config, Fake())
    assert any("base base is hash0" in warning for warning in results["warnings"])


def test_damaged_files_of_runs_do_not_end_a_study(tmp_path: Path) -> None:
    config = study_config(tmp_path, figures=True)
    run(config, Fake())
    for cell in cells(config, "*-lr0.00[24]-seed0-*"):
        with (cell / "run" / "metrics.jsonl").open("a") as file:
            file.write('{"step": 6}\n{"cut\n{}\n')
    (cells(config, "a-lr0.002-seed1-*")[0] / "run" / "result.json").write_text('{"steps": 5}')
    again = Fake()
    status, results, _ = run(config, again)
    assert status == 0 and [one["tokens"] for one in results["runs"] if one["method"] == "a"] == [160, None]
    assert again.labels == [] and (tmp_path / "study" / "figures" / "curves.png").exists()


def test_figures_without_matplotlib_are_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    fake = Fake()
    with pytest.raises(ValueError, match="--figures"):
        run(study_config(tmp_path, figures=True), fake)
    assert fake.labels == []


def test_brackets_in_names_are_shown(tmp_path: Path) -> None:
    grid = {"optim.lr": [1e-3, 2e-3], "seft.interval": 2}
    _, _, said = run(study_config(tmp_path, methods={"seft [slow]": grid, "seft [/b]": grid}), Fake())
    assert "seft [slow]" in said and "seft [/b]" in said


def test_results_are_there_from_the_first_process_on(tmp_path: Path) -> None:
    seen = []

    def code(task: Task) -> int:
        seen.append((tmp_path / "study" / "results.json").exists())
        return 0

    run(study_config(tmp_path), Fake(code))
    assert all(seen)


def test_a_process_keeps_the_lock_of_a_runner_that_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "cell"
    with only_writer(folder, 0) as lock:
        command = [sys.executable, "-c", "import time; time.sleep(60)"]
        process = launch(Task("train", "train a", folder), command, tmp_path / "log", lock)
    try:
        with pytest.raises(TakenError), only_writer(folder, 0):
            pass
    finally:
        process.kill()
    with only_writer(folder, 30):
        pass


def test_the_total_counts_shared_cells_once(tmp_path: Path) -> None:
    grid = {"optim.lr": [1e-3, 2e-3], "seft.interval": 2}
    totals = []

    def code(task: Task) -> int:
        totals.append(State(plan).survey().total)
        return 0

    config = study_config(tmp_path, methods={"one": grid, "same": grid})
    plan = open_study(config)
    fake = Fake(code)
    _, results, _ = run(config, fake)
    assert results["total"] == results["done"] == len(fake.labels) and min(totals) >= results["total"]


def test_what_a_kill_has_left_is_repaired(tmp_path: Path) -> None:
    parts = {name: str(tmp_path / f"{name}.jsonl") for name in ("forgetting",)}
    text(tmp_path / "all.jsonl", 0, 30)
    split = {"path": str(tmp_path / "all.jsonl"), "shares": {"train": 1, "validation": 1, "test": 1}, "by": "index"}
    config = study_config(tmp_path, data=parts | {"split": split})
    run(config, Fake())
    (tmp_path / "study" / "data" / "test.jsonl").unlink()
    fake = Fake()
    assert run(config, fake)[0] == 0 and fake.labels == []


def test_a_model_that_was_half_removed_is_not_taken_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = study_config(tmp_path, keep="none")
    with monkeypatch.context() as patch:
        patch.setattr("seft_dist.study.state.shutil.rmtree", lambda *_, **__: None)  # as if killed before it
        run(config, Fake())
    folders = [path.name for path in (tmp_path / "study").glob("cells/*/run/*") if path.is_dir()]
    assert set(folders) == {"model.removed", "checkpoints.removed"}
    more = study_config(tmp_path, keep="none", seeds=(0, 1, 2))
    run(more, Fake())
    assert not [path for path in (tmp_path / "study").glob("cells/*/run/*") if path.is_dir()]


def test_short_records_in_two_parts_are_counted(tmp_path: Path) -> None:
    config = study_config(tmp_path)
    for name, times in (("train", 1), ("test", 3)):
        with (tmp_path / f"{name}.jsonl").open("a") as file:
            file.write(('\n{"text": "What is this?"}') * times)
    _, results, said = run(config, Fake())
    assert results["parts"]["test"]["short_repeated"] == 3 and "train has 3 of test, too" in said


def test_pairs_that_are_missing_are_told(tmp_path: Path) -> None:
    config = study_config(tmp_path, seeds=(0, 1, 2))
    broken = "train b optim.lr=0.004 seed 1"
    _, _, said = run(config, Fake(lambda task: int(task.label == broken)))
    assert "(2 of 3 pairs)" in said
