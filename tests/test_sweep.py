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
        (folder / "eval.json").write_text(json.dumps({"models": {"repaired": {"perplexity": perplexity}}}))


def attempts(folder: Path, *ends: tuple[str, int], begun: int | None = None) -> None:
    """What slurm/common.sh writes down: the ends of attempts, and a folder for each that has begun."""
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


@pytest.mark.slow
def test_figure(tmp_path: Path) -> None:
    for lr in (0.001, 0.002):
        for density in (0.01, 0.05):
            make_run(tmp_path / f"{lr}-{density}", loss=lr + density, optim__lr=lr, seft__density=density)
    config = SweepConfig(folder=str(tmp_path))
    assert write_sweep(read_sweep(config), config)[-1] == tmp_path / "sweep.png"
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_not_a_sweep(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds neither tasks.tsv nor a run"):
        read_sweep(SweepConfig(folder=str(tmp_path)))
    make_run(tmp_path / "a")
    (tmp_path / "a" / "result.json").write_text("{")
    with pytest.raises(ValueError, match="a file of the run .* cannot be read"):
        read_sweep(SweepConfig(folder=str(tmp_path)))
    with pytest.raises(ValueError, match="folder is empty"):
        SweepConfig(folder="")
