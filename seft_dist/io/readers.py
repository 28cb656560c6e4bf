"""config.json and tokenizer_config.json that readers of transformers 4 and 5 take for the same model.

transformers 5 writes the rotary settings as one entry, ``rope_parameters``. Version 4 does not know it and silently takes
its defaults (base 10000, no scaling), which gives other logits; so its own entries are written beside the new one.
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

TOKENIZER_CONFIG, CHAT_TEMPLATES = "tokenizer_config.json", "additional_chat_templates"
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
    "chat_template.jinja",
    "chat_template.json",
)
_OTHER_TOOLS = ("sparsity_config", "compression_config")
"""What llm-compressor leaves in config.json; it says how its own files are stored, not those written here."""
_TWO_BASES = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "gemma3n_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
}
"""Families with one rotary base for full and one for sliding attention, and what version 4 calls them."""
_DTYPES = ("dtype", "torch_dtype")


def copy_settings(origin: Path, folder: Path, changes: dict[str, Any], tokenizer: Path | None = None) -> None:
    """Copy what belongs to a model beside its weights: configuration, generation settings, tokenizer, chat templates.

    Args:
        origin: Folder of the model it is taken from.
        folder: Gets the files.
        changes: Entries of config.json that are not the origin's.
        tokenizer: Folder of another tokenizer; None: the origin's.
    """
    shutil.copyfile(origin / CONFIG, folder / CONFIG)
    copy_beside_config(origin, folder, tokenizer)
    suit_all_readers(folder, changes)


def copy_beside_config(origin: Path, folder: Path, tokenizer: Path | None = None) -> None:
    """As ``copy_settings``, without config.json and as they are."""
    if (origin / GENERATION).is_file():
        shutil.copyfile(origin / GENERATION, folder / GENERATION)
    origin = tokenizer or origin
    templates = [f"{CHAT_TEMPLATES}/{path.name}" for path in (origin / CHAT_TEMPLATES).glob("*.jinja")]
    for name in (*TOKENIZER_FILES, *templates):
        if (origin / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(origin / name, folder / name)


def suit_all_readers(folder: Path, changes: dict[str, Any] | None = None) -> None:
    """Make a folder's config.json and tokenizer_config.json say the same to transformers 4 and 5.

    Args:
        folder: Of a model, complete but for its weights.
        changes: Further entries of config.json.

    Raises:
        ValueError: One of the files cannot be read.
    """
    settings = read_json(folder / CONFIG, dict[str, Any])
    _replace(folder / CONFIG, settings, config_for_all({**settings, **(changes or {})}))
    if (folder / TOKENIZER_CONFIG).is_file():
        settings = read_json(folder / TOKENIZER_CONFIG, dict[str, Any])
        _replace(folder / TOKENIZER_CONFIG, settings, tokenizer_for_all(settings))


def config_for_all(settings: dict[str, Any]) -> dict[str, Any]:
    """Entries of a config.json with those that transformers 4 reads beside those of version 5.

    Args:
        settings: As read; one that version 4 has written is left as it is.

    Returns:
        What transformers 5 still reads as the same model; the entries of other tools are gone.
    """
    plain = {key: value for key, value in settings.items() if key not in _OTHER_TOOLS}
    stored = next((plain[key] for key in _DTYPES if isinstance(plain.get(key), str)), None)
    if stored is not None:
        plain |= dict.fromkeys(_DTYPES, stored)
    if "model_type" not in plain:
        return plain
    config = _read(plain)
    for other, name in config.attribute_map.items():  # versions differ in which of two names is the one in the file
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


def tokenizer_for_all(settings: dict[str, Any]) -> dict[str, Any]:
    """Entries of a tokenizer_config.json under names that transformers 4 and 5 know.

    Args:
        settings: As read.
    """
    known = dict(settings)
    if known.get("tokenizer_class") == "TokenizersBackend":
        known["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(known.get("extra_special_tokens"), list):  # version 4 has names there
        known.setdefault("additional_special_tokens", known.pop("extra_special_tokens"))
    return known


def _read(settings: dict[str, Any]) -> PreTrainedConfig:
    settings = json.loads(json.dumps(settings))  # configurations change what they are given
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def _same(found: PreTrainedConfig, wanted: PreTrainedConfig) -> bool:
    """Whether two configurations are of one model; version 4's names may have become further attributes of the first."""
    one, two = found.to_dict(), wanted.to_dict()
    rotary = [{k: v for k, v in settings.pop("rope_parameters").items() if k != "type"} for settings in (one, two)]
    return rotary[0] == rotary[1] and all(one.get(key) == value for key, value in two.items())


def _rotary_of_version_4(config: PreTrainedConfig) -> dict[str, Any]:
    """The rotary settings as version 4 of transformers has them; nothing where it has no words for them."""
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
    if kind == "phi3" and scaling:  # version 4 takes these three entries and no other
        scaling = {"type": scaling["rope_type"]} | {key: scaling[key] for key in ("short_factor", "long_factor")}
    found = {"rope_scaling": scaling or None} | (bases or {"rope_theta": rotary["rope_theta"]})
    if "partial_rotary_factor" in rotary:
        found["partial_rotary_factor"] = rotary["partial_rotary_factor"]
    if kind.startswith("gpt_neox"):
        found |= {"rotary_emb_base": rotary["rope_theta"], "rotary_pct": rotary.get("partial_rotary_factor", 1.0)}
    return found


def _replace(file: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Write a file again if its content changed: one that may stay keeps its bytes."""
    if new != old:
        write_text(file, json.dumps(new, indent=2, ensure_ascii=False) + "\n")
