"""One training step of every method on one model, interleaved: seconds and peak memory, as ratios to the floor.

    python benchmarks/step.py --model models/SmolLM2-135M-Instruct-wanda60 --batch 1x256 --densities 0.01
    python benchmarks/step.py --model llama2048 --batch 2x512 --densities 0.005 0.01 0.05

The floor is a frozen model's forward pass and input gradients: no method that trains its linears can be faster. Each
method has its own process, so that its peak memory is known, and does one step in each round. Ratios are computed
within a round, and their median is shown, so a machine that slows down affects all methods. Peak memory is that of an
ordinary step; the last column includes the first step (SEFT chooses its first support from a dense gradient) and, with
evolutions, a window and an evolution. With --compiled some methods are measured once more with every decoder layer
under torch.compile (inductor). Other methods are LoRA and SHiRA of PEFT (pip install -e '.[bench]'), full
fine-tuning, and two forms of other sparse methods in step_methods.py.
"""

import argparse
import ctypes
import json
import multiprocessing as mp
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from step_methods import EVERY, METHODS, draw_batch, load  # beside this file
from tqdm import tqdm

INTERVAL, WINDOW = 60, 5
"""Interval and window for which the average over a run is calculated."""


def worker(pipe: Any, name: str, compiled: bool, density: float, args: argparse.Namespace) -> None:
    """Measure peaks of one method, then do a step for each request on the pipe; reply with its duration and kind."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    sequences, tokens = map(int, args.batch.split("x"))
    model = load(args.model)
    for layer in model.model.layers if compiled else ():
        layer.compile(dynamic=False)
    step = METHODS[name](model, draw_batch(model, sequences, tokens), density)
    _use_malloc(mapped_from=1 << 18)  # returns freed blocks at once, so that peaks do not include malloc's cache
    first, ordinary = 0, 0
    for number in range(EVERY + 1 if name == "evolving" else 3):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        kind = step()
        peak = _status("VmHWM")
        if number and kind == "step":
            ordinary = max(ordinary, peak)
        first = max(first, peak)
    _use_malloc(mapped_from=1 << 25)  # the value that glibc's own rule reaches in training
    pipe.send((ordinary, first))
    while pipe.recv():
        clock = time.process_time if args.clock == "cpu" else time.perf_counter
        begin = clock()
        kind = step()
        pipe.send((clock() - begin, kind))


def _use_malloc(mapped_from: int) -> None:
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-3, mapped_from)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, 2 * mapped_from)  # M_TRIM_THRESHOLD
    libc.malloc_trim(0)


def _status(name: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) << 10


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all methods; a row has method, density, durations by kind of step, and peaks of one and all kinds."""
    context = mp.get_context("spawn")
    rows: list[dict[str, Any]] = []
    cases = [(name, False) for name in args.methods] + [(name, True) for name in args.compiled]
    for name, compiled in tqdm(cases, desc="memory", unit="method"):
        for density in args.densities if name in ("seft", "evolving", "spiel") else [None]:
            ours, theirs = context.Pipe()
            process = context.Process(target=worker, args=(theirs, name, compiled, density, args), daemon=True)
            process.start()
            theirs.close()  # otherwise this would wait for ever for a process that died
            peak, peak_of_all = ours.recv()
            row = {"method": f"{name}, compiled" if compiled else name, "density": density, "seconds": []}
            row |= {"peak": peak, "peak_of_all": peak_of_all, "pipe": ours, "process": process}
            rows.append(row)
    for number in tqdm(range(args.warmup + args.rounds), desc="rounds", unit="round"):
        for row in rows:
            row["pipe"].send(True)
            seconds, kind = row["pipe"].recv()
            if number >= args.warmup:
                row["seconds"].append((kind, seconds))
    for row in rows:
        row.pop("pipe").send(False)
        row.pop("process").join()
    return rows


def ratio(row: dict[str, Any], floor: dict[str, Any], kind: str = "step") -> float | None:
    """Median over the rounds of the ratio of one kind of step to the floor in the same round."""
    pairs = zip(row["seconds"], floor["seconds"], strict=True)
    found = [seconds / below for (had, seconds), (_, below) in pairs if had == kind]
    return statistics.median(found) if found else None


def summarise(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Print a table and, for runs with evolutions, the average over an interval."""
    floor = next(row for row in rows if row["method"] == "floor")
    base = statistics.median(seconds for _, seconds in floor["seconds"])
    table = Table(
        title=f"{args.model}, {args.batch} tokens, {args.threads} threads, {args.rounds} rounds, {args.clock} seconds"
    )
    for column in ("method", "density", "seconds", "x floor", "peak MB", "x floor", "first step, evolution"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        row["ratio"], row["memory_ratio"] = ratio(row, floor), row["peak"] / floor["peak"]
        median = statistics.median(seconds for kind, seconds in row["seconds"] if kind == "step")
        density = "" if row["density"] is None else f"{row['density']:.1%}"
        cells = (row["method"], density, f"{median:.3f}", f"{row['ratio']:.3f}", f"{row['peak'] / 1e6:.0f}")
        table.add_row(*cells, f"{row['memory_ratio']:.3f}", f"{row['peak_of_all'] / 1e6:.0f}")
    console = Console()
    console.print(table)
    for row in rows:
        if not row["method"].startswith("evolving"):
            continue
        evolutions = [float(kind.split()[1]) for kind, _ in row["seconds"] if kind.startswith("evolution")]
        window = ratio(row, floor, "window")
        if not evolutions or window is None:
            continue
        row["window_ratio"], row["evolution_ratio"] = window, statistics.median(evolutions) / base
        ordinary = INTERVAL - WINDOW
        row["average_ratio"] = (ordinary * row["ratio"] + WINDOW * window + row["evolution_ratio"]) / INTERVAL
        console.print(
            f"density {row['density']:.1%}: a step in a window {window:.3f} x floor; an evolution "
            f"{row['evolution_ratio']:.3f} x floor ({statistics.median(evolutions):.3f} s); average over an interval "
            f"of {INTERVAL} with a window of {WINDOW} and one evolution {row['average_ratio']:.3f} x floor"
        )


def main() -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct-wanda60", help='a folder, or "llama2048"')
    parser.add_argument("--batch", default="1x256", help="sequences x tokens")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.01])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--compiled", nargs="+", default=[], choices=list(METHODS), help="methods to compile, too")
    parser.add_argument("--rounds", type=int, default=16, help="two evolutions fall into 16")
    parser.add_argument("--warmup", type=int, default=2, help="rounds not counted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock",
        default="wall",
        choices=["wall", "cpu"],
        help="cpu: seconds of all threads, on a machine that is shared",
    )
    parser.add_argument("--output", help="JSON file for all times")
    args = parser.parse_args()
    if "floor" not in args.methods:
        parser.error('--methods needs "floor": everything is a ratio to it')
    rows = measure(args)
    summarise(rows, args)
    if args.output:
        Path(args.output).write_text(json.dumps({"options": vars(args), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
