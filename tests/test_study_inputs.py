"""Studies: what is refused before anything runs, how a text is split, and what figures and estimates are made of."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from seft_dist.config import DataConfig, ModelConfig, PruneConfig, StudyConfig, TrainConfig
from seft_dist.session.cli import parse, to_yaml
from seft_dist.study.figures import write_figures
from seft_dist.study.folder import open_study
from seft_dist.study.methods import read_methods, with_seed
from seft_dist.study.options import flatten
from seft_dist.study.parts import find_parts
from seft_dist.study.plan import Base, identity_of
from seft_dist.study.progress import Durations, clock, last_step
from seft_dist.study.split import read_split, write_split
from seft_dist.study.state import Survey, Task
from seft_dist.study.statistics import difference, spread, t_quantile
from tests.studies import Fake, run, study_config, text

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "launch" / "recipes").glob("study_*.yaml"))
GRID = {"optim.lr": [1e-3, 2e-3], "seft.interval": 2}

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"methods": {"a": {"optim.lrr": [1e-3]}}}, r"methods\.a: .*optim\.lrr"),
    ({"methods": {"a": {"optim.lr": "high"}}}, r"methods\.a: .*optim\.lr"),
    ({"methods": {"a": {"optim.lr": [1e-3, 0.0], "seft.interval": 2}}}, r"methods\.a: optim\.lr=0\.0: needs"),
    ({"methods": {"a": {"optim.lr": []}}}, "list of different values"),
    ({"methods": {"a": {"optim.lr": [1e-3, 0.001]}}}, "list of different values"),
    ({"methods": {"a": {"optim.lr": 1, "optim": {"lr": 2}}}}, r"methods\.a has optim\.lr twice"),
    ({"methods": {"a": {"steps": 7}}}, "it follows from tokens"),
    ({"methods": {"a": {"seft.seed": 7}}}, "give seeds"),
    ({"methods": {"a": {"save_every": 7}}}, "needs it in train"),
    ({"methods": {"a": {"base": "other"}}}, r"methods\.a\.base=other: needs one of base"),
    ({"methods": {"a": {"method": "none", "optim.lr": 1}}}, "needs only base"),
    ({"methods": {"a": GRID, "b": GRID | {"optim.lr": [1e-3]}}}, "would be tried: a 2, b 1"),
    ({"methods": {"a": GRID, "b": GRID | {"seft.density": [0.01, 0.02]}}}, "would be tried: a 2, b 4"),
    ({"methods": {"a": {"seft.interval": 5, "seft.end": 5}}}, "last evolution"),
    ({"train": {"data.seq_len": 16, "batch_size": 99}}, "less than one step of methods.a: needs at least 1584"),
    ({"train": {"output": "x"}}, "train has output"),
    ({"train": {"data.path": "x"}}, r"needs it under data\.train"),
    ({"bases": {"base": {"model.path": "x", "method": "magnitude", "output": "x"}}}, r"bases\.base is"),
    ({"bases": {"base": {"model.path": "x", "sparsity": 2.0}}}, r"bases\.base: sparsity=2\.0"),
    ({"bases": {"a b": {"path": "x"}}}, "needs a name of letters"),
    ({"bases": {"base": {"path": "./absent"}}}, "is not a folder"),
    ({"evaluate": {"models.x": "y"}}, "the study says it"),
    ({"evaluate": {"stride": 99}}, "evaluate: stride=99"),
    ({"data": {"train": "a", "test": "b"}}, "data has no validation"),
    ({"data": {"train": "a", "validation": "b", "test": "c", "dev": "d"}}, "data has dev"),
    ({"data": {"split": {"path": "a", "shares": {"train": 1, "validation": 1, "test": 1}}, "test": "b"}}, "test twice"),
    ({"data": {"split": {"path": "a", "shares": {"train": 0}}}}, "whole numbers from 1 on"),
    ({"data": {"split": {"path": "a", "shares": {"train": 1}, "by": "luck"}}}, r"data\.split .*by"),
]


@pytest.mark.parametrize(("over", "said"), REFUSED, ids=[said[:30] for _, said in REFUSED])
def test_what_cannot_be_is_refused_before_anything_is_written(over: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        open_study(study_config(tmp_path, **over))
    assert not (tmp_path / "study").exists()


def test_grids_of_different_sizes_must_be_asked_for(tmp_path: Path) -> None:
    methods = {"a": GRID, "b": GRID | {"optim.lr": 1e-3}}
    _, results, said = run(study_config(tmp_path, methods=methods, unequal_grids=True), Fake())
    assert results["rows"][1]["setting"] == "-" and results["searches"][1]["tried"] == []
    assert "Methods could choose among different numbers of settings" in said


def test_records_in_two_parts_are_refused(tmp_path: Path) -> None:
    config = study_config(tmp_path)
    first = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])
    with (tmp_path / "test.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"text": first["text"].replace(" ", "\n")}))  # in other lines
    with pytest.raises(ValueError, match="train and test have 1 records in common, e.g. 'word0x0 word0x1"):
        open_study(config)


def test_another_folder_is_not_taken_for_a_study(tmp_path: Path) -> None:
    config = study_config(tmp_path)
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "letters.txt").touch()
    with pytest.raises(ValueError, match=r"holds no study \(found letters.txt\)"):
        open_study(config)


def records(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


@settings(max_examples=25)
@given(st.sets(st.text("abc ", min_size=1, max_size=8), min_size=60, max_size=80), st.permutations(range(3)))
def test_a_split_by_hash_depends_on_the_records_alone(texts: set[str], order: list[int]) -> None:
    import tempfile

    shares = {"train": 3, "validation": 1, "test": 1}
    with tempfile.TemporaryDirectory() as name:
        found = []
        for i, lines in enumerate((sorted(texts), sorted(texts, reverse=True) + sorted(texts)[:5])):
            folder = Path(name) / str(i)
            folder.mkdir()
            (folder / "all.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in lines))
            try:
                write_split(read_split({"path": str(folder / "all.jsonl"), "shares": shares}), folder, "text")
            except ValueError as error:  # a part has none
                assert "no record" in str(error)
                return
            found.append({part: set(records(folder / f"{part}.jsonl")) for part in shares})
    parts = list(found[0].values())
    assert found[0] == found[1] and set.union(*parts) == texts and sum(map(len, parts)) == len(texts)


def test_a_split_by_index_and_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text("\n\n".join(f"paragraph {i}\nof two lines" for i in range(12)))
    rule = {"path": str(tmp_path / "all.txt"), "shares": {"train": 4, "test": 2}, "by": "index"}
    write_split(read_split(rule), tmp_path, "text")
    assert [text.split()[1] for text in records(tmp_path / "test.jsonl")] == ["4", "5", "10", "11"]
    lines = ["one\n\ntwo", "three", "two\n\nfour", "three\n\ntwo"]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in lines))
    rule = {"path": str(tmp_path / "all.jsonl"), "shares": {"train": 1, "test": 1}, "by": "index", "repeated": "drop"}
    write_split(read_split(rule), tmp_path, "text")
    assert (records(tmp_path / "train.jsonl"), records(tmp_path / "test.jsonl")) == (
        ["one\n\ntwo\n", "two\n\nfour\n"],
        ["three\n", "three\n"],
    )


def test_a_study_splits_once_and_by_one_rule(tmp_path: Path) -> None:
    config = study_config(tmp_path)
    source = text(tmp_path / "all.jsonl", 0, 40)
    split = {"path": source, "shares": {"train": 2, "validation": 1, "test": 1}}
    own = study_config(tmp_path, data={"split": split, "forgetting": config.data["forgetting"]})
    _, results, _ = run(own, Fake())
    assert sum(results["parts"][name]["records"] for name in split["shares"]) == 40
    assert results["parts"]["train"]["options"]["path"].endswith("study/data/train.jsonl")
    before = (tmp_path / "study" / "data" / "train.jsonl").stat().st_mtime_ns
    again = Fake()
    run(own, again)
    assert again.labels == [] and (tmp_path / "study" / "data" / "train.jsonl").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"another rule \(by differ\)"):
        open_study(study_config(tmp_path, data={"split": split | {"by": "index"}}))
    text(tmp_path / "all.jsonl", 0, 41)
    with pytest.raises(ValueError, match=r"another rule \(source differ\)"):
        open_study(own)


def test_how_many_paragraphs_training_has_seen_is_told(tmp_path: Path) -> None:
    config = study_config(tmp_path)
    words = [json.loads(line)["text"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    with (tmp_path / "test.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"text": f"{words[0]}\n\nand a paragraph of its own that is long enough"}))
    _, results, said = run(config, Fake())
    assert results["parts"]["test"]["repeated"] == [1, 5] and "1 of 5" in said


def test_seeds_reach_everything_that_draws() -> None:
    config = parse(TrainConfig, ["--model.path=m", "--data.path=d", "--output=o"])
    seeded = with_seed(config, 5)
    assert (seeded.seed, seeded.seft.seed) == (5, 5) and with_seed(seeded, 0) == config


def test_t_intervals_are_those_of_tables() -> None:
    """Quantiles of Student's t for 97.5 and 95 %, as printed in textbooks."""
    table = {
        1: (12.7062, 6.3138),
        2: (4.3027, 2.9200),
        3: (3.1824, 2.3534),
        4: (2.7764, 2.1318),
        9: (2.2622, 1.8331),
        30: (2.0423, 1.6973),
    }
    for freedom, (wide, narrow) in table.items():
        assert (t_quantile(0.975, freedom), t_quantile(0.95, freedom)) == pytest.approx((wide, narrow), abs=5e-5)
    found = difference([5.0, 7.0, 6.0], [1.0, 2.0, 0.0])
    assert found is not None and found["mean"] == 5.0 and found["high"] == pytest.approx(5 + 4.302653 * 1 / 3**0.5)
    assert found["low"] == pytest.approx(5 - 4.302653 * 1 / 3**0.5)
    assert difference([1.0], [3.0]) == {"mean": -2.0, "low": None, "high": None, "count": 1}
    assert difference([], []) is None and difference([float("inf"), 1.0], [0.0, 0.0]) is None
    assert spread([2.0, 4.0]) == {"mean": 3.0, "deviation": pytest.approx(2**0.5), "count": 2}


