"""Pruned and exported folders are read equally by the oldest possible transformers, an early 5 and the current one."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import tests.preload  # noqa: F401
from seft_dist.config import DataConfig, ModelConfig, PruneConfig, SeftConfig, TrainConfig
from seft_dist.export.export import pack_model, write_model
from seft_dist.io.readers import compatible_config, compatible_tokenizer_config
from seft_dist.io.source import open_source
from seft_dist.pruning.prune import prune_folder
from seft_dist.training.trainer import train
from tests.families import FAMILIES, family_folder
from tests.readers import READERS, VERSIONS, read_by
from tests.texts import text_jsonl

FAMILIES_READ = (
    *("llama3", "deepseek_dense", "mistral", "qwen3", "gemma3", "gpt2", "mixtral", "qwen3_moe", "deepseek_v3"),
    *("gpt_neox", "granitemoe", "phi3"),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Each family pruned; one also trained, exported, packed and unpacked."""
    root = tmp_path_factory.mktemp("folders")
    for family in FAMILIES_READ:
        dense = ModelConfig(path=str(family_folder(root / f"{family}-dense", family)))
        prune_folder(PruneConfig(model=dense, method="magnitude", output=str(root / family)), progress=False)
    write_model(open_source(ModelConfig(path=str(root / "llama3"))), root / "plain", torch.bfloat16)
    pack_model(open_source(ModelConfig(path=str(root / "plain"))), root / "packed")
    write_model(open_source(ModelConfig(path=str(root / "packed"))), root / "unpacked")
    text_jsonl(root / "text.jsonl")
    config = TrainConfig(
        model=ModelConfig(path=str(root / "llama3")),
        data=DataConfig(path=str(root / "text.jsonl"), seq_len=16),
        output=str(root / "run"),
        seft=SeftConfig(density=0.05),
        steps=2,
        threads=1,
    )
    train(config)
    return [root / name for name in (*FAMILIES_READ, "run/model", "plain", "unpacked")]


@pytest.fixture(scope="module")
def wanted(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], Any]:
    """Logits and tokens that the installed version computes."""
    return read_by("", folders, tmp_path_factory.mktemp("wanted") / "new")


@pytest.mark.parametrize("version", VERSIONS)
def test_other_versions_read_the_same_model(version: str, folders: list[Path], wanted: Any, tmp_path: Path) -> None:
    if not (READERS / version / "transformers").is_dir():
        assert "CI" not in os.environ, f"{READERS / version} is missing: make readers"
        pytest.skip("make readers")
    logits, tokens = read_by(version, folders, tmp_path / "old")
    assert tokens == wanted[1]
    off = {Path(folder).name: float((logits[folder] - value).abs().max()) for folder, value in wanted[0].items()}
    assert {name: distance for name, distance in off.items() if not distance < 1e-4} == {}


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_neox", "granitemoe", "phimoe", "phi3"])
def test_the_old_entries_are_there_and_change_nothing(family: str, tmp_path: Path) -> None:
    settings = json.loads((family_folder(tmp_path / "model", family) / "config.json").read_text())
    known = compatible_config(settings | {"sparsity_config": {"format": "dense"}, "compression_config": {}})
    assert "sparsity_config" not in known and "compression_config" not in known
    assert known["torch_dtype"] == known["dtype"] == "float32"
    assert compatible_config(known) == known
    if family == "gpt2":
        return
    rotary = settings["rope_parameters"]
    parts = [part for part in (rotary, *rotary.values()) if isinstance(part, dict) and "rope_theta" in part]
    bases = {value for name, value in known.items() if "theta" in name or "base" in name}
    assert bases == {part["rope_theta"] for part in parts}
    (tmp_path / "config.json").write_text(json.dumps(known))
    read = AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert {k: v for k, v in read.items() if k != "type"} == rotary


def test_a_config_of_version_4_stays_as_it_is() -> None:
    settings = {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": None, "torch_dtype": "bfloat16", "x": [1]}
    assert compatible_config(settings) == settings | {"dtype": "bfloat16"}


def test_tokenizer_entries() -> None:
    given = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"], "eos_token": "</s>"}
    assert compatible_tokenizer_config(given) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<a>"],
        "eos_token": "</s>",
    }
    other = {"tokenizer_class": "LlamaTokenizer", "extra_special_tokens": {"image_token": "<i>"}}
    assert compatible_tokenizer_config(other) == other
