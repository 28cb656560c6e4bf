"""The table of a sweep: from folders that runs of every fate have left."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from seft_dist.config import SweepConfig
from seft_dist.results.sweep import TASKS, print_sweep, read_sweep, write_sweep


def make_run(folder: Path, *, loss: float | None = None, perplexity: float | None = None, **config: Any) -> None:
    """A run's folder after one step of two, or finished if it has a loss."""
    folder.mkdir(parents=True)
    tree = {"output": str(folder), "seed": 0, "optim": {"lr": 0.001}, "seft": {"density": 0.01, "seed": 0}}
    for name, value in config.items():
        group, _, key = name.rpartition("__")
        (tree[group] if group else tree)[key] = value  # type: ignore[index]
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0, "seconds": 0.5}\n{"step": 2, "lo')
    if loss is not None:
        sparsity = {"target": 0.6, "final": 0.6, "layers_off_target": 0}
        (folder / "result.json").write_text(
            json.dumps({"steps": 2, "loss": loss, "seconds": 1.5, "sparsity": sparsity})
        )
    if perplexity is not None:
        write_eval(folder, perplexity)


def write_eval(folder: Path, perplexity: float, how: dict[str, Any] | None = None, **policy: Any) -> None:
    """eval.json: as it was before it had a policy, or with one."""
    old = {
        "path": "heldout.jsonl",
        "split": "train",
        "window": 16,
        "stride": None,
        "max_tokens": None,
        "num_tokens": 90,
    }
    old |= {"dtype": "auto"} | (how or {})
    model = {"perplexity": perplexity} | {name: old[name] for name in ("window", "stride", "num_tokens")}
    content = {
        "data": {name: old[name] for name in ("path", "split")},
        "settings": {name: old[name] for name in ("max_tokens", "dtype")},
        "models": {"repaired": model | ({"policy": policy} if policy else {})},
    }
    (folder / "eval.json").write_text(json.dumps(content))


def attempts(folder: Path, *ends: tuple[str, int], begun: int | None = None) -> None:
    """Write the files of slurm/common.sh: the ends of attempts, and a folder for each that has begun."""
    for i in range(len(ends) if begun is None else begun):
        (folder / "slurm" / f"7-{i}").mkdir(parents=True)
        (folder / "slurm" / f"7-{i}" / "job.txt").touch()
    lines = [f"7\t{i}\t{how}\t{code}\tnone\tnode1\tt0\tt1\n" for i, (how, code) in enumerate(ends)]
    (folder / "slurm" / "attempts.tsv").write_text("".join(lines))


def written(folder: Path) -> tuple[list[dict[str, str]], str]:
    """The rows of sweep.csv, and sweep.md."""
    sweep = read_sweep(SweepConfig(folder=str(folder), figure=False))
    paths = write_sweep(sweep, SweepConfig(folder=str(folder), figure=False))
    assert [path.name for path in paths] == ["sweep.csv", "sweep.md"]
    with paths[0].open() as file:
        return list(csv.DictReader(file)), paths[1].read_text()


def test_every_fate_is_told(tmp_path: Path) -> None:
    names = ["whole", "stopped", "failed", "refused", "lost", "missing"]
    lines = [f"{name}\t--optim.lr {i}e-3 --seft.density 0.01\n" for i, name in enumerate(names)]
    (tmp_path / TASKS).write_text("".join(lines))
    make_run(tmp_path / "whole", loss=2.5, perplexity=12.25)
    make_run(tmp_path / "stopped")
    attempts(tmp_path / "stopped", ("failed", 137), ("stopped", 0))
    make_run(tmp_path / "failed")
    attempts(tmp_path / "failed", ("failed", 1), ("failed", 1))
    attempts(tmp_path / "refused", ("refused", 2))
    attempts(tmp_path / "lost", ("stopped", 0), begun=2)
    rows, text = written(tmp_path)
    assert [row["run"] for row in rows] == names
    assert [row["status"] for row in rows] == [
        *("finished", "stopped", "failed (1)", "refused (2)", "running or lost", "missing")
    ]
    assert rows[0] == {
        "run": "whole",
        "optim.lr": "0e-3",  # the density is the same in all
        "status": "finished",
        "step": "2",
        "loss": "2.5",
        "perplexity": "12.25",
        "sparsity": "0.6",
        "off target": "0",
        "seconds": "1.5",
        "restarts": "",
    }
    assert (rows[1]["step"], rows[1]["loss"], rows[1]["restarts"]) == ("1", "9.0", "1")
    assert "1 of 6 runs are finished. stopped: stopped; failed: failed (1); " in text
    assert "| whole | 0e-3 | finished | 2 | 2.5000 | 12.250 | 60.0000% | 0 | 2 |" in text


def test_a_bar_in_a_setting_keeps_the_table_whole(tmp_path: Path) -> None:
    for name, targets in (("some", "q_proj|v_proj"), ("all", "all-linear")):
        make_run(tmp_path / name, loss=1.0, seft__targets=targets)
    lines = [line for line in written(tmp_path)[1].splitlines() if "proj" in line]
    assert lines and all("q_proj\\|v_proj" in line for line in lines)


def test_means_over_seeds(tmp_path: Path) -> None:
    """Without tasks.tsv: what differs is read from the configurations; seeds that go together are one column."""
    for density, losses in ((0.01, (1.0, 2.0, 3.0)), (0.05, (0.5,))):
        for seed, loss in enumerate(losses):
            folder = tmp_path / f"{density}-{seed}"
            make_run(folder, loss=loss, seed=seed, seft__seed=seed, seft__density=density)
    rows, text = written(tmp_path)
    assert list(rows[0])[:4] == ["run", "seed", "seft.density", "status"]
    assert "| 0.01 | 3 | 2.0000 +- 1.0000 |" in text and "| 0.05 | 1 | 0.5000 |" in text
    sweep = read_sweep(SweepConfig(folder=str(tmp_path)))
    assert {key: len(runs) for key, runs in sweep.groups().items()} == {("0.01",): 3, ("0.05",): 1}
    console = Console(width=200, record=True, quiet=False)
    print_sweep(sweep, console)
    assert "Means over seeds" in console.export_text()


POLICY: dict[str, Any] = {
    "data": "a",
    "text": "4f",
    "join": "documents",
    "tokenizer": "9c",
    "seq_len": 16,
    "stride": None,
    "dtype": "float32",
}


@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        ({}, {"window": 64}, "seq_len is 16 (0); 64 (1)"),
        ({}, {"stride": 8}, "stride is None (0); 8 (1)"),
        ({}, {"path": "other.jsonl"}, "path is heldout.jsonl (0); other.jsonl (1)"),
        ({}, {"num_tokens": 91}, "num_tokens is 90 (0); 91 (1)"),
        ({}, {"max_tokens": 50}, "max_tokens is None (0); 50 (1)"),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}, "dtype is float32 (0); bfloat16 (1)"),
        (POLICY, {**POLICY, "text": "55"}, "text is 4f (0); 55 (1)"),
        (POLICY, {**POLICY, "join": "newline"}, "join is documents (0); newline (1)"),
        (POLICY, {**POLICY, "tokenizer": "00"}, "tokenizer is 9c (0); 00 (1)"),
        (POLICY, {**POLICY, "dtype": "bfloat16"}, "dtype is float32 (0); bfloat16 (1)"),
        ({"window": 64}, POLICY, "seq_len is 64 (0); 16 (1)"),  # an older file beside a newer one
    ],
)
def test_no_mean_over_unlike_evaluations(
    first: dict[str, Any], second: dict[str, Any], named: str, tmp_path: Path
) -> None:
    for seed, how in enumerate((first, second)):
        make_run(tmp_path / str(seed), loss=2.0 + seed, seed=seed, seft__seed=seed)
        if how is POLICY or "join" in how:
            write_eval(tmp_path / str(seed), 320.0 + seed, **how)
        else:
            write_eval(tmp_path / str(seed), 320.0 + seed, how)
    text = written(tmp_path)[1]
    assert "2.5000 +- 0.7071 | unlike |" in text and "320.5" not in text
    assert f"No mean of perplexity: {named}" in text and f"These perplexities cannot be compared: {named}" in text


