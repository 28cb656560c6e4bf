"""Reading of a model's config.json, with a check against the weight files before a model is built from it."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from typing_extensions import TypedDict

from seft_dist.files.kinds import lenient
from seft_dist.files.reading import read_json
from seft_dist.io.weights import Weights

CONFIG, GENERATION = "config.json", "generation_config.json"

# A model cannot have more layers than tensors. The other numbers may be defaults that a family does not use, such as
# the number of experts in a dense model, so they are limited only to keep a wrong one from taking all time or memory.
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_USUAL_LAYERS, _USUAL_EXPERTS, _USUAL_WIDTH = 1000, 4096, 1 << 20
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_WIDTHS = (
    "hidden_size",
    "n_embd",
    "d_model",
    "intermediate_size",
    "n_inner",
    "ffn_dim",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "vocab_size",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "head_dim",
    "kv_lora_rank",
    "q_lora_rank",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "v_head_dim",
)
_FIRST_LAYERS = ("first_k_dense_replace", "max_window_layers")


@lenient
class ModelSettings(TypedDict):
    """Entries that config.json must have; it may have others."""

    model_type: str


def read_settings(folder: Path) -> dict[str, Any]:
    """Read the entries of config.json without interpreting them.

    Raises:
        ValueError: There is no config.json, or it is not an object with a model type.
    """
    try:
        return dict(read_json(folder / CONFIG, ModelSettings))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no {CONFIG}: needs the folder of a Hugging Face causal LM") from error


def read_config(folder: Path, weights: Weights) -> PreTrainedConfig:
    """Read config.json as a configuration of transformers.

    Args:
        folder: Folder of the model.
        weights: The model's weight files; only their headers are used.

    Raises:
        ValueError: The numbers do not fit the files, or transformers does not know such a model.
    """
    settings = read_settings(folder)
    _check_sizes(settings, weights, folder / CONFIG)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the constructors of configurations raise errors of any type
        raise ValueError(
            f"{folder}: no model that transformers knows ({error_summary(error)}); needs a {CONFIG} of a causal LM"
        ) from error


def read_generation(folder: Path) -> GenerationConfig | None:
    """Read generation_config.json, if there is one.

    Raises:
        ValueError: Its entries are not valid for transformers.
    """
    if not (folder / GENERATION).is_file():
        return None
    read_json(folder / GENERATION, dict[str, Any])
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # its fields raise errors of many types
        raise ValueError(
            f"{folder / GENERATION} is not taken by transformers ({error_summary(error)}): repair or remove it"
        ) from error


def error_summary(error: Exception) -> str:
    """Return the first two lines of an error's message as one, or the error's type if it has no message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] if lines else type(error).__name__


def _check_sizes(settings: dict[str, Any], weights: Weights, file: Path) -> None:
    """Raise a ValueError for numbers that do not fit the files; building such a model could take all memory."""
    infos = weights.tensors.values()
    tensors = len(infos)
    widest = max((max(info.shape, default=1) for info in infos), default=1)
    stacked = max((info.shape[0] for info in infos if len(info.shape) > 2), default=0)
    limits = dict.fromkeys(_LAYERS, tensors)
    limits |= dict.fromkeys(_FIRST_LAYERS, max(tensors, _USUAL_LAYERS))
    limits |= dict.fromkeys(_EXPERTS, max(tensors, stacked, _USUAL_EXPERTS))
    limits |= dict.fromkeys(_WIDTHS, max(widest, _USUAL_WIDTH))
    held = f"the weight files hold {tensors} tensors with sides up to {widest}; the two may be of different models"
    _check_limits(settings, limits, file, held)


def check_usual_sizes(settings: dict[str, Any], file: Path) -> None:
    """Check the numbers of a config.json that has no weight files beside it against those of the largest models.

    Raises:
        ValueError: A number is too large; the message names the first one.
    """
    limits = dict.fromkeys((*_LAYERS, *_FIRST_LAYERS), _USUAL_LAYERS)
    limits |= dict.fromkeys(_EXPERTS, _USUAL_EXPERTS) | dict.fromkeys(_WIDTHS, _USUAL_WIDTH)
    _check_limits(settings, limits, file, "no model is so large")


def _check_limits(settings: dict[str, Any], limits: dict[str, int], file: Path, why: str) -> None:
    for part, inner in {"": settings, **{k: v for k, v in settings.items() if isinstance(v, dict)}}.items():
        for key, most in limits.items():
            value, name = inner.get(key), f"{part}.{key}" if part else key
            for number in value if isinstance(value, list) else [value]:
                if number is None:
                    continue
                if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= most:
                    raise ValueError(
                        f"{file} says {name} is {_short(number)}: needs a whole number up to {most}: {why}"
                    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
