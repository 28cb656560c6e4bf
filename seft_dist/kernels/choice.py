"""The choice between the forms of the sampled gradient: by density on a CPU, by times on CUDA.

The times are measured on a card by ``benchmarks/gpu.py --parts sampled``, and hold for cards of the same name. Without
a table for the card at hand, operations and bytes are counted and divided by the rates of an H100, which are assumed.
"""

import functools
import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from seft_dist.kernels.build import library, triton_kernels
from seft_dist.sparsity.partition import position_dtype

Form = Literal["c++", "sampled_addmm", "dense", "triton"]

TABLE = Path(__file__).with_name("sampled_times.json")
"""File with the times of each card by its name; there may be none. ``use_table`` names another."""
_DENSE_ABOVE = {"c++": 0.4, "sampled_addmm": 0.1}
"""Density from which on a dense product is faster on a CPU."""
_FLOPS = {2: 500e12, 4: 45e12}
"""FLOP/s of a dense product by bytes of a number: bf16 and fp16 on tensor cores, fp32 without TF32. Assumed."""
_CACHE, _MEMORY = 5e12, 3e12
"""Bytes a second from an H100's second cache, where gathered operands lie, and from its memory. Assumed."""

Launch = tuple[int, int, int]
"""Settings of the Triton kernel: entries of a row and tokens that a program takes at a time, and its warps."""
DEFAULT_LAUNCH: Launch = (16, 128, 4)


@dataclass(frozen=True)
class Measured:
    """Seconds of each form for one weight, density and number of tokens."""

    dtype: str
    """Dtype of the operands as torch writes it, e.g. "bfloat16"."""
    tokens: int
    rows: int
    columns: int
    density: float
    seconds: dict[str, float]
    """Seconds of each form."""

    def distance(self, tokens: int, numel: int, density: float) -> float:
        """Return how far another problem is away, in powers of e of tokens, weights and density."""
        pairs = ((self.tokens, tokens), (self.rows * self.columns, numel), (self.density, density))
        return sum(abs(math.log(mine / theirs)) for mine, theirs in pairs)


def choose(
    shape: tuple[int, int],
    entries: int,
    device: torch.device,
    tokens: int = 2048,
    dtype: torch.dtype = torch.bfloat16,
) -> Form:
    """Choose the fastest form. Never waits for the device.

    Args:
        shape: [out, in].
        entries: Positions to sample, at least one.
        device: Device of the operands.
        tokens: Rows of the operands.
        dtype: Dtype of the operands.
    """
    density = entries / (shape[0] * shape[1])
    if device.type == "cuda":
        return _choose_on_cuda(device, shape, entries, tokens, dtype)
    forms = sampling_forms(device, entries, dtype)
    return next((form for form in forms if density < _DENSE_ABOVE[form]), "dense")


def sampling_forms(device: torch.device, entries: int, dtype: torch.dtype) -> list[Form]:
    """Return the forms that can be had on a device, beside the dense one. On a CPU it is at most one.

    Args:
        device: Device of the operands.
        entries: Positions to sample.
        dtype: Dtype of the operands.
    """
    if device.type == "cpu":
        if library() is not None:
            return ["c++"]
        return ["sampled_addmm"] if torch.backends.mkl.is_available() and _is_one_type(entries) else []
    if device.type != "cuda":
        return []
    forms: list[Form] = [] if triton_kernels(device) is None else ["triton"]
    if dtype == torch.float32 and _is_one_type(entries):  # cuSPARSE has no bf16 and no fp16 for it
        forms.append("sampled_addmm")
    return forms


def _is_one_type(entries: int) -> bool:
    """Tell whether row offsets have the same type as columns, which sampled_addmm needs."""
    return position_dtype(entries) == torch.int32


def card_name(device: torch.device) -> str:
    """Return the name of a CUDA device as its driver gives it."""
    return _name_of(device.index) if torch.cuda.is_available() else "unknown"


