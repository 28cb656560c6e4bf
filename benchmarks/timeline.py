"""Timeline of one step on two ranks: when gradients are sent, and what is computed meanwhile.

    python benchmarks/timeline.py --model models/SmolLM2-135M-Instruct-wanda60 --figure docs/figures/timeline.png

torch.profiler traces rank 0 (FSDP2 over gloo, one thread for each rank). An exchange of gradients is drawn from the
moment when it is started until rank 0 finds it finished; --trace writes the whole trace for chrome://tracing or
Perfetto.
"""

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoModelForCausalLM

from seft_dist import SeftConfig, SeftOptimizer

WARMUP = 3


def watch(seft: SeftOptimizer, spans: list[dict[str, float]], stop: threading.Event) -> None:
    """Record begin and end of each exchange, by polling every half millisecond."""
    while not stop.is_set():
        now = time.time()
        for number, one in enumerate(list(seft.exchange._sums)):
            if number == len(spans):
                spans.append({"begin": now, "bytes": one._terms.numel() * 4})
            work = one._work
            if "end" not in spans[number] and (work is None or work.is_completed()):
                spans[number]["end"] = now
        time.sleep(0.0005)


def step(model: Any, seft: SeftOptimizer, number: int, tokens: int) -> None:
    """Train one step on random tokens, with its phases named for the profiler."""
    seed = number * dist.get_world_size() + dist.get_rank()
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed))
    with record_function("forward"):
        loss = model(input_ids=ids, labels=ids).loss
    seft.set_is_last_backward(True)
    with record_function("backward"):
        loss.backward()
    with record_function("step()"):
        seft.step()
    seft.zero_grad()


def on_rank(rank: int, args: argparse.Namespace, folder: str) -> None:
    """Run one rank; rank 0 traces and draws."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=args.ranks)
    mesh = init_device_mesh("cpu", (args.ranks,))
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.config.use_cache = False
    seft = SeftOptimizer(model, SeftConfig(density=args.density, interval=1000), lr=1e-4, max_grad_norm=1.0)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for number in range(WARMUP):
        step(model, seft, number, args.tokens)
    dist.barrier()
    spans: list[dict[str, float]] = []
    stop = threading.Event()
    watcher = threading.Thread(target=watch, args=(seft, spans, stop), daemon=True)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        watcher.start()
        begin = time.time()
        step(model, seft, WARMUP, args.tokens)
        end = time.time()
    stop.set()
    watcher.join()
    if rank == 0:
        path = args.trace or f"{folder}/trace.json"
        trace.export_chrome_trace(path)
        content = json.loads(Path(path).read_text())
        draw(phases(content), spans, begin, end, args)
    dist.barrier()
    dist.destroy_process_group()


def phases(trace: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Begin and end, in seconds since the forward pass began, of each phase and of FSDP2's all-gathers."""
    names = {
        "forward": "forward",
        "backward": "backward",
        "step()": "step()",
        "FSDP::all_gather": "all-gather of weights",
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names.values()}
    for event in trace["traceEvents"]:
        for name, lane in names.items():
            if event.get("name", "").startswith(name) and "dur" in event:
                found[lane].append((event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6))
    zero = found["forward"][0][0]
    return {lane: [(a - zero, b - zero) for a, b in spans] for lane, spans in found.items()}


def draw(
    lanes: dict[str, list[tuple[float, float]]],
    spans: list[dict[str, float]],
    begin: float,
    end: float,
    args: argparse.Namespace,
) -> None:
    """Print the phases and draw them above the exchanges."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    exchanges = [(span["begin"] - begin, span.get("end", end) - begin, span["bytes"]) for span in spans]
    over = lanes["backward"][0][1]
    for lane in ("forward", "backward", "step()"):
        first, last = lanes[lane][0]
        print(f"{lane:<10} {first:7.3f} to {last:7.3f} s")
    for number, (first, last, size) in enumerate(exchanges):
        where = "during backward" if first < over else "in step()"
        print(f"exchange {number} of {size / 1e6:.2f} MB: {first:7.3f} to {last:7.3f} s, left {where}")
    if not args.figure:
        return
    figure, axes = pyplot.subplots(figsize=(9, 2.6))
    rows = ["forward", "backward", "step()", "all-gather of weights"]
    for row, lane in enumerate(rows):
        for first, last in lanes[lane]:
            axes.barh(row, last - first, left=first, color=f"C{row}")
    for first, last, _ in exchanges:
        width = max(last - first, 0.004 * over)  # a minimum, so that short ones are visible
        axes.barh(len(rows), width, left=first, color="C5")
    axes.axvline(over, color="grey", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(rows) + 1), [*rows, "exchange of gradients"])
    axes.invert_yaxis()
    axes.set_xlabel("seconds; dashed: backward is over")
    figure.tight_layout()
    Path(args.figure).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.figure, dpi=110)


def main() -> None:
    """Read the options and start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct-wanda60")
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--figure", help="PNG to draw")
    parser.add_argument("--trace", help="JSON file for the whole trace")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(on_rank, (args, folder), nprocs=args.ranks)


if __name__ == "__main__":
    main()
