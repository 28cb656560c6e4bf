"""Conversion of quantized checkpoints to plain Hugging Face folders; zeros stay zeros.

Every format that transformers loads and dequantizes is supported: fine-grained FP8 (DeepSeek-V3), compressed-tensors,
MXFP4, GGUF. It can no longer load the sparse formats of compressed-tensors ("sparse-bitmask", "sparse-24-bitmask").
"""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from seft_dist.export.folders import new_folder
from seft_dist.io.readers import copy_beside_config, make_configs_compatible
from seft_dist.io.settings import error_summary, read_settings
from seft_dist.io.source import SPARSE_FORMATS, locate
from seft_dist.io.weight_files import SafetensorError
from seft_dist.io.weights import MAX_SHARD_BYTES
from seft_dist.session.extras import require


def convert(path: str, output: Path, dtype: torch.dtype = torch.bfloat16, max_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write a quantized model as a plain folder. The whole dequantized model is held in memory.

    Args:
        path: Folder or hub name of a quantized model, or a .gguf file.
        output: Folder to create; it must not exist.
        dtype: Dtype of the weights that are written.
        max_bytes: Largest size of a weight file.

    Raises:
        ValueError: The model is not quantized, or transformers cannot unpack it. No files are left behind.
    """
    gguf = Path(path).expanduser() if path.endswith(".gguf") else None
    with new_folder(output) as folder:
        if gguf is not None:
            unpack_gguf(gguf, folder, dtype, max_bytes)
            return
        source = locate(path)
        _save(_unpack(source, dtype), folder, dtype, max_bytes)
        copy_beside_config(source, folder)
        make_configs_compatible(folder)


def unpack_gguf(gguf: Path, folder: Path, dtype: torch.dtype, max_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write the model and the tokenizer of a GGUF file into a folder that exists.

    Raises:
        ValueError: The file does not exist, or transformers cannot read it.
    """
    if not gguf.is_file():
        raise ValueError(f"{gguf} is no file: needs a .gguf file, or the folder of a quantized model")
    require("gguf", str(gguf))
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # Older releases of transformers have no such configuration and always dequantize
    config_class = getattr(transformers, "GgufConfig", None)
    dequantized = {} if config_class is None else {"quantization_config": config_class(dequantize=True)}
    try:
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
        model = _load(**source, dtype=dtype, **dequantized)
    except Exception as error:  # the readers of the formats raise errors of any type
        raise ValueError(f"{gguf} cannot be unpacked by transformers: {error_summary(error)}") from error
    _save(model, folder, dtype, max_bytes)
    make_configs_compatible(folder)


def _unpack(source: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a quantized or compressed checkpoint as plain weights."""
    read_settings(source)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the constructors of configurations raise errors of any type
        raise ValueError(
            f"{source}: no model that transformers knows ({error_summary(error)}); needs a config.json of a causal LM"
        ) from error
    entries = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    if entries is None:
        raise ValueError(f"{source} is not quantized: it can be used as it is (seft export hf changes its type)")
    if not isinstance(entries, dict) and not hasattr(entries, "to_dict"):
        raise ValueError(f"{source}: its quantization_config is {entries!r:.60}; needs named entries")
    entries = dict(entries if isinstance(entries, dict) else entries.to_dict())
    sparse = (entries.get("sparsity_config") or {}).get("format", entries.get("format"))
    if sparse in SPARSE_FORMATS:
        raise ValueError(
            f"{source} is stored as {sparse}, which current compressed-tensors cannot load: unpack it where an older "
            "one is installed (0.12 and transformers 4), or fetch the model's uncompressed version"
        )
    method = entries.get("quant_method")
    if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # transformers would load the model without dequantizing it
        raise ValueError(f"{source} is quantized by {method!r}, which transformers does not know")
    config.quantization_config = entries | {"dequantize": True}
    try:
        return _load(source, config=config, dtype=dtype)
    except Exception as error:  # each format raises errors of its own
        raise ValueError(f"{source} ({method}) cannot be unpacked by transformers: {error_summary(error)}") from error


def _load(*args: Any, **settings: Any) -> PreTrainedModel:
    """Load a model; a missing tensor, which transformers would fill with random numbers, raises a ValueError."""
    model, loading = AutoModelForCausalLM.from_pretrained(
        *args, **settings, trust_remote_code=False, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading.get(kind):
            raise ValueError(f"{kind.replace('_', ' ')}: {', '.join(sorted(map(str, loading[kind]))[:3])}")
    return model


def _save(unpacked: PreTrainedModel, folder: Path, dtype: torch.dtype, max_bytes: int) -> None:
    """Save a dequantized model.

    transformers refuses to save a model that was loaded quantized, even after it was dequantized. So its weights are
    assigned to a new model, which is saved.
    """
    from accelerate import init_empty_weights

    config = copy.deepcopy(unpacked.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    try:
        model.load_state_dict(unpacked.state_dict(), assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"transformers leaves this model quantized, there is no way to plain weights: {error_summary(error)}"
        ) from error
    model.tie_weights()
    odd = sorted(name for name, value in model.named_parameters() if value.dtype not in (torch.float32, dtype))
    if odd:
        raise ValueError(f"transformers leaves {odd[0]} of this model quantized: there is no way to plain weights")
    try:
        model.save_pretrained(folder, max_shard_size=max_bytes)
    except SafetensorError as error:
        raise OSError(f"{folder} cannot be written: {error}") from error
    for file in folder.glob("*.safetensors"):  # safetensors creates files that only their owner can read
        file.chmod(folder.stat().st_mode & 0o666)
