"""Quantized checkpoints that transformers can unpack, as plain Hugging Face folders; zeros stay zeros.

Whatever transformers loads and dequantizes is taken: fine-grained FP8 as DeepSeek-V3 has it, compressed-tensors, MXFP4,
GGUF. The sparse forms of compressed-tensors ("sparse-bitmask", "sparse-24-bitmask") can no longer be loaded by it.
"""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from seft_dist.export.folders import new_folder
from seft_dist.io.readers import copy_beside_config, suit_all_readers
from seft_dist.io.settings import first_line as _first
from seft_dist.io.settings import read_settings
from seft_dist.io.source import SPARSE_FORMATS, locate
from seft_dist.io.weight_files import SafetensorError
from seft_dist.io.weights import MAX_SHARD_BYTES


def convert(path: str, output: Path, dtype: torch.dtype = torch.bfloat16, max_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write a quantized model as a plain folder. Holds the whole unpacked model in memory.

    Args:
        path: Folder or hub name of a quantized model, or a .gguf file.
        output: Folder to make; it must not exist.
        dtype: Type of the weights.
        max_bytes: Largest file.

    Raises:
        ValueError: The model is plain already, or transformers cannot unpack it; nothing is left behind.
    """
    gguf = Path(path).expanduser() if path.endswith(".gguf") else None
    with new_folder(output) as folder:
        if gguf is not None:
            unpack_gguf(gguf, folder, dtype, max_bytes)
            return
        source = locate(path)
        _save(_unpack(source, dtype), folder, dtype, max_bytes)
        copy_beside_config(source, folder)
        suit_all_readers(folder)


def unpack_gguf(gguf: Path, folder: Path, dtype: torch.dtype, max_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write the model and the tokenizer of a GGUF file into a folder that exists.

    Raises:
        ValueError: There is no such file, or transformers cannot read it.
    """
    if not gguf.is_file():
        raise ValueError(f"{gguf} is no file: needs a .gguf file, or the folder of a quantized model")
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # Older releases of transformers have no such configuration and always unpack.
    kind = getattr(transformers, "GgufConfig", None)
    unpacked = {} if kind is None else {"quantization_config": kind(dequantize=True)}
    try:
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
        model = _load(**source, dtype=dtype, **unpacked)
    except Exception as error:  # readers of formats raise whatever they like
        raise ValueError(f"{gguf} cannot be unpacked by transformers: {_first(error)}") from error
    _save(model, folder, dtype, max_bytes)
    suit_all_readers(folder)


def _unpack(source: Path, dtype: torch.dtype) -> PreTrainedModel:
    read_settings(source)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # configurations raise whatever their own arithmetic does
        raise ValueError(
            f"{source}: no model that transformers knows ({_first(error)}); needs a config.json of a causal LM"
        ) from error
    found = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    if found is None:
        raise ValueError(f"{source} is not quantized: it can be used as it is (launch/export.py hf changes its type)")
    if not isinstance(found, dict) and not hasattr(found, "to_dict"):
        raise ValueError(f"{source}: its quantization_config is {found!r:.60}; needs named entries")
    found = dict(found if isinstance(found, dict) else found.to_dict())
    sparse = (found.get("sparsity_config") or {}).get("format", found.get("format"))
    if sparse in SPARSE_FORMATS:
        raise ValueError(
            f"{source} is stored as {sparse}, which current compressed-tensors cannot load: unpack it where an older one "
            "is installed (0.12 and transformers 4), or fetch the model's uncompressed version"
        )
    if (
        found.get("quant_method") not in AUTO_QUANTIZATION_CONFIG_MAPPING
    ):  # transformers would load what it does not know
        raise ValueError(f"{source} is quantized by {found.get('quant_method')!r}, which transformers does not know")
    config.quantization_config = found | {"dequantize": True}
    try:
        return _load(source, config=config, dtype=dtype)
    except Exception as error:  # as many kinds as there are formats
        raise ValueError(
            f"{source} ({found.get('quant_method')}) cannot be unpacked by transformers: {_first(error)}"
        ) from error


def _load(*args: Any, **settings: Any) -> PreTrainedModel:
    """Load a model; transformers fills what it does not find with random numbers, which is an error here."""
    model, found = AutoModelForCausalLM.from_pretrained(
        *args, **settings, trust_remote_code=False, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found.get(kind):
            raise ValueError(f"{kind.replace('_', ' ')}: {', '.join(sorted(map(str, found[kind]))[:3])}")
    return model


def _save(unpacked: PreTrainedModel, folder: Path, dtype: torch.dtype, max_bytes: int) -> None:
    """A model that was quantized refuses to be saved, even when nothing in it is any more: its weights go into a new one."""
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
            f"transformers leaves this model quantized, there is no way to plain weights: {_first(error)}"
        ) from error
    model.tie_weights()
    odd = sorted(name for name, value in model.named_parameters() if value.dtype not in (torch.float32, dtype))
    if odd:
        raise ValueError(f"transformers leaves {odd[0]} of this model quantized: there is no way to plain weights")
    try:
        model.save_pretrained(folder, max_shard_size=max_bytes)
    except SafetensorError as error:
        raise OSError(f"{folder} cannot be written: {error}") from error
    for file in folder.glob("*.safetensors"):  # safetensors lets only the owner read what it writes
        file.chmod(folder.stat().st_mode & 0o666)
