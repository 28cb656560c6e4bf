"""The README's own loop runs as printed, and the commands it shows are those of the Makefile."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models import prune_, tiny_llama

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_own_loop_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    monkeypatch.chdir(tmp_path)
    folder = re.search(r'from_pretrained\("(.*?)"\)', block)
    assert folder is not None
    prune_(tiny_llama()).save_pretrained(folder.group(1))  # type: ignore[operator]
    names: dict[str, object] = {}
    exec(block.replace("steps = 100", "steps = 25"), names)
    trained = names["model"]
    assert isinstance(trained, torch.nn.Module)
    reloaded = AutoModelForCausalLM.from_pretrained("repaired")
    assert trained.state_dict().keys() == reloaded.state_dict().keys()
    for name, value in trained.state_dict().items():
        assert torch.equal(value, reloaded.state_dict()[name]), name


def test_commands_are_those_of_make_quickstart() -> None:
    def words(text: str) -> list[str]:
        return " ".join(text.replace("\\\n", " ").split()).split()

    makefile = (ROOT / "Makefile").read_text()
    names = dict(re.findall(r"^(MODEL|PRUNED|TEXT|RUN) := (\S+)$", makefile, re.M))
    recipe = makefile.replace("$@", "$(RUN)/eval.json")
    for name, value in names.items():
        recipe = recipe.replace(f"$({name})", value)
    shown = next(block for block in re.findall(r"```bash\n(.*?)```", README, re.S) if "seft quickstart" in block)
    commands = [line.split("  #")[0].strip() for line in shown.replace("\\\n", " ").splitlines()]
    made = " ".join(words(recipe))
    assert len(commands) == 6
    for command in commands:
        assert " ".join(words(command)) in made, command