def test_a_mean_over_like_evaluations(tmp_path: Path) -> None:
    for seed in range(2):
        make_run(tmp_path / str(seed), loss=2.0, seed=seed, seft__seed=seed)
        write_eval(tmp_path / str(seed), 320.0 + seed, **{**POLICY, "data": f"copy-{seed}"})
    text = written(tmp_path)[1]
    assert "320.500 +- 0.707" in text and "Warning" not in text


def test_no_mean_over_other_sparsities_and_options(tmp_path: Path) -> None:
    """tasks.tsv names seeds only, but the pruned model, or the recipe, was another one."""
    (tmp_path / TASKS).write_text("a\t--seed 0\nb\t--seed 1\n")
    for seed, name in enumerate("ab"):
        make_run(tmp_path / name, loss=2.0 + seed, seed=seed)
    result = json.loads((tmp_path / "b" / "result.json").read_text())
    result["sparsity"]["target"] = 0.5
    (tmp_path / "b" / "result.json").write_text(json.dumps(result))
    text = written(tmp_path)[1]
    assert (
        "| 2 | unlike | unlike |" in text and "No mean of loss: target sparsity is 60.0000% (a); 50.0000% (b)" in text
    )
    result["sparsity"]["target"] = 0.6
    (tmp_path / "b" / "result.json").write_text(json.dumps(result))
    assert "Warning" not in written(tmp_path)[1]
    config = yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())
    config["optim"]["lr"] = 0.5
    (tmp_path / "b" / "config.yaml").write_text(yaml.safe_dump(config))
    assert "No mean of loss: optim.lr is 0.001 (a); 0.5 (b)" in written(tmp_path)[1]


@pytest.mark.slow
def test_figure(tmp_path: Path) -> None:
    for lr in (0.001, 0.002):
        for density in (0.01, 0.05):
            make_run(tmp_path / f"{lr}-{density}", loss=lr + density, optim__lr=lr, seft__density=density)
    config = SweepConfig(folder=str(tmp_path))
    assert write_sweep(read_sweep(config), config)[-1] == tmp_path / "sweep.png"
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_damaged_result_is_none(content: str, tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", loss=2.5)
    (tmp_path / "a" / "result.json").write_text(content)
    rows, _ = written(tmp_path)
    assert [(row["run"], row["status"]) for row in rows] == [("a", "running or lost"), ("b", "finished")]


def test_what_is_not_a_sweep(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds neither tasks.tsv nor a run"):
        read_sweep(SweepConfig(folder=str(tmp_path)))
    make_run(tmp_path / "a")
    (tmp_path / "a" / "eval.json").write_text("{")
    with pytest.raises(ValueError, match="a/eval.json is no JSON"):
        read_sweep(SweepConfig(folder=str(tmp_path)))
    with pytest.raises(ValueError, match="folder is empty"):
        SweepConfig(folder="")
