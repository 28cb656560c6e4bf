"""Renaming of tensors that transformers does while it loads a model, applied to the names alone.

The rules are transformers' own table. For example, GPT-NeoX's files have embed_out where the model has lm_head, and
GraniteMoE's have block_sparse_moe.input_linear where the model has experts.gate_up_proj. Rules that move values within
a tensor (transpose, split, permute) are not supported: such a tensor counts as missing.
"""

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from seft_dist.files.reading import read_json

Pieces = dict[str, tuple[tuple[str, ...], int]]
"""Name in the model to the stored tensors whose concatenation it is, and the number of experts (0: no experts)."""


def renamed_tensors(folder: Path, stored: Iterable[str]) -> Pieces:
    """Find the tensors of a folder that transformers renames, or concatenates to others, while it loads them.

    Args:
        folder: Folder of the model; its config.json names the family.
        stored: Names of the tensors in the files.

    Returns:
        The renamed and concatenated tensors; empty for a family that keeps all names.
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
    renamed: Pieces = {}
    for name, by_pattern in parts.items():
        keys = by_pattern.get(None)
        if keys is not None:
            if len(by_pattern) == len(keys) == 1 and keys != [name]:
                renamed[name] = (tuple(keys), 0)
            continue
        pieces = _concatenated(by_pattern, converters)
        if pieces is not None:
            renamed[name] = pieces
    return renamed


def _concatenated(by_pattern: dict[str | None, list[str]], converters: list[Any]) -> tuple[tuple[str, ...], int] | None:
    """Order the pieces of a tensor, and count its experts, if its converter only concatenates whole tensors.

    Two forms are supported: ``MergeModulelist`` stacks the experts, possibly after ``Concatenate`` along the rows of
    each expert (gate and up projection), and ``Concatenate`` alone joins single tensors by rows.

    Args:
        by_pattern: Names in the files by the pattern of the converter that they match.
        converters: The converters of the family.

    Returns:
        The pieces in the order in which they lie in memory, and the number of experts; None for any other converter.
    """
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
    """Look up transformers' renamings and converters of a family's causal LM."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, "")
    names = [name] if isinstance(name, str) else list(name)
    every = [change for key in (*names, model_type) for change in get_checkpoint_conversion_mapping(key) or ()]
    renamings = [change for change in every if isinstance(change, WeightRenaming)]
    return renamings, [change for change in every if isinstance(change, WeightConverter)]


def _model_type(folder: Path) -> str:
    """Read the model type from config.json; empty if there is none, an error that ``read_settings`` reports."""
    try:
        kind = read_json(folder / "config.json", dict[str, Any]).get("model_type")
    except (OSError, ValueError):
        return ""
    return kind if isinstance(kind, str) and re.fullmatch(r"[\w-]+", kind) else ""