def test_options_nested_or_dotted() -> None:
    assert flatten({"a": {"b.c": 1, "d": {}}, "e": [1]}, "x") == {"a.b.c": 1, "e": [1]}


def test_a_pattern_in_a_study_stays_text(tmp_path: Path) -> None:
    """YAML 1.1 makes the number 124, in base 60, of 2:4 without quotation marks."""
    written = study_config(
        tmp_path,
        bases={"base": {"model.path": "m", "method": "magnitude", "pattern": "2:4"}},
        methods={"kept": {"seft.pattern": "2:4", "optim.lr": 1e-3}},
    )
    file = tmp_path / "study.yaml"
    file.write_text(to_yaml(written))
    config = parse(StudyConfig, ["--config", str(file)], description="")
    assert (config.bases, config.methods) == (written.bases, written.methods)
    (method,) = read_methods(config, DataConfig(path="d", seq_len=8))
    assert method.settings[0].config.seft.pattern == "2:4"


def test_figures_of_a_study(tmp_path: Path) -> None:
    config = study_config(tmp_path)
    _, results, _ = run(config, Fake())
    paths = write_figures(results, tmp_path / "study")
    names = ["methods", "quality-trainable", "quality-seconds", "quality-memory", "curves"]
    assert [path.stem for path in paths] == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    for row in results["rows"]:
        row["peak_memory_bytes"] = None
    assert (first := results["rows"][0]["test"]) is not None
    first["mean"] = float("inf")
    assert len(write_figures(results, tmp_path / "study")) == 4


