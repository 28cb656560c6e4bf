"""Numbers and names as a reader wants them."""

import math
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import TypeVar

T = TypeVar("T")


def decimal(value: float | None, digits: int = 3) -> str:
    """Write a number with about so many significant digits, without an exponent where it can be read without."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-4:
        return f"{value:.{digits}g}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(places, 8)}f}"


def percent(share: float | None, digits: int = 2) -> str:
    """Write a share as a percentage."""
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def duration(seconds: float | None) -> str:
    """Write seconds as a person says them."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    if seconds < 60:
        return f"{decimal(seconds, 3)} s"
    minutes, hours = round(seconds / 60), int(seconds // 3600)
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{hours} h {minutes - 60 * hours} min" if minutes < 60 * (hours + 1) else f"{hours + 1} h 0 min"


def size(count: float | None) -> str:
    """Write a number of bytes with a decimal unit."""
    if count is None:
        return "-"
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{decimal(count, 3)} {unit}"
        count /= 1000
    return f"{decimal(count, 3)} TB"


def model_name(path: object) -> str:
    """Name a model by its path: the last part, with the one before where the last says nothing."""
    parts = [part for part in PurePosixPath(str(path)).parts if part not in ("/", ".")]
    if len(parts) > 1 and parts[-1] in ("model", "final", "latest"):
        return "/".join(parts[-2:])
    return parts[-1] if parts else str(path)


def join(texts: Sequence[str], last: str = "and") -> str:
    """Join words as in a sentence."""
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} {last} {texts[-1]}" if texts else ""


def plural(count: int, noun: str) -> str:
    """Write a number with its noun."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def spread_out(items: Sequence[T], most: int) -> list[T]:
    """Choose so many items at even distances, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
