"""Rates of the devices of a plan: looked up, read from a file, or measured on this machine."""

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from seft_dist.config import PlanConfig, SeftConfig
from seft_dist.kernels.adamw import AdamW
from seft_dist.kernels.packing import decode, encode
from seft_dist.kernels.sampled import sampled_grad_
from seft_dist.kernels.scatter import scatter_
from seft_dist.optim.delta import Columns, Support
from seft_dist.optim.linear import install
from seft_dist.optim.optimizer import SeftOptimizer
from seft_dist.optim.targets import find_targets
from seft_dist.planning.architectures import Shapes
from seft_dist.planning.hardware import Rates, gpu_rates, read_rates, write_rates
from seft_dist.planning.trace import trace
from seft_dist.sparsity.bitmask import pack

_REPEATS = 5
_TOKENS, _IN, _OUT = 512, 1024, 2816
"""A linear of a model of about a billion parameters, and tokens enough to keep it busy."""


def find_rates(config: PlanConfig) -> Rates:
    """Rates for a plan; a CPU's are measured now, which takes about a minute. Local.

    Raises:
        ValueError: No such device, or a file that holds no rates.
    """
    gpu = config.cluster.gpu
    if gpu == "cpu":
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


def measure(dtype: str) -> Rates:
    """Measure what this machine's CPU does with all of torch's threads, and its links with two ranks. Local.

    Args:
        dtype: Of the weights.
    """
    kind = getattr(torch, dtype)
    torch.manual_seed(0)
    x, y = torch.randn(_TOKENS, _IN, dtype=kind), torch.randn(_TOKENS, _OUT, dtype=kind)
    weight = torch.randn(_OUT, _IN, dtype=kind)
    flops = 2.0 * _TOKENS * _IN * _OUT
    big = torch.randn(1 << 22, dtype=kind)  # more than a cache holds
    return Rates(
        name="cpu",
        memory=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        reserve=_resident_bytes(),
        matmul=2 * flops / (_seconds(lambda: x @ weight.T) + _seconds(lambda: y @ weight)),
        attention=_attention(kind),
        dense=flops / _seconds(lambda: y.float().T @ x.float()),
        sampled=_sampled(x, y),
        moved=3 * big.nbytes / _seconds(lambda: big * big),
        call=_call(kind),
        decode=_decode(kind),
        update=_update(kind),
        evolve=_evolve(kind),
        intra=_intra(),
        inter=_intra(),
        host=5e9,
        overlaps=False,
        shared=True,
        measured=True,
    )


def _seconds(run: Callable[[], Any]) -> float:
    """Median of a few calls, after two that warm up."""
    run(), run()
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return sorted(times)[_REPEATS // 2]


def _resident_bytes() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * float(os.sysconf("SC_PAGE_SIZE"))


def _attention(kind: torch.dtype) -> float:
    heads, length, width = 16, _TOKENS, 64
    query, key, value = (torch.randn(1, heads, length, width, dtype=kind, requires_grad=True) for _ in range(3))

    def run() -> None:
        torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).sum().backward()

    return 3.5 * 4 * heads * width * (length * length / 2) / _seconds(run)


def _call(kind: torch.dtype) -> float:
    """Seconds of an operation without work to speak of, between the others of a model: dispatch, Python, autograd."""
    layers = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, **layers)
    ids = torch.zeros(1, 16, dtype=torch.long)
    kinds = Shapes.of(config, SeftConfig().targets).kinds
    calls = trace(config, kinds, kind, batch=1, length=ids.shape[1], checkpoint=False).calls
    model: Any = AutoModelForCausalLM.from_config(config, dtype=kind)
    model.requires_grad_(False)
    for target in find_targets(model).values():
        install(target)
    return _seconds(lambda: model(input_ids=ids, labels=ids).loss.backward()) / calls


def _sampled(x: Tensor, y: Tensor) -> float:
    positions = torch.randperm(_OUT * _IN)[: _OUT * _IN // 100].sort().values.to(torch.int32)
    support, out = Support((_OUT, _IN), [positions]), torch.zeros(len(positions))
    return (
        2.0
        * len(positions)
        * len(x)
        / _seconds(lambda: sampled_grad_(out, support.shape, support.crow, support.col, x, y))
    )


def _decode(kind: torch.dtype) -> float:
    weight = torch.randn(_OUT * _IN).masked_fill_(torch.rand(_OUT * _IN) < 0.6, 0).to(kind)
    bits = pack(weight != 0)
    values, out = encode(weight, bits), torch.empty_like(weight)
    return weight.nbytes / _seconds(lambda: decode(bits, values, out))


def _update(kind: torch.dtype) -> float:
    count, numel = 1 << 18, 1 << 24
    indices = torch.randperm(numel)[:count].sort().values
    columns, grad = Columns.grown(indices, torch.randn(count)), torch.randn(count)
    weight = torch.randn(numel).to(kind)
    rule = AdamW(1e-3, (0.9, 0.999), 1e-8, 0.0, True, oldest=1000)

    def run() -> None:
        new = columns.update_(grad, torch.tensor(1.0), torch.tensor(True), rule)
        scatter_([weight], [0], [columns.indices], new.to(kind))

    return _seconds(run) / count


def _evolve(kind: torch.dtype) -> float:
    width, seconds = 2048, []
    linear = nn.Linear(width, width, bias=False, dtype=kind)
    layer = nn.Sequential(linear)
    with torch.no_grad():
        linear.weight.masked_fill_(torch.rand(width, width) < 0.6, 0.0)
    seft = SeftOptimizer(layer, SeftConfig(interval=1))
    for _ in range(_REPEATS):
        layer(torch.randn(64, width, dtype=kind)).float().square().mean().backward()
        seft.step()
        seft.zero_grad()
        if seft.evolution is not None:
            seconds.append(seft.evolution.seconds)
    return sorted(seconds)[len(seconds) // 2] / width**2


def _intra() -> float:
    """Bytes a second that each of two ranks sends to the other."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_send, (folder,), nprocs=2)
        return float(Path(folder, "rate").read_text())


def _send(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    own = torch.randn(1 << 22)
    out = torch.empty(2 * own.numel())
    seconds = _seconds(lambda: dist.all_gather_single(out, own))
    if rank == 0:
        Path(folder, "rate").write_text(str(own.numel() * own.element_size() / seconds))
    dist.barrier()
    dist.destroy_process_group()
