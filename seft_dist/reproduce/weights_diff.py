"""Comparison of the final weights of two runs, value by value, from their exported files, a piece at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seft_dist.io.packed import open_weights
from seft_dist.io.weight_files import SafetensorError, safe_open
from seft_dist.io.weights import Weights
from seft_dist.kernels.fingerprint import hash_of_weight
from seft_dist.reproduce.promise import WEIGHT_ABSOLUTE, WEIGHT_RELATIVE
from seft_dist.training.fingerprint import as_hex

_PIECE = 1 << 22
"""Number of values of each model that are in memory at a time."""
_INTS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class WeightDifference:
    """Differences between two tensors of the same name."""

    name: str
    numel: int
    different: int = 0
    """Number of values that differ in any bit."""
    outside: int = 0
    """Number of values that differ by more than docs/numerics.md allows."""
    zeros_moved: int = 0
    """Number of positions that are 0 in only one of the two tensors."""
    largest: float = 0.0
    """Largest absolute difference."""
    at: int = 0
    """Flat position of the largest difference."""


def compare_weights(first: Path, second: Path) -> list[WeightDifference]:
    """Compare two exported models.

    Args:
        first: Folder of a model.
        second: Folder of another model.

    Returns:
        The differences of each tensor, in the first model's order.

    Raises:
        ValueError: A folder cannot be read, or they do not hold the same tensors.
    """
    one, two = open_weights(first), open_weights(second)
    unmatched = sorted(one.tensors.keys() ^ two.tensors.keys())
    if unmatched:
        raise ValueError(f"{unmatched[0]} is only in one of {first} and {second} ({len(unmatched)} such tensors)")
    rows = []
    for name in one.tensors:
        ours, theirs = one.tensors[name], two.tensors[name]
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            raise ValueError(
                f"{name} is {ours.dtype} {ours.shape} in {first}, {theirs.dtype} {theirs.shape} in {second}"
            )
        row = WeightDifference(name, ours.numel)
        for start in range(0, ours.numel, _PIECE):
            stop = min(start + _PIECE, ours.numel)
            _add_piece(row, one.read(name, start, stop), two.read(name, start, stop), start)
        rows.append(row)
    return rows


def _add_piece(row: WeightDifference, first: Tensor, second: Tensor, start: int) -> None:
    """Add the differences of a piece that begins at flat position ``start``; bits are compared, so NaN equals NaN."""
    bits = _INTS[first.element_size()]
    unlike = first.view(bits) != second.view(bits)
    count = int(unlike.sum())
    if not count:
        return
    row.different += count
    row.zeros_moved += int(((first == 0) != (second == 0)).sum())
    a, b = first.double(), second.double()
    distances = (a - b).abs().nan_to_num(nan=float("inf"))
    row.outside += int((distances > WEIGHT_ABSOLUTE + WEIGHT_RELATIVE * torch.maximum(a.abs(), b.abs())).sum())
    largest, at = distances.max(0)
    if float(largest) > row.largest or row.different == count:
        row.largest, row.at = float(largest), start + int(at if float(largest) else unlike.nonzero()[0])


def different_tensors(first: Path, second: Path) -> list[str]:
    """Return the names of the tensors that differ in any bit between two safetensors files; empty if formats differ.

    The files cannot be compared as a whole, because the library writes the entries of the header in any order.
    """
    try:
        with safe_open(first, framework="pt") as one, safe_open(second, framework="pt") as two:
            if (one.metadata() or {}).get("format") != (two.metadata() or {}).get("format"):
                return []
            names = set(one.keys()), set(two.keys())
            unmatched = names[0] ^ names[1]
            return sorted(unmatched | {name for name in names[0] & names[1] if not _same(one, two, name)})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{first} or {second} cannot be read: {error}") from error


def _same(one: Any, two: Any, name: str) -> bool:
    ours, theirs = one.get_tensor(name), two.get_tensor(name)
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    return torch.equal(ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))


def changed_since_export(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Return the targets of an exported model whose hashes are not those that its run recorded at the end.

    Args:
        folder: Folder of the model.
        manifest: Manifest of its run.
    """
    weights, changed = open_weights(folder), []
    for name, (_, _, expected) in manifest["final"]["layers"].items():
        key, total = weights.find(f"{name}.weight") or weights.find(name), 0  # fused experts have the name itself
        if key is None:
            changed.append(name)
            continue
        for start, piece in _pieces(weights, key):
            total += int(hash_of_weight(piece, start))
        if as_hex(total) != expected:
            changed.append(name)
    return changed


def _pieces(weights: Weights, name: str) -> Iterator[tuple[int, Tensor]]:
    numel = weights.info(name).numel
    for start in range(0, numel, _PIECE):
        yield start, weights.read(name, start, min(start + _PIECE, numel))
