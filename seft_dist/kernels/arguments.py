"""Checks of a compiled loop's arguments: the loop indexes memory and checks nothing itself."""


def expect(holds: bool, what: str) -> None:
    """Refuse arguments with which a loop would read or write outside its tensors.

    Not an ``assert``: those are left out under ``python -O``, and some of what is indexed comes from files.

    Args:
        holds: The condition.
        what: The condition in words, for the message.

    Raises:
        ValueError: It does not hold.
    """
    if not holds:
        raise ValueError(f"a kernel was given something else than it needs: {what}")