@functools.cache
def _name_of(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


@functools.lru_cache(maxsize=8192)
def _choose_on_cuda(
    device: torch.device, shape: tuple[int, int], entries: int, tokens: int, dtype: torch.dtype
) -> Form:
    usable = ["dense", *sampling_forms(device, entries, dtype)]
    numel = shape[0] * shape[1]
    kind = str(dtype).removeprefix("torch.")
    rows = [row for row in measured_times(card_name(device))[0] if row.dtype == kind and set(row.seconds) >= {"dense"}]
    if rows:
        seconds = min(rows, key=lambda row: row.distance(tokens, numel, entries / numel)).seconds
    else:
        seconds = estimate(shape, entries, tokens, dtype.itemsize)
    return min((form for form in usable if form in seconds), key=lambda form: seconds[form])


def estimate(shape: tuple[int, int], entries: int, tokens: int, itemsize: int) -> dict[str, float]:
    """Estimate the seconds of the forms on CUDA, by counting.

    A dense product of T tokens for N weights takes 2 T N operations, and its result is written and read back in fp32.
    The Triton kernel reads T numbers of the input for each entry and T of the output's gradient for each row, from the
    cache; before that both are transposed.

    Args:
        shape: [out, in].
        entries: Positions to sample.
        tokens: Rows of the operands.
        itemsize: Bytes of an operand's number.
    """
    rows, columns = shape
    flops = _FLOPS[2 if itemsize == 2 else 4]
    return {
        "dense": 2 * tokens * rows * columns / flops + 8 * rows * columns / _MEMORY,
        "triton": itemsize * tokens * ((entries + min(entries, rows)) / _CACHE + 2 * (rows + columns) / _MEMORY),
    }


def use_table(file: Path) -> None:
    """Choose by the times in another file from now on, e.g. where the folder of this package cannot be written.

    Args:
        file: A file that ``benchmarks/gpu.py --parts sampled`` has written.
    """
    global TABLE
    TABLE = file
    measured_times.cache_clear()
    _choose_on_cuda.cache_clear()


def describe_choice(device: torch.device) -> str:
    """Say what the choice on a device goes by, e.g. "the times in sampled_times.json"."""
    if device.type != "cuda":
        return "density (the choice of a CPU)"
    measured = bool(measured_times(card_name(device))[0])
    return f"the times in {TABLE}" if measured else f"counting ({TABLE} has no times of this card)"


def measured_launch(device: torch.device) -> Launch:
    """Return the launch that was fastest when a card's table was made, else ``DEFAULT_LAUNCH``."""
    return measured_times(card_name(device))[1] if device.type == "cuda" else DEFAULT_LAUNCH


@functools.cache
def measured_times(card: str) -> tuple[list[Measured], Launch]:
    """Return the times of a card and its best launch; no times and the default where no table has them.

    A table that cannot be used is named in a warning and otherwise left alone: results do not depend on it.
    """
    if not TABLE.is_file():
        return [], DEFAULT_LAUNCH
    try:
        content = json.loads(TABLE.read_text(encoding="utf-8")).get(card)
        return ([], DEFAULT_LAUNCH) if content is None else _check(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"{TABLE} cannot be used ({type(error).__name__}: {error}), forms of the sampled gradient are chosen by "
            "counting; make it again with benchmarks/gpu.py --parts sampled",
            stacklevel=2,
        )
        return [], DEFAULT_LAUNCH


def _check(content: Any) -> tuple[list[Measured], Launch]:
    launch = tuple(map(int, content["launch"]))
    if len(launch) != 3 or any(value < 1 or value & value - 1 for value in launch):
        raise ValueError(f"launch is {content['launch']}, needs three powers of 2")
    rows = []
    for row in content["rows"]:
        one = Measured(**row)
        numbers = [one.tokens, one.rows, one.columns, one.density, *one.seconds.values()]
        if not all(isinstance(value, int | float) and 0 < value < math.inf for value in numbers):
            raise ValueError(f"a row holds {numbers}, needs numbers above 0")
        rows.append(one)
    return rows, launch
