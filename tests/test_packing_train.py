"""`seft train`'s run with packing: the same trace, checkpoints and exported files as without."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

import tests.preload  # noqa: F401
from seft_dist.config import ModelConfig
from seft_dist.reproduce.compare import EQUAL, compare
from seft_dist.training.trace import read_trace
from tests.runs import run_config, run_train


def run(inputs: Path, output: Path, world_size: int, **over: Any) -> tuple[list[Any], bytes, dict[str, Any]]:
    """Trace, exported weights and delta, of which only the order in the file's header is left to chance."""
    model = ModelConfig(path=str(inputs / "pruned"), activation_checkpointing=True)
    run_train(run_config(inputs, output, model=model, **over), world_size)
    delta = output / "delta.safetensors"
    with safe_open(delta, "pt") as handle:
        content = {"metadata": handle.metadata()}
    content |= {name: value.tolist() for name, value in load_file(delta).items()}
    return list(read_trace(output)), (output / "model" / "model.safetensors").read_bytes(), content


@pytest.mark.slow
def test_runs_are_the_same(inputs: Path, tmp_path: Path) -> None:
    plain = run(inputs, tmp_path / "none", 2)
    for packing in ("gather", "resident"):
        assert run(inputs, tmp_path / packing, 2, packing=packing) == plain
        found = compare(tmp_path / "none", tmp_path / packing)
        assert found.verdict == EQUAL and found.held and found.terms.promise == "bits", found.sentence


@pytest.mark.slow
def test_a_packed_run_goes_on_anywhere(inputs: Path, tmp_path: Path) -> None:
    """A packed run on two ranks, stopped after 4 of 10 steps, goes on equally on one and three, packed or not."""
    run(inputs, tmp_path / "first", 2, packing="resident", save_every=4)
    shutil.rmtree(tmp_path / "first" / "checkpoints" / "step-00000010")
    for world_size in (1, 3):
        rest = []
        for packing in ("none", "resident"):
            output = tmp_path / f"{packing}{world_size}"
            shutil.copytree(tmp_path / "first", output)
            for made in ("model", "delta.safetensors", "result.json"):
                path = output / made
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            rest.append(run(inputs, output, world_size, packing=packing, save_every=4))
        assert len(rest[0][0]) == 10
        assert rest[0] == rest[1]


def test_gathers_in_one_process_are_refused(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="choose resident, or start several ranks"):
        run(inputs, tmp_path / "run", 1, packing="gather")
