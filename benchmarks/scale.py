"""Growth of memory, traffic and evolution time with ranks and with the model; figures for docs/performance.md.

    python benchmarks/scale.py ranks --output /tmp/scale/ranks.json          1, 2, 4, 8 gloo ranks, one model
    python benchmarks/scale.py model --output /tmp/scale/model.json          4 gloo ranks, growing models
    python benchmarks/scale.py evolution --output /tmp/scale/evolution.json  one process, the first support in bf16
    python benchmarks/scale.py plot /tmp/scale --figures docs/figures

The model is a stack of square linears without biases. It exists only as shards: it is built on the meta device,
sharded, and filled with random values of which 60 % are 0. Memory is the increase of a process's peak resident memory
by training. Each measurement has its own processes.
"""

import argparse
import ctypes
import json
import os
import platform
import resource
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from seft_dist import SeftConfig, SeftOptimizer
from seft_dist.config.method import WindowStore

TOKENS = 8
"""Tokens of a rank in a step: few, so that the cost of the method is not hidden by activations and products."""
STEPS = 3
"""Number of steps: the first support, an evolution, and an ordinary step."""


def make_model(width: int, depth: int, dtype: torch.dtype, sharded: bool) -> nn.Module:
    """Build linears on the meta device, shard them, and fill the shards."""
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(width, width, bias=False, dtype=dtype) for _ in range(depth)])
    if sharded:
        from torch.distributed.fsdp import fully_shard

        for layer in model:
            fully_shard(layer)
        fully_shard(model)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            local: Any = parameter.to_local() if sharded else parameter  # type: ignore[attr-defined]
            for block in local.detach().split(256):  # in blocks, to avoid an fp32 copy of the whole weight
                block.normal_(std=width**-0.5)
                block[torch.rand(block.shape) < 0.6] = 0
    return model


def peak_mb() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def train(width: int, depth: int, dtype: torch.dtype, store: WindowStore, sharded: bool, steps: int) -> dict[str, Any]:
    """Train some steps; returns their costs."""
    began = time.perf_counter()
    model = make_model(width, depth, dtype, sharded)
    made = time.perf_counter() - began
    seft = SeftOptimizer(model, SeftConfig(density=0.01, interval=2, steps=4, window_store=store), lr=1e-3)
    generator = torch.Generator().manual_seed(dist.get_rank() if sharded else 0)
    rows: list[dict[str, Any]] = []
    for _ in range(steps):
        began, sent = time.perf_counter(), seft.backend.bytes_sent if rows else 0
        out = model(torch.randn(TOKENS, width, generator=generator).to(dtype))
        (out.float() * torch.randn(out.shape, generator=generator)).sum().backward()
        seft.step()
        seft.zero_grad()
        report = seft.evolution
        rows.append(
            {
                "seconds": time.perf_counter() - began,
                "bytes": seft.backend.bytes_sent - sent,
                "phases": None
                if report is None
                else {name: [phase.seconds, phase.bytes_sent] for name, phase in report.phases.items()},
            }
        )
    return {
        "make_seconds": made,
        "steps": rows,
        "weights": width * width * depth,
        "deltas": len(seft.sparse_state.columns),
    }


def on_rank(
    rank: int, world_size: int, folder: str, width: int, depth: int, kind: str, store: WindowStore, steps: int
) -> None:
    """Measure on one rank, and write the result to the rank's file."""
    torch.set_num_threads(1)
    ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 18)  # returns freed blocks to the system at once
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    dtype, sharded = getattr(torch, kind), world_size > 1
    train(64, 2, dtype, store, sharded, steps)  # warms up: what the first step loads is not counted
    idle = peak_mb()
    result = train(width, depth, dtype, store, sharded, steps)
    result |= {"peak_MB": peak_mb() - idle, "rank": rank}
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def phases_of(row: dict[str, Any]) -> dict[str, tuple[float, int]]:
    """Duration and bytes of each phase of the last evolution."""
    return next(step["phases"] for step in reversed(row["steps"]) if step["phases"])


def measure(
    world_size: int, width: int, depth: int, kind: str, store: WindowStore = "full", steps: int = STEPS
) -> dict[str, Any]:
    """Run all ranks in new processes; returns the result of the rank with the highest peak."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(on_rank, (world_size, folder, width, depth, kind, store, steps), nprocs=world_size)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world_size)]
    worst: dict[str, Any] = max(ranks, key=lambda found: found["peak_MB"])
    row: dict[str, Any] = {"ranks": world_size, "width": width, "depth": depth, "dtype": kind, "store": store} | worst
    phases = phases_of(row)
    spent = {name: round(seconds, 3) for name, (seconds, _) in phases.items()}
    print(
        f"{row['weights'] / 1e6:.0f} M weights, {kind}, {store}, {world_size} ranks: "
        f"peak {row['peak_MB']:.0f} MB, sent in an evolution "
        f"{sum(sent for _, sent in phases.values()) / 1e6:.2f} MB, "
        f"in a step {row['steps'][-1]['bytes'] / 1e6:.3f} MB, seconds {spent}",
        flush=True,
    )
    return row


def measure_ranks(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure one model on increasing numbers of ranks."""
    return (measure(world, args.width, args.depth, args.dtype) for world in args.ranks)


