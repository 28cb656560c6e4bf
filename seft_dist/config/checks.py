"""Checks of configuration values, and the message for a value that cannot be used."""

import dataclasses
import typing
from functools import cache
from typing import Any, Literal

LARGEST_COUNT = 2**31 - 1
"""Largest whole number that an option takes, in size: steps and ages are kept in 32 bits."""
LARGEST_SEED = 2**63 - 1
_SMALLEST, _LARGEST = 1e-30, 1e30
"""Smaller numbers would become 0 in the fp32 computations, and larger ones infinite; 0 itself is admitted."""


def check(condition: bool, found: str, needed: str) -> None:
    """Refuse a value.

    Args:
        condition: True for a value that can be used.
        found: The value with its name, for the message, e.g. "steps=0".
        needed: The values that can be used, for the message.

    Raises:
        ValueError: The condition does not hold; says what was found and what is needed.
    """
    if not condition:
        raise ValueError(f"{found}: needs {needed}")


def check_types(config: Any, prefix: str = "") -> None:
    """Refuse words and types that a field does not admit: Python itself takes any.

    Args:
        config: A dataclass of words, numbers, text and None.
        prefix: Prefix of its fields' names on the command line, e.g. "optim.".

    Raises:
        ValueError: Names the field, its value and what is needed.
    """
    for name, hint in _hints(config.__class__).items():
        value = getattr(config, name)
        kinds = typing.get_args(hint) if typing.get_origin(hint) not in (None, Literal, tuple) else (hint,)
        words = [repr(word) for kind in kinds for word in typing.get_args(kind) if typing.get_origin(kind) is Literal]
        admits = any(_admits(kind, value) for kind in kinds)
        check(admits, f"{prefix}{name}={value!r}", "one of " + ", ".join(words) if words else f"a value of type {hint}")


@cache
def _hints(config_class: type) -> dict[str, Any]:
    return typing.get_type_hints(config_class)


def _admits(kind: Any, value: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if typing.get_origin(kind) is not None:  # tuple[float, float], which Python 3.10 takes for a type
        return True
    return not isinstance(kind, type) or isinstance(value, kind)


def check_numbers(config: Any, prefix: str = "") -> None:
    """Refuse numbers that no computation can be done with, in the fields of a configuration dataclass.

    Dataclasses call it first in their ``__post_init__``, so that their own checks need not expect nan, for example.

    Args:
        config: The dataclass; those inside it check themselves.
        prefix: Prefix of its fields' names on the command line, e.g. "optim.".

    Raises:
        ValueError: A number is not finite, too large, or too small to be told from 0.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int):
                most = LARGEST_SEED if field.name == "seed" else LARGEST_COUNT
                check(
                    abs(number) <= most, f"{prefix}{field.name}={_short(number)}", f"a whole number of at most {most}"
                )
            elif isinstance(number, float):
                usable = number == 0 or _SMALLEST <= abs(number) <= _LARGEST  # false for nan, too
                needed = f"a finite number, 0 or from {_SMALLEST:g} to {_LARGEST:g} in size"
                check(usable, f"{prefix}{field.name}={value}", needed)


def _short(number: int) -> str:
    return str(number) if number.bit_length() < 256 else f"a number of {number.bit_length()} bits"
