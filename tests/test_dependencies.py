"""Required packages: the optimizer works without those of launch/, and wheels for a machine without network."""

import importlib
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

TRAINING = """
import sys
HIDDEN = (
    *("accelerate", "datasets", "deepspeed", "google", "jsonargparse", "lm_eval", "matplotlib", "mpi4py", "peft"),
    *("psutil", "pydantic", "pydantic_core", "rich", "scipy", "sentencepiece", "tensorboard"),
)
for name in HIDDEN:
    sys.modules[name] = None  # looks not installed, to imports and to those who ask beforehand
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from seft_dist import SeftConfig, SeftOptimizer, pack_gathers, pack_weights, unpack_weights
from seft_dist.config import PlanConfig
from seft_dist.io import checkpoint
from seft_dist.kernels import adamw, bits, packing, ranking, sampled, scatter
from seft_dist.planning.plan import make_plan
from seft_dist.planning.rates import find_rates


def build():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[::2] = 0
    return model, SeftOptimizer(model, SeftConfig(density=0.05, interval=2, steps=4), lr=1e-3)


model, seft = build()
ids = torch.arange(16).view(1, 16)
for _ in range(3):
    model(input_ids=ids, labels=ids).loss.backward()
    seft.step()
    seft.zero_grad()
saved = checkpoint.save(seft, Path(sys.argv[1]), {})
again, resumed = build()
checkpoint.load(resumed, saved)
assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
seft.detach()
pack_weights(model, "all-linear")
packed = model(input_ids=ids).logits
unpack_weights(model)
assert torch.equal(packed, model(input_ids=ids).logits)
config = PlanConfig(model="Llama-2-7B")
make_plan(config, find_rates(config))
print("resumed at", resumed.num_steps)
"""


def test_the_optimizer_packing_checkpoints_and_plans_need_little(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRAINING, str(tmp_path)], capture_output=True, text=True, timeout=200, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "resumed at 3"


@pytest.mark.long
def test_with_peft_the_check_of_a_gpu_also_measures_lora(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--tiny", "--parts", "step", "--minutes", "4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--output", str(tmp_path)], env=environment, capture_output=True, text=True, timeout=280, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())["parts"]["step"]["rows"]
    assert [row for row in rows if row.get("method") == "lora" and row["status"] == "ok"]


def test_every_requirement_has_a_lower_bound_that_can_be_installed_alone() -> None:
    done = subprocess.run(
        [sys.executable, ".ci/lower_bounds.py"], capture_output=True, text=True, timeout=60, cwd=ROOT, check=True
    )
    bounds = dict(line.split("==") for line in done.stdout.split())
    assert "torch" not in bounds
    for name, bound in bounds.items():
        found = metadata.version(name)
        assert [int(part) for part in bound.split(".")] <= [int(part) for part in found.split(".")[:3]], name


def test_a_placeholder_stands_for_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "launch")
    wheels = importlib.import_module("wheels")
    wheel = wheels.write_placeholder(tmp_path, "2.11.0")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--target",
        str(tmp_path / "to"),
    ]
    subprocess.run([*command, str(wheel)], check=True, timeout=120)
    (found,) = metadata.distributions(path=[str(tmp_path / "to")])
    assert (found.metadata["Name"], found.version, found.requires) == ("torch", "2.11.0", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--torch", "2.11.0+cu130"], "needs a release such as"),
        (["--torch", "2.11.0"], "needs a new or an empty folder"),
    ],
)
def test_wheels_are_refused_early(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    command = [sys.executable, "launch/wheels.py", "--output", str(tmp_path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 2 and message in done.stderr, done.stderr
