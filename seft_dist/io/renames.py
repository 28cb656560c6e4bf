"""Names in the files that transformers changes while it loads: its own table of them, applied to names alone.

GPT-NeoX's files say embed_out where the model says lm_head, GraniteMoE's block_sparse_moe.input_linear where it says
experts.gate_up_proj. A change that moves values within a tensor (transposed, split, permuted) is not followed: such a
tensor counts as missing.
"""

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from seft_dist.files.reading import read_json

Pieces = dict[str, tuple[tuple[str, ...], int]]
"""Name in the model to the tensors of the files that make it up, laid end to end, and the number of experts (0: none)."""


def renamed_tensors(folder: Path, stored: Iterable[str]) -> Pieces:
    """What transformers makes of a folder's tensors where it does not keep their names.

    Args:
        folder: Of the model; its config.json says which family it is.
        stored: Names in the files.

    Returns:
        The tensors that are renamed or put together from whole others; nothing for a family that keeps its names.
    """
    kind = _model_type(folder)
    renamings, converters = _transforms(kind) if kind else ([], [])
    if not renamings and not converters:
        return {}
    from transformers.core_model_loading import dot_natural_key, rename_source_key

    parts: dict[str, dict[str | None, list[str]]] = {}
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters)
        parts.setdefault(name, {}).setdefault(pattern, []).append(key)
    found: Pieces = {}
    for name, by_pattern in parts.items():
        keys = by_pattern.get(None)
        if keys is not None:
            if len(by_pattern) == len(keys) == 1 and keys != [name]:
                found[name] = (tuple(keys), 0)
            continue
        pieces = _laid_out(by_pattern, converters)
        if pieces is not None:
            found[name] = pieces
    return found


def _laid_out(by_pattern: dict[str | None, list[str]], converters: list[Any]) -> tuple[tuple[str, ...], int] | None:
    """The order of the pieces, if a converter does nothing but lay whole tensors end to end."""
    converter = next(c for c in converters if set(by_pattern) & set(c.source_patterns))
    columns = [by_pattern.get(pattern, []) for pattern in converter.source_patterns]
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
    if not columns[0] or any(len(column) != len(columns[0]) for column in columns):
        return None
    if steps in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
        if len(columns) > 1 and len(steps) == 1:
            return None
        return tuple(key for row in zip(*columns, strict=True) for key in row), len(columns[0])
    if steps == [("Concatenate", 0)] and len(columns[0]) == 1:
        return tuple(column[0] for column in columns), 0
    return None


@cache
def _transforms(model_type: str) -> tuple[list[Any], list[Any]]:
    """transformers' renamings and converters of a family's causal LM."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, "")
    names = [name] if isinstance(name, str) else list(name)
    every = [change for key in (*names, model_type) for change in get_checkpoint_conversion_mapping(key) or ()]
    renamings = [change for change in every if isinstance(change, WeightRenaming)]
    return renamings, [change for change in every if isinstance(change, WeightConverter)]


def _model_type(folder: Path) -> str:
    """What config.json says; empty if it says nothing, which others complain about."""
    try:
        kind = read_json(folder / "config.json", dict[str, Any]).get("model_type")
    except (OSError, ValueError):
        return ""
    return kind if isinstance(kind, str) and re.fullmatch(r"[\w-]+", kind) else ""
