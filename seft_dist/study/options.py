"""Options as a study's YAML has them: by dotted names or nested, and as words of a command line."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any


def flatten(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return options by their dotted names, whether they were written so or nested.

    Args:
        options: {"optim.lr": 1} and {"optim": {"lr": 1}} are the same.
        name: Name of their group, for messages.

    Raises:
        ValueError: An option is there twice.
    """
    flat: dict[str, Any] = {}
    for key, value in options.items():
        inner = value if isinstance(value, Mapping) else {"": value}
        for end, item in (flatten(inner, name) if isinstance(value, Mapping) else inner).items():
            full = f"{key}.{end}" if end else str(key)
            if full in flat:
                raise ValueError(f"{name} has {full} twice: needs it once, as {full} or nested")
            flat[full] = item
    return flat


def options_of_group(options: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the options of a group, e.g. "data", without its name."""
    return {key[len(prefix) + 1 :]: value for key, value in options.items() if key.startswith(f"{prefix}.")}


def changed_options(config: Any, prefix: str) -> dict[str, Any]:
    """Return the options of a configuration that differ from their defaults.

    Args:
        config: A dataclass of ``seft_dist.config`` without others inside.
        prefix: Prefix of its fields' names, e.g. "data.".
    """
    fields = [(field.name, getattr(config, field.name), field.default) for field in dataclasses.fields(config)]
    return {f"{prefix}{name}": value for name, value, default in fields if value != default}


_NEW_DATA_OPTIONS = {"mix": None, "holdout_share": 0.0, "separate": False}
"""Options of data that earlier versions did not have, with the values that change nothing."""


def without_unused_options(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of data that say what its tokens are, by which a study knows its results again.

    Options that came later are left out as long as they change nothing, so that earlier studies go on.
    """
    return {key: value for key, value in data.items() if key != "num_proc" and _NEW_DATA_OPTIONS.get(key, ...) != value}


def arguments(options: Mapping[str, Any]) -> list[str]:
    """Write options as arguments of a command line, one each."""
    return [f"--{key}={as_text(value)}" for key, value in options.items()]


def as_text(value: Any) -> str:
    """Write a value as a command line has it."""
    return value if isinstance(value, str) else json.dumps(value)
