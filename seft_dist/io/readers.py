"""Writing of config.json and tokenizer_config.json so that transformers 4 and 5 read them as the same model.

transformers 5 writes the rotary settings as one entry, ``rope_parameters``. Version 4 does not know it and silently
uses its defaults (base 10000, no scaling), which gives other logits. So the entries of version 4 are written beside it.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from seft_dist.files.reading import read_json
from seft_dist.files.writing import write_text
from seft_dist.io.settings import CONFIG, GENERATION

log = logging.getLogger(__name__)

TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE, CHAT_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
TOKENIZER_FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    CHAT_TEMPLATE,
    "chat_template.json",
)
_OTHER_TOOLS = ("sparsity_config", "compression_config")
"""Entries that llm-compressor leaves in config.json. They describe how its files are stored, not those written here."""
_TWO_BASES = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "gemma3n_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
}
"""Families with one rotary base for full and one for sliding attention, and version 4's names of the two."""
_DTYPES = ("dtype", "torch_dtype")


def copy_settings(source: Path, folder: Path, changes: dict[str, Any], tokenizer: Path | None = None) -> None:
    """Copy a model's files other than its weights: configuration, generation settings, tokenizer, chat templates.

    Args:
        source: Folder of the model to copy from.
        folder: Folder that gets the files.
        changes: Entries of config.json that replace those of the source.
        tokenizer: Folder of another tokenizer; None: the source's.
    """
    shutil.copyfile(source / CONFIG, folder / CONFIG)
    copy_beside_config(source, folder, tokenizer)
    make_configs_compatible(folder, changes)


def copy_beside_config(source: Path, folder: Path, tokenizer: Path | None = None) -> None:
    """Copy generation settings, tokenizer and chat templates unchanged, without config.json.

    Args:
        source: Folder of the model to copy from.
        folder: Folder that gets the files.
        tokenizer: Folder of another tokenizer; None: the source's.
    """
    if (source / GENERATION).is_file():
        shutil.copyfile(source / GENERATION, folder / GENERATION)
    source = tokenizer or source
    templates = [f"{CHAT_TEMPLATES}/{path.name}" for path in (source / CHAT_TEMPLATES).glob("*.jinja")]
    for name in (*TOKENIZER_FILES, *templates):
        if (source / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)


def make_configs_compatible(folder: Path, changes: dict[str, Any] | None = None) -> None:
    """Rewrite config.json and tokenizer_config.json so that transformers 4 and 5 read the same from them.

    Args:
        folder: Folder of a model; its weights may be missing.
        changes: Further entries of config.json.

    Raises:
        ValueError: One of the files cannot be read.
    """
    settings = read_json(folder / CONFIG, dict[str, Any])
    _replace(folder / CONFIG, settings, compatible_config({**settings, **(changes or {})}))
    if (folder / TOKENIZER_CONFIG).is_file():
        settings = read_json(folder / TOKENIZER_CONFIG, dict[str, Any])
        _replace(folder / TOKENIZER_CONFIG, settings, compatible_tokenizer_config(settings))


def compatible_config(settings: dict[str, Any]) -> dict[str, Any]:
    """Add the entries that transformers 4 reads to those of a config.json.

    The result is used only if transformers 5 still reads the same model from it; otherwise a warning is logged and the
    entries of version 4 are left out.

    Args:
        settings: Entries of a config.json; those written by version 4 are left as they are.

    Returns:
        The entries for both versions, without those of other tools.
    """
    plain = {key: value for key, value in settings.items() if key not in _OTHER_TOOLS}
    stored = next((plain[key] for key in _DTYPES if isinstance(plain.get(key), str)), None)
    if stored is not None:
        plain |= dict.fromkeys(_DTYPES, stored)
    if "model_type" not in plain:
        return plain
    config = _read(plain)
    for other, name in config.attribute_map.items():  # the versions write different ones of two names of an entry
        if name in plain and "expert" in name and "expert" in other:
            plain[other] = plain[name]
        elif other in plain and "expert" in name and "expert" in other:
            plain[name] = plain[other]
    if not plain.get("rope_parameters"):
        return plain
    known = {**plain, **_rotary_of_version_4(config)}
    if not known.get("rope_scaling"):
        known.pop("rope_scaling", None)
    if not _same(_read(known), config):
        log.warning(
            "The rotary settings of model type %s can only be read by transformers 5: %s",
            config.model_type,
            config.rope_parameters,
        )
        return plain
    return known


def compatible_tokenizer_config(settings: dict[str, Any]) -> dict[str, Any]:
    """Rename entries of a tokenizer_config.json to names that both transformers 4 and 5 know.

    Args:
        settings: Entries of the file.
    """
    known = dict(settings)
    if known.get("tokenizer_class") == "TokenizersBackend":
        known["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(known.get("extra_special_tokens"), list):  # version 4 expects a dict of names here
        known.setdefault("additional_special_tokens", known.pop("extra_special_tokens"))
    return known


def _read(settings: dict[str, Any]) -> PreTrainedConfig:
    settings = json.loads(json.dumps(settings))  # a copy: configurations change the entries that they are given
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def _same(read: PreTrainedConfig, wanted: PreTrainedConfig) -> bool:
    """Return whether two configurations describe one model. The first may also have names of version 4."""
    one, two = read.to_dict(), wanted.to_dict()
    rotary = [{k: v for k, v in settings.pop("rope_parameters").items() if k != "type"} for settings in (one, two)]
    return rotary[0] == rotary[1] and all(one.get(key) == value for key, value in two.items())


def _rotary_of_version_4(config: PreTrainedConfig) -> dict[str, Any]:
    """Express the rotary settings in the entries of transformers 4; empty if it cannot express them."""
    rotary, kind = config.rope_parameters, config.model_type
    nested = {key: value for key, value in rotary.items() if isinstance(value, dict)}
    bases: dict[str, Any] = {}
    if nested:
        if kind not in _TWO_BASES or set(nested) != {"full_attention", "sliding_attention"}:
            return {}
        sliding = nested["sliding_attention"]
        bases = dict(
            zip(_TWO_BASES[kind], (nested["full_attention"]["rope_theta"], sliding["rope_theta"]), strict=True)
        )
        rotary = nested["full_attention"]
    scaling = {key: value for key, value in rotary.items() if key not in ("rope_theta", "partial_rotary_factor")}
    if scaling.get("rope_type", "default") == "default":
        scaling = {}
    if kind == "phi3" and scaling:  # version 4 accepts exactly these three entries
        scaling = {"type": scaling["rope_type"]} | {key: scaling[key] for key in ("short_factor", "long_factor")}
    entries = {"rope_scaling": scaling or None} | (bases or {"rope_theta": rotary["rope_theta"]})
    if "partial_rotary_factor" in rotary:
        entries["partial_rotary_factor"] = rotary["partial_rotary_factor"]
    if kind.startswith("gpt_neox"):
        entries |= {"rotary_emb_base": rotary["rope_theta"], "rotary_pct": rotary.get("partial_rotary_factor", 1.0)}
    return entries


def _replace(file: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Write a file if its entries have changed; otherwise its bytes stay as they are."""
    if new != old:
        write_text(file, json.dumps(new, indent=2, ensure_ascii=False) + "\n")
