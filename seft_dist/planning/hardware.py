"""What devices and links can do: vendors' data sheets times a stated share, or rates measured on this machine."""

import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from seft_dist.config import ClusterConfig
from seft_dist.files.reading import read_json
from seft_dist.files.writing import write_json


@dataclass(frozen=True)
class Gpu:
    """Numbers of a data sheet: dense peaks in FLOP/s, bytes, bytes a second."""

    memory: float
    bfloat16: float
    float32: float
    """Without TF32, which torch leaves off."""
    bandwidth: float
    """Of the device's memory."""
    intra: float
    """Of one device to the others of its node, one direction (NVLink)."""
    inter: float
    """Of one node of 8 to others, one direction (one network port for each device)."""
    host: float
    """Between the device and its node's memory, one direction (PCIe)."""


GPUS = {
    "H100-80GB": Gpu(80e9, 989e12, 67e12, 3.35e12, 450e9, 400e9, 64e9),
    "H200-141GB": Gpu(141e9, 989e12, 67e12, 4.8e12, 450e9, 400e9, 64e9),
    "A100-80GB": Gpu(80e9, 312e12, 19.5e12, 2.0e12, 300e9, 200e9, 32e9),
    "A100-40GB": Gpu(40e9, 312e12, 19.5e12, 1.55e12, 300e9, 200e9, 32e9),
}
"""SXM versions; peaks without structured sparsity. Nothing in this project was ever run on one of them."""


@dataclass(frozen=True)
class Rates:
    """What one rank has to itself: FLOP/s, bytes a second, seconds for each weight. Ranks on one CPU share the machine's."""

    name: str
    memory: float
    """Bytes of a rank."""
    reserve: float
    """Bytes gone before the first tensor."""
    matmul: float
    """FLOP/s of dense products in the weights' type."""
    attention: float
    dense: float
    """FLOP/s of the fp32 products of a window's dense gradients."""
    sampled: float
    """FLOP/s of sampled gradients, 2 for each delta and token."""
    moved: float | None
    """Bytes a second of elementwise operations; None: they are in the share (MFU) of matmul."""
    call: float
    """Seconds that an operation takes whatever its size; on GPUs in the share (MFU) of matmul."""
    decode: float
    """Dense bytes a second made of packed weights."""
    update: float
    """Seconds for each own delta of an optimizer step."""
    evolve: float
    """Seconds for each own weight of an evolution."""
    intra: float
    """Bytes a second between ranks of a node, one rank's."""
    inter: float
    """Bytes a second between nodes, all ranks of a node together."""
    host: float
    """Bytes a second between a rank and its node's memory."""
    overlaps: bool
    """Whether gathering weights hides behind computing."""
    shared: bool
    """Whether the ranks of a node share one device, whose rates these are."""
    measured: bool

    def of_rank(self, ranks: int) -> "Rates":
        """What one of several ranks on a node has."""
        if not self.shared:
            return self
        faster = ("memory", "matmul", "attention", "dense", "sampled", "moved", "decode", "host")
        slower = ("update", "evolve")
        parts: dict[str, Any] = {key: getattr(self, key) / ranks for key in faster if getattr(self, key)}
        parts |= {key: getattr(self, key) * ranks for key in slower}
        return replace(self, **parts, intra=self.intra * 2 / max(2, ranks))  # measured with two


def gpu_rates(cluster: ClusterConfig, dtype: str, density: float) -> Rates:
    """Rates of a device by its data sheet.

    Args:
        cluster: Says which, and what differs from the data sheet.
        dtype: Of the weights.
        density: Of the deltas.

    Raises:
        ValueError: No such device.
    """
    if cluster.gpu not in GPUS:
        raise ValueError(
            f"cluster.gpu={cluster.gpu} is neither one of {', '.join(GPUS)}, cpu, nor a file of measured rates; for another "
            "device take the nearest and set cluster.memory_gb, .tflops, .intra_gb_s and .inter_gb_s"
        )
    gpu = GPUS[cluster.gpu]
    peak = cluster.tflops * 1e12 if cluster.tflops else getattr(gpu, dtype)
    return Rates(
        name=cluster.gpu,
        memory=(cluster.memory_gb * 1e9) if cluster.memory_gb else gpu.memory,
        reserve=1e9 * (2.0 if cluster.reserve_gb is None else cluster.reserve_gb),
        matmul=peak * cluster.mfu,
        attention=peak * cluster.mfu,
        dense=gpu.float32 * cluster.mfu,
        sampled=peak * cluster.mfu * density / cluster.sampled_share,
        moved=None,
        call=0.0,
        decode=gpu.bandwidth / 4,  # one kernel that reads bits and values and writes each weight once; never run
        update=120 / gpu.bandwidth,  # every column read and written a few times
        evolve=200 / gpu.bandwidth,  # keys of three rankings, each twice, and the check
        intra=cluster.link_share * (cluster.intra_gb_s * 1e9 if cluster.intra_gb_s else gpu.intra),
        inter=cluster.link_share
        * (cluster.inter_gb_s * 1e9 if cluster.inter_gb_s else gpu.inter * cluster.gpus_per_node / 8),
        host=cluster.link_share * gpu.host,
        overlaps=True,
        shared=False,
        measured=False,
    )


def read_rates(file: str) -> dict[str, Rates]:
    """Rates by type of weights, from a file that ``write_rates`` wrote.

    Raises:
        ValueError: It is not such a file.
    """
    try:
        content = read_json(Path(file), dict[str, dict[str, float | bool | str | None]])
        return {dtype: _checked(Rates(**content[dtype])) for dtype in ("bfloat16", "float32")}  # type: ignore[arg-type]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: {error}; needs a file written by launch/plan.py --save_rates") from error


_MAY_BE_0 = ("call", "reserve")


def _checked(rates: Rates) -> Rates:
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
    """Keep measured rates of each type of weights for later plans."""
    write_json(Path(file), {dtype: asdict(found) for dtype, found in rates.items()})
