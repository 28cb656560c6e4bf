"""Models, as every command reads them."""

from dataclasses import dataclass
from typing import Literal

from seft_dist.config.checks import check

DType = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model, and the type in which its weights are held."""

    path: str
    """Folder of a Hugging Face causal LM (config.json, *.safetensors, tokenizer), or a hub name."""
    dtype: DType = "auto"
    """Type of the weights: "float32", "bfloat16", or "auto", that of the checkpoint."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer; None: the model's own."""
    activation_checkpointing: bool = False
    """True: keep decoder layers' inputs only, compute layers again in backward (less memory, about 1/3 more time)."""

    def __post_init__(self) -> None:
        check(bool(self.path), "model.path is empty", "a folder of a Hugging Face causal LM, or a hub name")
