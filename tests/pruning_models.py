"""A small dense model to prune, and runs of seft prune on it."""

from pathlib import Path
from typing import Any

from seft_dist.config import DataConfig, ModelConfig, PruneConfig
from tests.texts import dense_folder, text_jsonl

# More than 128 inputs: several blocks of SparseGPT; 9 heads and 3 key-value heads as SmolLM2; rows over several tiles
SHAPE: dict[str, Any] = {
    "hidden_size": 144,
    "intermediate_size": 160,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def write_dense(folder: Path) -> Path:
    """Write the model to FOLDER/model, and text.jsonl beside it; the model's folder is returned."""
    dense = dense_folder(folder / "model", **SHAPE)
    text_jsonl(folder / "text.jsonl")
    return dense


def configure(model: Path, output: Path, **over: Any) -> PruneConfig:
    data = DataConfig(path=str(model.parent / "text.jsonl"), seq_len=96)
    settings: dict[str, Any] = {"data": data, "sequences": 24} | over
    return PruneConfig(model=ModelConfig(path=str(model)), output=str(output), **settings)