def test_time_left() -> None:
    """An estimate comes from the same method's tasks, else from others', else from the share of a running one."""

    def task(kind: str, method: str) -> Task:
        return Task(kind, f"{kind} {method}", Path(f"{kind}-{method}"), method)

    known = Durations()
    survey = Survey(ready=[task("train", "a"), task("train", "b")], later=[("test", "a"), ("test", "b")])
    assert known.left(survey, [], 1) is None
    going = [(task("train", "a"), 30.0, 0.25)]
    assert known.left(survey, going, 1) is None  # nothing was measured yet
    known.add("validation", "a", 10.0)
    assert known.left(survey, going, 1) == pytest.approx(0.75 * 120 + 120 + 2 * 10)
    known.add("train", "a", 100.0)
    assert known.left(survey, going, 1) == pytest.approx(0.75 * 100 + 100 + 2 * 10)
    assert known.left(survey, going, 2) == pytest.approx((0.75 * 100 + 100 + 2 * 10) / 2)
    known.add("train", "b", 40.0)
    assert known.left(survey, going, 1) == pytest.approx(0.75 * 100 + 40 + 2 * 10)
    assert known.left(Survey(), going, 8) == pytest.approx(75)  # not sooner than the one that takes longest
    assert (clock(7.0), clock(600.0), clock(11_100.0)) == ("7 s", "10 min", "3 h 5 min")


