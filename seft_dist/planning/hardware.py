"""Rates of devices and links, from vendors' data sheets times a stated share, or measured on this machine."""

import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from seft_dist.config import ClusterConfig
from seft_dist.files.reading import read_json
from seft_dist.files.writing import write_json


@dataclass(frozen=True)
class Gpu:
    """Numbers from the data sheet of a GPU. Peaks are those of dense products."""

    memory: float
    """Bytes."""
    bfloat16: float
    """Peak in FLOP/s."""
    float32: float
    """Peak in FLOP/s, without TF32, which torch does not use by default."""
    bandwidth: float
    """Bandwidth of the device's memory, bytes a second."""
    intra: float
    """Bandwidth from one device to the others of its node, one direction (NVLink), bytes a second."""
    inter: float
    """Bandwidth from a node of 8 devices to others, one direction (a network port for each device), bytes a second."""
    host: float
    """Bandwidth between the device and its node's memory, one direction (PCIe), bytes a second."""


GPUS = {
    "H100-80GB": Gpu(80e9, 989e12, 67e12, 3.35e12, 450e9, 400e9, 64e9),
    "H200-141GB": Gpu(141e9, 989e12, 67e12, 4.8e12, 450e9, 400e9, 64e9),
    "A100-80GB": Gpu(80e9, 312e12, 19.5e12, 2.0e12, 300e9, 200e9, 32e9),
    "A100-40GB": Gpu(40e9, 312e12, 19.5e12, 1.55e12, 300e9, 200e9, 32e9),
}
"""Data sheets of the SXM versions; peaks are without structured sparsity. This project was never run on any of them."""


@dataclass(frozen=True)
class Rates:
    """Rates of one rank. If the ranks of a node share one device (a CPU), they are the rates of the whole device."""

    name: str
    memory: float
    """Bytes of memory."""
    reserve: float
    """Bytes that are in use before the first tensor is allocated."""
    matmul: float
    """FLOP/s of dense products in the dtype of the weights."""
    attention: float
    """FLOP/s of attention kernels."""
    dense: float
    """FLOP/s of the products that compute a window's dense gradients: from operands of the weights' dtype to fp32."""
    sampled: float
    """FLOP/s of the forms that sample gradients, counting 2 for each delta and token; ``dense`` is the other form's."""
    moved: float | None
    """Bytes a second of elementwise operations; None: included in the utilization (MFU) of matmul."""
    call: float
    """Seconds of overhead of an operation of any size; 0 on GPUs, where it is included in the MFU of matmul."""
    decode: float
    """Bytes a second of dense weights that are decoded from packed ones."""
    update: float
    """Seconds for each own delta in an optimizer step."""
    evolve: float
    """Seconds for each own weight in an evolution."""
    intra: float
    """Bytes a second from one rank to the others of its node."""
    inter: float
    """Bytes a second from all ranks of a node together to other nodes."""
    host: float
    """Bytes a second between a rank and its node's memory."""
    overlaps: bool
    """Communication of weights overlaps with computation."""
    shared: bool
    """The ranks of a node share one device."""
    measured: bool
    """The rates were measured, not taken from a data sheet."""

    def per_rank(self, ranks: int) -> "Rates":
        """Divide the rates of a shared device among the ranks of a node; rates of a rank's own device do not change."""
        if not self.shared:
            return self
        faster = ("memory", "matmul", "attention", "dense", "sampled", "moved", "decode", "host")
        slower = ("update", "evolve")
        parts: dict[str, Any] = {key: getattr(self, key) / ranks for key in faster if getattr(self, key)}
        parts |= {key: getattr(self, key) * ranks for key in slower}
        return replace(self, **parts, intra=self.intra * 2 / max(2, ranks))  # the link was measured with two ranks


def gpu_rates(cluster: ClusterConfig, dtype: str, density: float) -> Rates:
    """Derive the rates of a device from its data sheet.

    Args:
        cluster: The device, and values that replace those of the data sheet.
        dtype: Dtype of the weights.
        density: Density of the deltas.

    Raises:
        ValueError: The device is not known.
    """
    if cluster.gpu not in GPUS:
        raise ValueError(
            f"cluster.gpu={cluster.gpu} is neither one of {', '.join(GPUS)}, cpu, nor a file of measured rates; for "
            "another device take the nearest and set cluster.memory_gb, .tflops, .intra_gb_s and .inter_gb_s"
        )
    gpu = GPUS[cluster.gpu]
    peak = cluster.tflops * 1e12 if cluster.tflops else getattr(gpu, dtype)
    return Rates(
        name=cluster.gpu,
        memory=(cluster.memory_gb * 1e9) if cluster.memory_gb else gpu.memory,
        reserve=1e9 * (2.0 if cluster.reserve_gb is None else cluster.reserve_gb),
        matmul=peak * cluster.mfu,
        attention=peak * cluster.mfu,
        dense=peak * cluster.mfu,  # as kernels.sampled.dense_grad: 16-bit operands stay so on tensor cores
        sampled=peak * cluster.mfu * density / cluster.sampled_share,
        moved=None,
        call=0.0,
        decode=gpu.bandwidth / 4,  # one kernel reads bits and values and writes each weight once; never run
        update=120 / gpu.bandwidth,  # bytes for each delta: every column is read and written a few times
        evolve=200 / gpu.bandwidth,  # bytes for each weight: keys of three rankings, each read twice, and the check
        intra=cluster.link_share * (cluster.intra_gb_s * 1e9 if cluster.intra_gb_s else gpu.intra),
        inter=cluster.link_share
        * (cluster.inter_gb_s * 1e9 if cluster.inter_gb_s else gpu.inter * cluster.gpus_per_node / 8),
        host=cluster.link_share * gpu.host,
        overlaps=True,
        shared=False,
        measured=False,
    )


def read_rates(file: str) -> dict[str, Rates]:
    """Read the rates for each dtype of weights from a file that ``write_rates`` wrote.

    Raises:
        ValueError: The file cannot be read, or does not hold rates.
    """
    try:
        content = read_json(Path(file), dict[str, dict[str, float | bool | str | None]])
        return {dtype: _checked(Rates(**content[dtype])) for dtype in ("bfloat16", "float32")}  # type: ignore[arg-type]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: {error}; needs a file written by seft plan --save_rates") from error


_MAY_BE_0 = ("call", "reserve")


def _checked(rates: Rates) -> Rates:
    """Return the rates, or raise a ValueError if a value has the wrong type or is not a positive, finite number."""
    for field in fields(Rates):
        value: Any = getattr(rates, field.name)
        if field.type in (str, bool, "str", "bool"):
            fits = isinstance(value, str if field.type in (str, "str") else bool)
        elif value is None:
            fits = field.name == "moved"
        else:
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            fits = number and (1e-30 <= value <= 1e30 or (value == 0 and field.name in _MAY_BE_0))
        if not fits:
            raise ValueError(f"{field.name} is {value!r}")
    return rates


def write_rates(file: str, rates: dict[str, Rates]) -> None:
    """Write measured rates for each dtype of weights, for later plans."""
    write_json(Path(file), {dtype: asdict(values) for dtype, values in rates.items()})
