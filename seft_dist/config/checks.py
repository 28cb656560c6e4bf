"""How a knob says that its value cannot be."""


def check(condition: bool, found: str, needed: str) -> None:
    """Refuse a value. Local.

    Raises:
        ValueError: The condition does not hold; says what was found and what is needed.
    """
    if not condition:
        raise ValueError(f"{found}: needs {needed}")
