"""Checks of configuration values, and the message for a value that cannot be used."""

import dataclasses
from typing import Any

LARGEST_COUNT = 2**31 - 1
"""Largest whole number that an option takes, in size: steps and ages are kept in 32 bits."""
LARGEST_SEED = 2**63 - 1
_SMALLEST, _LARGEST = 1e-30, 1e30
"""Numbers outside, but for 0, become 0 or infinite in fp32 sooner or later."""


def check(condition: bool, found: str, needed: str) -> None:
    """Refuse a value.

    Raises:
        ValueError: The condition does not hold; says what was found and what is needed.
    """
    if not condition:
        raise ValueError(f"{found}: needs {needed}")


def check_numbers(config: Any, prefix: str = "") -> None:
    """Refuse numbers of a configuration dataclass that no computation can be done with; call it first in its check.

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
