"""benchmarks/walk.py: the model that it makes, and every command on a tiny shape."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import tests.preload  # noqa: F401
from benchmarks import walk_checks, walk_model
from tests.test_launchers import ROOT


def test_the_model_is_whole_and_random(tmp_path: Path) -> None:
    walk_model.make_model(walk_model.TINY, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert model.dtype == torch.bfloat16 and model.config.num_hidden_layers == 2
    written = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert written["weight_map"].keys() == model.state_dict().keys()
    assert written["metadata"]["total_size"] == 2 * sum(weight.numel() for weight in model.parameters())
    assert len(set(written["weight_map"].values())) == 3  # two layers and the rest
    for name, weight in model.named_parameters():
        std = weight.float().std(correction=0)
        assert std == 0 if weight.dim() == 1 else 0.019 < std < 0.021, name


@pytest.mark.long
@pytest.mark.timeout(900)
def test_every_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as for a program that lies there
    walk = importlib.import_module("walk")
    command = [sys.executable, "benchmarks/walk.py", "--shape", "tiny", "--output", str(tmp_path / "walk")]
    command += ["--steps", *walk.STEPS]
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "walk" / "walk.json").read_text())
    assert list(found["steps"]) == walk.STEPS
    for name, step in found["steps"].items():
        assert step["seconds"] > 0 and step["own_bytes"] > 0
        assert (step["disk_bytes"] > 0) == (name in walk.Walk.LEAVES), name
        assert name.replace("_", " ") in done.stdout
    attempts = json.loads((tmp_path / "walk" / "run-single" / "result.json").read_text())
    assert attempts["sparsity"]["layers_off_target"] == 0 and attempts["evolutions"] == 1


def test_what_a_kill_or_a_removal_changed_is_found(tmp_path: Path) -> None:
    final = {"step": 4, "loss": 1.5, "digest": "a", "layers": {"q_proj": ["0", "1", "2"]}}
    for run in ("run-single", "run-killed"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "manifest.json").write_text(json.dumps({"final": final, "evolutions": []}))
    walk_checks.check_resumed(tmp_path)
    final["layers"] = {"q_proj": ["0", "1", "3"]}
    (tmp_path / "run-killed" / "manifest.json").write_text(json.dumps({"final": final, "evolutions": []}))
    with pytest.raises(RuntimeError, match="differs .* layers"):
        walk_checks.check_resumed(tmp_path)

    for folder in ("pruned-wanda", "removed"):
        (tmp_path / folder).mkdir()
        save_file({"w": torch.zeros(3)}, tmp_path / folder / "model.safetensors")
    walk_checks.check_removed(tmp_path)
    save_file({"w": torch.tensor([0.0, -0.0, 0.0])}, tmp_path / "removed" / "model.safetensors")
    with pytest.raises(RuntimeError, match="w in removed is not what it was"):
        walk_checks.check_removed(tmp_path)
