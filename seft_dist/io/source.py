"""Opening of a model on disk: it is located, and checked for whether it can be used, before anything is loaded."""

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from seft_dist.config import ModelConfig
from seft_dist.io.packed import open_weights
from seft_dist.io.readers import CHAT_TEMPLATES, TOKENIZER_FILES
from seft_dist.io.settings import CONFIG, GENERATION, error_summary, read_config, read_generation, read_settings
from seft_dist.io.weights import Weights
from seft_dist.sparsity.casts import cast_weight

log = logging.getLogger(__name__)

_PIECE = 1 << 24
"""Number of positions that are read and compared at a time, because a head can be larger than the free memory."""
SPARSE_FORMATS = ("sparse-bitmask", "sparse-24-bitmask", "marlin-24")
"""Formats of compressed-tensors that its current releases cannot load."""


def locate(path: str, option: str = "model.path") -> Path:
    """Return the folder of a model, after a download from the Hugging Face hub if it is not a local one.

    Args:
        path: A folder, or a hub name such as "org/model".
        option: Option of the command line that gave it, for error messages.

    Returns:
        The folder, which may be in the hub's cache.

    Raises:
        ValueError: There is no such folder, and the hub has no such model or cannot be reached.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ValueError(f"{option}={path} is not a folder: needs a Hugging Face folder, or a hub name like org/model")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.safetensors.index.json", CONFIG, GENERATION, *TOKENIZER_FILES]
        patterns.append(f"{CHAT_TEMPLATES}/*.jinja")
        return Path(snapshot_download(path, allow_patterns=patterns))
    except Exception as error:  # the hub's client has no common error type
        reason = error_summary(error)
        raise ValueError(f"{option}={path} is not a folder here, and the hub did not give it: {reason}") from error


@dataclass(frozen=True)
class Source:
    """A causal LM on disk, checked but not loaded."""

    folder: Path
    config: PreTrainedConfig
    weights: Weights
    dtype: torch.dtype
    """Dtype in which the weights will be held."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Entries that an export has to replace in config.json, because the file does not describe the weights."""

    def computes_in_fp32(self, name: str) -> bool:
        """Return whether transformers keeps this weight in fp32 although the model is held in a 16-bit dtype."""
        return self.dtype != torch.float32 and _listed_by_class(self.config, "_keep_in_fp32_modules_strict", name)

    def read_for_export(self, name: str, dtype: torch.dtype | None) -> tuple[Tensor, int]:
        """Read a whole tensor in the form in which exports write it.

        A tensor keeps its dtype and its bits if it is stored in another dtype than most of the model, or if the family
        keeps it in fp32: rounding a router's bias, for example, would change which experts are chosen.

        Args:
            name: Name of the tensor in the files.
            dtype: Dtype that the model is written in; None: as stored.

        Returns:
            The tensor in its shape, and the number of weights that were too small for the dtype and are kept at its
            smallest number.
        """
        info = self.weights.info(name)
        tensor = self.weights.read(name).view(info.shape)
        if dtype is None or info.dtype != self.weights.dtype:
            return tensor, 0
        if dtype.itemsize < info.dtype.itemsize and any(_listed_by_class(self.config, k, name) for k in _KEPT_IN_FP32):
            return tensor, 0
        return cast_weight(tensor, dtype)


_KEPT_IN_FP32 = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
"""Attributes of transformers' model classes that list modules to be kept in fp32."""


def open_source(
    config: ModelConfig,
    dtype: torch.dtype | None = None,
    option: str = "--model.dtype",
    path_option: str = "model.path",
) -> Source:
    """Locate a model, read the headers of its files, and check that it can be used.

    Args:
        config: The model's location and dtype.
        dtype: Dtype that the weights must have (a ds_config's); None: that of the configuration.
        option: Option of the command line that chooses the dtype, for error messages.
        path_option: Option that gives the path, likewise.

    Returns:
        The model on disk, for ``load_model``.

    Raises:
        ValueError: There is no such model, its weights are quantized or not in safetensors, it needs code of its own,
            or the dtype is not supported.
    """
    folder = locate(config.path, path_option)
    _check_not_quantized(folder, read_settings(folder))
    weights = open_weights(folder)
    hf = read_config(folder, weights)
    _check_not_quantized(folder, {"quantization_config": getattr(hf, "quantization_config", None)})
    read_generation(folder)
    configured = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(config.dtype)  # None for "auto"
    if dtype is not None and configured not in (None, dtype):
        raise ValueError(
            f'model.dtype={config.dtype}, but the ds_config trains in {dtype}: set "bf16": {{"enabled": true}} in the '
            "ds_config for bfloat16, remove it for float32, or leave model.dtype at auto"
        )
    chosen = dtype or configured or weights.dtype
    if chosen not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{folder} is stored in {chosen}: choose {option} float32 or bfloat16")
    changes: dict[str, Any] = {}
    if _has_separate_head(hf, weights):
        log.warning(
            "%s: config.json says that the output head is the embeddings (tie_word_embeddings), but the files hold a "
            "head that differs: it is used, as by transformers 5, and exports say so",
            folder,
        )
        changes["tie_word_embeddings"] = hf.tie_word_embeddings = False
    source = Source(folder, hf, weights, chosen, changes)
    if dtype == torch.bfloat16:
        _warn_about_rounding(source)
    return source


def _check_not_quantized(folder: Path, settings: dict[str, Any]) -> None:
    if settings.get("quantization_config") is not None:
        raise ValueError(
            f"{folder} is quantized: needs plain float32 or bfloat16 weights; seft export plain makes them, where "
            "transformers can"
        )
    sparse = settings.get("sparsity_config")
    if isinstance(sparse, dict) and sparse.get("format") in SPARSE_FORMATS:
        raise ValueError(
            f"{folder} is stored as {sparse['format']}, which current compressed-tensors cannot load: unpack it where "
            "an older one is installed (0.12 and transformers 4), or fetch the model's uncompressed version"
        )


def _listed_by_class(config: PreTrainedConfig, attribute: str, name: str) -> bool:
    """Return whether an attribute of the model's class has a pattern that matches the name of a weight."""
    patterns = getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), attribute, None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def _has_separate_head(config: PreTrainedConfig, weights: Weights) -> bool:
    """Return whether the files hold a head that differs from the embeddings although config.json says they are tied."""
    if not getattr(config, "tie_word_embeddings", False):
        return False
    tied = getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), "_tied_weights_keys", None)
    for pair in tied.items() if isinstance(tied, dict) else ():
        one, two = (weights.find(name) for name in pair)
        if one is None or two is None or one == two:
            continue
        numel = weights.info(one).numel
        if weights.info(one).shape != weights.info(two).shape:
            return True
        for start in range(0, numel, _PIECE):
            stop = min(start + _PIECE, numel)
            if not torch.equal(weights.read(one, start, stop), weights.read(two, start, stop)):
                return True
    return False


def _warn_about_rounding(source: Source) -> None:
    """Warn that DeepSpeed holds weights in bf16 that the model's family keeps in fp32."""
    tensors = source.weights.tensors
    rounded = [name for name in tensors if tensors[name].dtype == torch.float32 and source.computes_in_fp32(name)]
    if rounded:
        log.warning(
            "%s keeps %d tensors in fp32 (%s ...), which DeepSpeed holds in bf16 while it trains; exports have them "
            "as they are stored",
            source.folder,
            len(rounded),
            rounded[0],
        )
