"""Checks of configuration values, and the message for a value that cannot be used."""

import dataclasses
from typing import Any

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
