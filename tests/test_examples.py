"""The scripts of docs/examples/ train a tiny pruned model as their first lines say, and keep its zeros."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from seft_dist.modules.targets import find_targets
from tests.models import VOCAB
from tests.scripts import run_script

TEMPLATE = "{% for message in messages %}{{ message['content'] }} {{ eos_token }} {% endfor %}"


def _run(script: str, pruned: Path, data: Path, output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run an example, and check that it trained weights and kept the number of zeros of each."""
    done = run_script(f"docs/examples/{script}.py", pruned, data, output, *options, timeout=250)
    assert done.returncode == 0, done.stderr
    before = find_targets(AutoModelForCausalLM.from_pretrained(pruned))
    after = find_targets(AutoModelForCausalLM.from_pretrained(output))
    assert before.keys() == after.keys()
    for name, module in after.items():
        assert (module.weight == 0).sum() == (before[name].weight == 0).sum(), name
        assert not torch.equal(module.weight, before[name].weight), name
    return done


def _logged(output: Path) -> list[dict[str, float]]:
    """Return what Trainer logged, and check that its last checkpoint has one of SEFT's."""
    assert list((output / "checkpoint-20" / "seft").iterdir())
    state = json.loads((output / "checkpoint-20" / "trainer_state.json").read_text())
    log: list[dict[str, float]] = state["log_history"]
    return log


@pytest.mark.slow
def test_trainer(inputs: Path, tmp_path: Path) -> None:
    _run("trainer", inputs / "pruned", inputs / "text.jsonl", tmp_path)
    log = _logged(tmp_path)
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [10, 20]
    norms = [entry["grad_norm"] for entry in log if "grad_norm" in entry]
    assert len(norms) == 4 and min(norms) > 0


@pytest.mark.slow
def test_sft_trainer(inputs: Path, tmp_path: Path) -> None:
    pruned = tmp_path / "pruned"
    AutoModelForCausalLM.from_pretrained(inputs / "pruned").save_pretrained(pruned)
    tokenizer = AutoTokenizer.from_pretrained(inputs / "pruned")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(pruned)
    chats = []
    for i in range(50):
        words = [f"w{(7 * i + j) % (VOCAB - 2)}" for j in range(20)]
        parts = {"user": " ".join(words[:10]), "assistant": " ".join(words[10:])}
        chats.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in parts.items()]}))
    (tmp_path / "chats.jsonl").write_text("\n".join(chats))
    _run("sft_trainer", pruned, tmp_path / "chats.jsonl", tmp_path / "out")
    log = [entry for entry in _logged(tmp_path / "out") if "loss" in entry]
    assert [entry["step"] for entry in log] == [5, 10, 15, 20]
    assert log[-1]["loss"] < log[0]["loss"]
    assert min(entry["grad_norm"] for entry in log) > 0


@pytest.mark.parametrize(
    ("script", "options"),
    [
        pytest.param("accelerate_loop", [], marks=pytest.mark.slow),
        pytest.param("compiled_loop", ["aot_eager"], marks=pytest.mark.slow),
        pytest.param("compiled_loop", [], marks=pytest.mark.long),  # inductor compiles for a minute or two
    ],
)
def test_loops(script: str, options: list[str], inputs: Path, tmp_path: Path) -> None:
    done = _run(script, inputs / "pruned", inputs / "text.jsonl", tmp_path, *options)
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 20 and lines[-1].startswith("step 20: loss ")
    if script == "accelerate_loop":
        assert list((tmp_path / "checkpoints").iterdir())