def measure_model(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure models with increasing numbers of layers on the same ranks."""
    return (measure(max(args.ranks), args.width, depth, args.dtype) for depth in args.depths)


def measure_evolution(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure the first support, which is an evolution too, of models of increasing size in one process."""
    return (measure(1, args.width, depth, args.dtype, args.store, steps=1) for depth in args.depths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    settings: dict[str, tuple[Any, dict[str, Any]]] = {
        "ranks": (measure_ranks, {"width": 2048, "depth": 24, "ranks": [1, 2, 4, 8], "dtype": "float32"}),
        "model": (measure_model, {"width": 2048, "depths": [6, 12, 24, 48], "ranks": [4], "dtype": "float32"}),
        "evolution": (
            measure_evolution,
            {"width": 4096, "depths": [3, 12, 24, 48, 90], "dtype": "bfloat16", "store": "full"},
        ),
    }
    for name, (_, defaults) in settings.items():
        command = commands.add_parser(name)
        command.add_argument("--output", type=Path, required=True)
        for key, value in defaults.items():
            several = {"nargs": "+", "type": int} if isinstance(value, list) else {"type": type(value)}
            command.add_argument(f"--{key}", default=value, **several)
    plot = commands.add_parser("plot")
    plot.add_argument("results", type=Path)
    plot.add_argument("--figures", type=Path, required=True)
    args = parser.parse_args()
    if args.what == "plot":
        plot_all(args.results, args.figures)
        return
    machine = f"{os.cpu_count()} cores, {platform.platform()}, torch {version('torch')}, 1 thread a process"
    args.output.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in settings[args.what][0](args):
        rows.append(row)
        args.output.write_text(json.dumps({"machine": machine, "rows": rows}) + "\n")


def plot_all(results: Path, figures: Path) -> None:
    """Draw the results of the other commands as PNG files."""
    import matplotlib

    matplotlib.use("agg")
    figures.mkdir(parents=True, exist_ok=True)
    found = {
        name: json.loads((results / f"{name}.json").read_text())["rows"] for name in ("ranks", "model", "evolution")
    }
    plot_growth(found["ranks"], [row["ranks"] for row in found["ranks"]], "ranks", -1, figures / "scale_ranks.png")
    weights = [row["weights"] / 1e6 for row in found["model"]]
    plot_growth(found["model"], weights, "million weights, 4 ranks", 1, figures / "scale_model.png")
    plot_evolution(found["evolution"], figures / "scale_evolution.png")


def sent(row: dict[str, Any], window: bool) -> float:
    """MB that a rank sent for the evolution, or for the window before it."""
    return sum(size for name, (_, size) in phases_of(row).items() if (name == "window") == window) / 1e6


def plot_growth(rows: list[dict[str, Any]], across: list[float], label: str, power: int, file: Path) -> None:
    """Plot memory and bytes of a rank over the number of ranks or weights."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3.2))
    left.loglog(across, [row["peak_MB"] for row in rows], "o-", label="measured")
    first = 0 if power < 0 else -1  # the point where constant costs matter least
    line = [rows[first]["peak_MB"] * (x / across[first]) ** power for x in across]
    left.loglog(across, line, "--", color="grey", label="proportional" if power > 0 else "1 / ranks")
    left.set_yticks([row["peak_MB"] for row in rows], [f"{row['peak_MB']:.0f}" for row in rows])
    left.set_ylabel("peak memory of a rank, MB")
    series = {
        "a step of the window": [sent(row, window=True) for row in rows],
        "an evolution": [sent(row, window=False) for row in rows],
        "an ordinary step": [row["steps"][-1]["bytes"] / 1e6 for row in rows],
    }
    for title, values in series.items():
        points = [(x, value) for x, value in zip(across, values, strict=True) if value]
        right.loglog(*zip(*points, strict=True), "o-", label=title)
    right.set_ylabel("sent by a rank, MB")
    for axes in (left, right):
        axes.set_xlabel(label)
        axes.set_xticks(across, [f"{x:.0f}" for x in across])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=90)


def plot_evolution(rows: list[dict[str, Any]], file: Path) -> None:
    """Plot the duration of an evolution's phases over the number of weights."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.4))
    across = [row["weights"] / 1e6 for row in rows]
    names = ("grow", "adapt", "commit", "verify")
    seconds = {name: [phases_of(row)[name][0] for row in rows] for name in names}
    for name in names:
        axes.loglog(across, seconds[name], "o-", label=name)
    axes.loglog(across, [sum(took) for took in zip(*seconds.values(), strict=True)], "o-", color="black", label="all")
    axes.set_xlabel("million weights")
    axes.set_ylabel("seconds, one thread")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=90)


if __name__ == "__main__":
    main()
