"""Other versions of transformers as readers: ``make readers`` puts them below .readers/, one folder a version."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

READERS = Path(__file__).parents[1] / ".readers"
VERSIONS = ("4.55", "5.0")
TEXT = "The quick brown fox, w1 w2 w3"

_READ = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__
out, folders = sys.argv[1], sys.argv[2:]
ids = torch.arange(2, 50).view(2, 24)
logits, tokens = {}, {}
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    with torch.no_grad():
        logits[folder] = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.contiguous()
    tokens[folder] = AutoTokenizer.from_pretrained(folder)(%r)["input_ids"]
save_file(logits, out + "/logits.safetensors")
json.dump({"version": __version__, "tokens": tokens}, open(out + "/tokens.json", "w"))
"""


def read_by(version: str, folders: list[Path], out: Path) -> tuple[dict[str, torch.Tensor], dict[str, list[int]]]:
    """Logits and tokens of folders as one version of transformers reads them; "": the installed one."""
    out.mkdir()
    path = [str(READERS / version)] if version else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "PYTHONNOUSERSITE": "1"}
    command = [sys.executable, "-c", _READ % TEXT, str(out), *map(str, folders)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((out / "tokens.json").read_text())
    assert found["version"].startswith(version)
    return load_file(out / "logits.safetensors"), found["tokens"]
