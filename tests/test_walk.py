"""benchmarks/walk.py: the model that it makes, and every command on a tiny shape."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tests.preload  # noqa: F401
from benchmarks import walk
from tests.test_launchers import ROOT


def test_the_model_is_whole_and_random(tmp_path: Path) -> None:
    walk.make_model(walk.TINY, tmp_path)
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
def test_every_command(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/walk.py", "--shape", "tiny", "--output", str(tmp_path / "walk")]
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
