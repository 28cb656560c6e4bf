"""Rates for a plan: from a data sheet, from a file, or measured on this machine's CPU or one of its GPUs."""

import dataclasses
import functools
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from seft_dist.backends.group import all_gather_single
from seft_dist.config import ClusterConfig, PlanConfig, SeftConfig
from seft_dist.kernels.adamw import AdamW
from seft_dist.kernels.choice import sampling_forms
from seft_dist.kernels.packing import decode, encode
from seft_dist.kernels.sampled import FORMS, dense_grad
from seft_dist.kernels.scatter import scatter_
from seft_dist.modules.targets import find_targets
from seft_dist.optim.delta import Columns, Support
from seft_dist.optim.install import install
from seft_dist.optim.optimizer import SeftOptimizer
from seft_dist.planning.architectures import ModelShapes
from seft_dist.planning.hardware import Rates, gpu_rates, read_rates, write_rates
from seft_dist.planning.model_trace import trace_pass
from seft_dist.sparsity.bitmask import pack

_REPEATS = 5
"""Number of repetitions of a measurement, of which the median is taken."""
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class ProblemSizes:
    """Sizes of the operations with which the rates of a device are measured."""

    linear: tuple[int, int, int]
    """Number of tokens, inputs and outputs of a linear; enough to keep the device busy."""
    head: int
    """Width of an attention head."""
    numbers: int
    """Number of values in an elementwise operation; more than a cache holds."""
    deltas: int
    """Number of deltas in an update."""


SIZES = {
    "cpu": ProblemSizes((512, 1024, 2816), 64, 1 << 22, 1 << 18),
    "cuda": ProblemSizes((2048, 4096, 11008), 128, 1 << 28, 1 << 24),
}
"""Sizes for each type of device, as in models of about 1 and 7 billion parameters."""


def find_rates(config: PlanConfig) -> Rates:
    """Find the rates for a plan. Those of "cpu" and "cuda" are measured, which takes about a minute.

    Args:
        config: The plan; ``cluster.gpu`` names a device or a file.

    Raises:
        ValueError: The device is not known, or the file does not hold rates.
    """
    gpu = config.cluster.gpu
    if gpu in ("cpu", "cuda"):
        measure = measure_cpu if gpu == "cpu" else measure_gpu
        measured = {dtype: measure(dtype) for dtype in ("float32", "bfloat16")}
        if config.save_rates:
            write_rates(config.save_rates, measured)
        rates = measured[config.dtype]
    elif Path(gpu).is_file():
        rates = read_rates(gpu)[config.dtype]
    else:
        return gpu_rates(config.cluster, config.dtype, config.seft.density)
    cluster = config.cluster
    return dataclasses.replace(
        rates,
        memory=1e9 * cluster.memory_gb if cluster.memory_gb else rates.memory,
        reserve=rates.reserve if cluster.reserve_gb is None else 1e9 * cluster.reserve_gb,
    )


def measure_cpu(dtype: str) -> Rates:
    """Measure the rates of this machine's CPU with all of torch's threads, and of the link between two ranks.

    Args:
        dtype: Dtype of the weights.
    """
    intra = _link_rate()
    return Rates(
        **measure_computation(dtype, _CPU),
        name="cpu",
        memory=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        reserve=_resident_bytes(),
        call=_call_overhead(getattr(torch, dtype)),
        intra=intra,
        inter=intra,
        host=5e9,
        overlaps=False,
        shared=True,
        measured=True,
    )


def measure_gpu(dtype: str, device: torch.device | None = None) -> Rates:
    """Measure the rates of one CUDA device. Those of the links between devices are from the data sheet of an H100.

    Args:
        dtype: Dtype of the weights.
        device: The device; None: the current one.

    Raises:
        ValueError: There is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            "cluster.gpu=cuda: torch sees no CUDA device here; name a kind of device, or use cluster.gpu cpu"
        )
    device = device or torch.device("cuda", torch.cuda.current_device())
    rates = measure_computation(dtype, device)
    on_host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    on_device = torch.empty_like(on_host, device=device)
    host = on_host.nbytes / _seconds(lambda: on_device.copy_(on_host, non_blocking=True))
    free, memory = torch.cuda.mem_get_info(device)
    links = gpu_rates(ClusterConfig(), dtype, 0.01)
    return Rates(
        **rates,
        name=torch.cuda.get_device_name(device),
        memory=float(memory),
        reserve=float(memory - free - torch.cuda.memory_reserved(device)),  # used by the context and libraries
        call=0.0,  # operations are queued while the device computes
        intra=links.intra,
        inter=links.inter,
        host=host,
        overlaps=True,
        shared=False,
        measured=True,
    )


def measure_computation(dtype: str, device: torch.device, sizes: ProblemSizes | None = None) -> dict[str, float]:
    """Measure those fields of ``Rates`` that are measured in the same way on every type of device.

    Args:
        dtype: Dtype of the weights.
        device: A CPU or a CUDA device.
        sizes: Sizes of the operations; None: those for the type of device.
    """
    torch.manual_seed(0)
    sizes = sizes or SIZES[device.type]
    tokens, inputs, outputs = sizes.linear
    on: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device}
    x, y = torch.randn(tokens, inputs, **on), torch.randn(tokens, outputs, **on)
    weight = torch.randn(outputs, inputs, **on)
    flops = 2.0 * tokens * inputs * outputs
    big = torch.randn(sizes.numbers, **on)
    return {
        "matmul": 2 * flops / (_seconds(lambda: x @ weight.T) + _seconds(lambda: y @ weight)),
        "attention": _attention_rate(sizes, on),
        "dense": flops / _seconds(lambda: dense_grad(x, y)),
        "sampled": _sampled_rate(x, y),
        "moved": 3 * big.nbytes / _seconds(lambda: big * big),
        "decode": _decode_rate(weight.view(-1)),
        "update": _update_seconds(sizes.deltas, **on),
        "evolve": _evolution_seconds(2 * inputs, **on),
    }


def _seconds(run: Callable[[], Any]) -> float:
    """Median duration of a few calls, each waited for, after two calls for warming up."""
    run(), run()
    times = []
    for _ in range(_REPEATS):
        _synchronize()
        began = time.perf_counter()
        run()
        _synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times)[_REPEATS // 2]


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _resident_bytes() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * float(os.sysconf("SC_PAGE_SIZE"))


def _attention_rate(sizes: ProblemSizes, on: dict[str, Any]) -> float:
    """FLOP/s of causal attention, forward and backward."""
    length, inputs, _ = sizes.linear
    heads = inputs // sizes.head
    query, key, value = (torch.randn(1, heads, length, sizes.head, **on, requires_grad=True) for _ in range(3))

    def run() -> None:
        torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).sum().backward()

    return 3.5 * 4 * heads * sizes.head * (length * length / 2) / _seconds(run)


def _call_overhead(kind: torch.dtype) -> float:
    """Seconds of an operation on tiny tensors, averaged over a model's pass: dispatch, Python and autograd."""
    layers = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, **layers)
    ids = torch.zeros(1, 16, dtype=torch.long)
    kinds = ModelShapes.of(config, SeftConfig().targets).kinds
    calls = trace_pass(config, kinds, kind, batch=1, length=ids.shape[1], checkpoint=False).calls
    model: Any = AutoModelForCausalLM.from_config(config, dtype=kind)
    model.requires_grad_(False)
    for target in find_targets(model).values():
        install(target)
    return _seconds(lambda: model(input_ids=ids, labels=ids).loss.backward()) / calls


