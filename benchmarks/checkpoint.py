"""Cost of saving a checkpoint: seconds for which training is blocked, seconds until it is on disk, bytes of a rank.

    python benchmarks/checkpoint.py --model models/SmolLM2-135M-Instruct-wanda60 --ranks 2 --densities 0.01 0.05

For comparison the same run saves the whole model's state dict on the same disk by torch.distributed.checkpoint, with
and without async_save. This is what a run without our format would write; it holds no optimizer state.
"""

import argparse
import functools
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from seft_dist import SeftConfig, SeftOptimizer
from seft_dist.io import checkpoint


def seconds(act: Callable[[], Any]) -> tuple[float, Any]:
    """Wall time of a function on the slowest rank, and the function's result."""
    dist.barrier()
    begin = time.perf_counter()
    result = act()
    took = torch.tensor(time.perf_counter() - begin)
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return float(took), result


def folder_bytes(folder: Path) -> int:
    """Total size of all files in a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def train_step(model: Any, seft: SeftOptimizer, step: int) -> None:
    """Train one step on random tokens; the size of a checkpoint does not depend on the text."""
    ids = torch.randint(0, model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(step))
    model(input_ids=ids, labels=ids).loss.backward()
    seft.step()
    seft.zero_grad()


def measure_ours(model: Any, density: float, repeats: int, folder: Path) -> list[dict[str, Any]]:
    """Measure saves in our format, in the foreground and in the background."""
    seft = SeftOptimizer(model, SeftConfig(density=density, interval=1000), lr=1e-3)
    times: dict[str, list[float]] = {"at once": [], "background, stall": [], "background, on disk": [], "a step": []}
    for repeat in range(repeats):
        times["a step"].append(seconds(lambda repeat=repeat: train_step(model, seft, repeat))[0])  # type: ignore[misc]
        shutil.rmtree(folder, ignore_errors=True)
        took, path = seconds(lambda: checkpoint.save(seft, folder, {}))
        times["at once"].append(took)
        saver = checkpoint.Saver(seft, folder)
        start, _ = seconds(lambda saver=saver: saver.start({}))  # type: ignore[misc]
        begin = time.perf_counter()
        while not saver.written:
            time.sleep(0.002)
        waited = time.perf_counter() - begin
        end, _ = seconds(saver.finish)
        times["background, stall"].append(start + end)
        times["background, on disk"].append(start + waited + end)
    rows: list[dict[str, Any]] = [
        {"what": f"seft, {name}", "density": density, "seconds": times[name]} for name in times
    ]
    rows[0]["bytes"] = folder_bytes(path)
    seft.detach()
    return rows


def measure_dcp(model: Any, repeats: int, folder: Path) -> list[dict[str, Any]]:
    """Measure saves of the whole model by torch.distributed.checkpoint."""
    times: dict[str, list[float]] = {"at once": [], "async_save, stall": []}
    for _ in range(repeats):
        for name in times:
            if dist.get_rank() == 0:
                shutil.rmtree(folder, ignore_errors=True)
            state = {"model": get_model_state_dict(model)}
            save = dcp.save if name == "at once" else dcp.async_save
            act = functools.partial(save, state, checkpoint_id=folder)
            took, future = seconds(act)
            times[name].append(took)
            if name != "at once":
                future.result()
    rows: list[dict[str, Any]] = [{"what": f"DCP, whole model, {name}", "seconds": times[name]} for name in times]
    rows[0]["bytes"] = folder_bytes(folder)
    return rows


def on_rank(rank: int, args: argparse.Namespace, folder: str) -> None:
    """Run all measurements on one rank; rank 0 prints them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=args.ranks)
    mesh = init_device_mesh("cpu", (args.ranks,))
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    model.config.use_cache = False
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    rows = []
    for density in args.densities:
        rows += measure_ours(model, density, args.repeats, Path(folder) / "ours")
    rows += measure_dcp(model, args.repeats, Path(folder) / "dcp")
    numel = sum(parameter.numel() for parameter in model.parameters())
    if rank == 0:
        size = numel * next(model.parameters()).element_size()
        print(f"{args.model}: {size / 1e6:.0f} MB in {args.dtype}, {args.ranks} ranks, median of {args.repeats}")
        for row in rows:
            share = f"{row['bytes'] / 1e6:8.1f} MB  {row['bytes'] / size:6.1%} of the model" if "bytes" in row else ""
            density = f"density {row['density']:.0%}" if "density" in row else ""
            print(f"{row['what']:<36}{density:<14}{statistics.median(row['seconds']):8.3f} s  {share}")
        if args.output:
            Path(args.output).write_text(json.dumps(rows, indent=1) + "\n")
    dist.destroy_process_group()


def main() -> None:
    """Read the options and start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct-wanda60")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.01, 0.05])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="disk to write to; default: the temporary folder")
    parser.add_argument("--output", help="JSON file for all times")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        mp.spawn(on_rank, (args, folder), nprocs=args.ranks)


if __name__ == "__main__":
    main()
