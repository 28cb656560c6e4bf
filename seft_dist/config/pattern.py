"""N:M patterns: at most N of M consecutive inputs of a row are active, e.g. "2:4"."""

_LARGEST_GROUP = 64
AUTO = "auto"
"""Nobody has said whether there is a pattern: a model that has one is refused."""


def pattern_sizes(pattern: str) -> tuple[int, int]:
    """Return N and M of a pattern.

    Args:
        pattern: "N:M".

    Raises:
        ValueError: It is not one.
    """
    parts = pattern.split(":")
    if len(parts) == 2 and all(part.isascii() and part.isdigit() for part in parts):
        most, size = map(int, parts)
        if 1 <= most < size <= _LARGEST_GROUP:
            return most, size
    raise ValueError(
        f'pattern={pattern}: needs "N:M" with 1 <= N < M <= {_LARGEST_GROUP}, e.g. "2:4" (in a YAML file with '
        "quotation marks: YAML reads 2:4 as a number)"
    )


def check_kept(pattern: str | None, scope: str, adapt: str, reactivation: float) -> None:
    """Check that a method's options can keep a pattern.

    Args:
        pattern: "N:M", "auto" or None.
        scope: Scope in which Adapt ranks.
        adapt: Its criterion.
        reactivation: Largest share of grown entries that were pruned.

    Raises:
        ValueError: They cannot.
    """
    if pattern is None or pattern == AUTO:
        return
    pattern_sizes(pattern)
    if scope == "global":
        raise ValueError(
            f'scope=global with pattern={pattern}: needs scope "layer"; each group keeps its number of active '
            "positions, so none can move between layers"
        )
    if adapt == "none" and reactivation:
        raise ValueError(
            f"adapt=none with pattern={pattern}: needs another adapt criterion, or reactivation 0; what is reactivated "
            "and not paid for breaks the pattern"
        )