def _sampled_rate(x: Tensor, y: Tensor) -> float:
    """FLOP/s of the fastest form that samples, at a density of 1 %; of the dense form where no other can be had."""
    inputs, outputs, device = x.shape[1], y.shape[1], x.device
    positions = torch.randperm(outputs * inputs)[: outputs * inputs // 100].sort().values.to(device, torch.int32)
    support, out = Support((outputs, inputs), [positions]), torch.zeros(len(positions), device=device)
    given = (out, support.shape, support.crow, support.col, x, y, True, support.bounds)
    forms = sampling_forms(device, len(positions), x.dtype) or ["dense"]
    seconds = min(_seconds(functools.partial(FORMS[form], *given)) for form in forms)
    return 2.0 * len(positions) * len(x) / seconds


def _decode_rate(weight: Tensor) -> float:
    """Bytes a second of dense weights that are decoded from packed ones with 60 % zeros."""
    weight = weight.masked_fill(torch.rand(weight.shape, device=weight.device) < 0.6, 0)
    bits = pack(weight != 0)
    values, out = encode(weight, bits), torch.empty_like(weight)
    return weight.nbytes / _seconds(lambda: decode(bits, values, out))


def _update_seconds(count: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds for each delta of an optimizer step: the update, and the write into the weight."""
    numel = 64 * count
    # One position out of each 64: drawing from a permutation of all positions would take longer than the measurement
    indices = torch.arange(0, numel, 64, device=device) + torch.randint(0, 64, (count,), device=device)
    columns, grad = Columns.grown(indices.int(), torch.randn(count, device=device)), torch.randn(count, device=device)
    weight = torch.zeros(numel, dtype=dtype, device=device)
    rule = AdamW(1e-3, (0.9, 0.999), 1e-8, 0.0, True, oldest=1000)
    scale, is_finite = torch.tensor(1.0, device=device), torch.tensor(True, device=device)

    def run() -> None:
        new = columns.update_(grad, scale, is_finite, rule)
        scatter_([weight], [0], [columns.indices], new.to(dtype))

    return _seconds(run) / count


def _evolution_seconds(width: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds for each weight of an evolution, on one square linear with 60 % zeros."""
    seconds = []
    linear = nn.Linear(width, width, bias=False, dtype=dtype, device=device)
    layer = nn.Sequential(linear)
    with torch.no_grad():
        linear.weight.masked_fill_(torch.rand(width, width, device=device) < 0.6, 0.0)
    seft = SeftOptimizer(layer, SeftConfig(interval=1))
    for _ in range(_REPEATS):
        layer(torch.randn(64, width, dtype=dtype, device=device)).float().square().mean().backward()
        seft.step()
        seft.zero_grad()
        if seft.evolution is not None:
            seconds.append(seft.evolution.seconds)
    return sorted(seconds)[len(seconds) // 2] / width**2


def _link_rate() -> float:
    """Bytes a second that each of two processes on this machine sends to the other."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_measure_gather, (folder,), nprocs=2)
        return float(Path(folder, "rate").read_text())


def _measure_gather(rank: int, folder: str) -> None:
    """Time an all-gather between two processes; the first one writes the rate to a file. Collective over both."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    own = torch.randn(1 << 22)
    out = torch.empty(2 * own.numel())
    seconds = _seconds(lambda: all_gather_single(out, own))
    if rank == 0:
        Path(folder, "rate").write_text(str(own.numel() * own.element_size() / seconds))
    dist.barrier()
    dist.destroy_process_group()