def test_the_last_step_of_a_run_that_writes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_step(path) == 0
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert last_step(path) == 2


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_study_recipes_can_be_worked_out(path: Path) -> None:
    assert path.read_text().startswith("#")
    config = parse(StudyConfig, ["--config", str(path)])
    parts, _ = find_parts(config)
    methods = read_methods(config, parts["train"])
    assert len({len(method.settings) for method in methods if method.settings}) == 1
    assert dataclasses.asdict(config)["output"].startswith("runs/study")


def test_dates_are_the_same_on_all_days(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from seft_dist.study import folder

    class Day:
        value = "2026-01-31"

        @classmethod
        def today(cls) -> "Day":
            return cls()

        def isoformat(self) -> str:
            return self.value

    monkeypatch.setattr(folder, "date", Day)
    config = study_config(tmp_path)
    first = open_study(config)
    Day.value = "2026-02-01"
    second = open_study(config)
    for plan in (first, second):
        assert plan.methods[0].settings[0].config.data.date == "2026-01-31"


def test_rounds_belong_to_a_base_only_where_they_change_it() -> None:
    def identity(**options: Any) -> dict[str, Any]:
        config = PruneConfig(model=ModelConfig(path="m"), output="o", data=DataConfig(path="t.jsonl"), **options)
        return identity_of(Base("b", Path("o"), config), "dense", "text")

    assert identity(compensate=True)["compensate_rounds"] == 8
    assert "compensate_rounds" not in identity()
    assert "compensate_rounds" not in identity(method="sparsegpt", compensate=True)
    assert "compensate_rounds" not in identity(compensate=True, compensate_rounds=1)


def test_a_base_that_compensates_reads_the_training_text(tmp_path: Path) -> None:
    prune = {"model.path": str(tmp_path / "base"), "method": "magnitude", "sparsity": 0.5, "compensate": True}
    config = study_config(tmp_path, bases={"p": prune, "base": {"path": str(tmp_path / "base")}})
    fake = Fake()
    run(config, fake)
    recipe = yaml.safe_load((tmp_path / "study" / "bases" / "p" / "prune.yaml").read_text())
    assert recipe["data"]["path"] == str(tmp_path / "train.jsonl")
    prune_command = next(command for command in fake.commands if any(word.endswith("prune.py") for word in command))
    assert prune_command[-1] == "--threads=1"  # processes side by side share the cores
