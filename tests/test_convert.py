"""Quantized checkpoints as plain folders: the weights that were meant, zeros that stay, clear words for the rest."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from seft_dist.config import ModelConfig, PruneConfig
from seft_dist.export.convert import convert
from seft_dist.io.source import open_source
from seft_dist.pruning.prune import prune_folder
from tests.families import family_folder

BLOCK = 16


def fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of 16 x 16 numbers with a scale each, as DeepSeek-V3 is published (its blocks are 128 x 128)."""
    rows, columns = weight.shape
    padded = torch.zeros(-(-rows // BLOCK) * BLOCK, -(-columns // BLOCK) * BLOCK)
    padded[:rows, :columns] = weight
    blocks = padded.view(len(padded) // BLOCK, BLOCK, -1, BLOCK)
    scale = blocks.abs().amax((1, 3)).clamp_min(1e-9) / 448
    small = (blocks / scale[:, None, :, None]).view_as(padded)[:rows, :columns]
    return small.to(torch.float8_e4m3fn), scale


def quantized_folder(pruned: Path, folder: Path, settings: dict[str, Any]) -> Path:
    shutil.copytree(pruned, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder


@pytest.mark.parametrize("family", ["llama3", "deepseek_v3"])
def test_fp8_comes_back_with_its_zeros(family: str, tmp_path: Path) -> None:
    """A pruned model that is quantized and unpacked has the same names, values to 8 bits, and zeros."""
    config = PruneConfig(
        model=ModelConfig(path=str(family_folder(tmp_path / "dense", family))),
        output=str(tmp_path / "pruned"),
        method="magnitude",
        sparsity=0.5,
    )
    zeros = sum(count.zeros for count in prune_folder(config, progress=False))
    settings = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    folder = quantized_folder(tmp_path / "pruned", tmp_path / "fp8", settings)
    before = load_file(folder / "model.safetensors")
    stored = dict(before)
    for name, weight in before.items():
        if "_proj" in name and weight.dim() == 2:
            stored[name], stored[f"{name}_scale_inv"] = fp8(weight)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="fp8 is quantized.*seft export plain"):
        open_source(ModelConfig(path=str(folder)))

    convert(str(folder), tmp_path / "plain", torch.float32)

    after = load_file(tmp_path / "plain/model.safetensors")
    assert after.keys() == before.keys()
    for name, weight in before.items():
        assert torch.equal(after[name] == 0, weight == 0), name
        torch.testing.assert_close(after[name], weight, rtol=0.07, atol=1e-3, msg=name)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "plain").dtype == torch.float32
    assert (tmp_path / "plain/tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    shown = PruneConfig(model=ModelConfig(path=str(tmp_path / "plain")), method="none")
    assert sum(count.zeros for count in prune_folder(shown, progress=False)) == zeros
    assert (tmp_path / "plain/model.safetensors").stat().st_mode & 0o044  # not for the owner alone


def test_what_cannot_be_unpacked_is_refused(tmp_path: Path) -> None:
    dense = family_folder(tmp_path / "dense", "llama2")
    half = quantized_folder(dense, tmp_path / "half", {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]})
    weights = load_file(half / "model.safetensors")
    del weights["model.layers.0.mlp.down_proj.weight"]
    save_file(weights, half / "model.safetensors", {"format": "pt"})
    sparse = {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-bitmask"}}
    cases = {
        "dense": (dense, "is not quantized: it can be used as it is"),
        "sparse": (quantized_folder(dense, tmp_path / "sparse", sparse), "sparse-bitmask, which current"),
        "odd": (
            quantized_folder(dense, tmp_path / "odd", {"quant_method": "none such"}),
            "which transformers does not know",
        ),
        "half": (
            half,
            "half .fp8. cannot be unpacked by transformers: missing keys: model.layers.0.mlp.down_proj.weight",
        ),
        "absent": (tmp_path / "absent", "is not a folder"),
        "no.gguf": (tmp_path / "no.gguf", "is no file: needs a .gguf file"),
        "text.gguf": (tmp_path / "text.gguf", "text.gguf cannot be unpacked by transformers"),
    }
    (tmp_path / "text.gguf").write_text("text")
    for path, message in cases.values():
        with pytest.raises(ValueError, match=message):
            convert(str(path), tmp_path / "plain")
        assert not [found for found in tmp_path.iterdir() if found.name.startswith("plain")]
    with pytest.raises(ValueError, match="exists already"):
        convert(str(cases["odd"][0]), dense)
