"""Costs and savings of packed weights: bytes between ranks, resident and peak memory, duration of a step.

    python benchmarks/packing.py --model models/SmolLM2-135M-Instruct-wanda60 --ranks 2
    python benchmarks/packing.py --model models/SmolLM2-135M-Instruct-wanda60 --ranks 2 --link 1gbit      # as root

With --link, two ranks run in separate network namespaces that are joined by a veth pair, which tc limits in both
directions (Debian: iproute2). Then the bytes that the kernel counts on the link are reported too. Everything is removed
at the end. Each way of holding the weights runs in its own processes, one after the other.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MODES = ("none", "gather", "resident")
SPACES = ("packing-a", "packing-b")
LINK = "packing"


def worker(options: argparse.Namespace) -> None:
    """Load, train and measure on one rank; rank 0 writes the result."""
    import torch
    import torch.distributed as dist

    from seft_dist import SeftConfig, SeftOptimizer, pack_gathers
    from seft_dist.backends.packed import packed_of
    from seft_dist.config import ModelConfig
    from seft_dist.io.models import load_model
    from seft_dist.io.source import open_source

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(options.threads)
    dist.init_process_group("gloo")
    sent: list[int] = []
    count_gathered(sent, world_size)
    source = open_source(ModelConfig(path=options.model, dtype=options.dtype))
    began = memory()["now"]
    model: Any = load_model(
        source,
        sharding="fsdp" if world_size > 1 else "none",
        activation_checkpointing=options.checkpointing,
        resident="all-linear" if options.mode == "resident" else None,
    )
    loading = memory()["peak"] - began
    if options.mode == "gather":
        pack_gathers(model)
    seft = SeftOptimizer(model, SeftConfig(density=0.01, init="random", interval=1000, steps=2000))
    seft.attach()
    backend = seft.backend
    backend.drop_gathered()
    held = sum(map(torch.Tensor.nelement, seft.sparse_state.masks))
    for i, holder in enumerate(backend.holders):
        packed = packed_of(holder.weight)
        held += packed.values.nbytes if packed else backend.own(i).nbytes  # the packed weight's bits are the mask
    ids = torch.randint(0, source.config.vocab_size, (1, options.tokens), generator=torch.Generator().manual_seed(rank))
    loss, steps = train(model, seft, ids, options.steps, sent)
    result = {
        "loss": loss.hex(),
        "seconds": statistics.median(seconds for seconds, _, _ in steps),
        "fastest": min(seconds for seconds, _, _ in steps),
        "gathered_MB": steps[-1][1] / 1e6,
        "link_MB": steps[-1][2] / 1e6,
        "held_MB": held / 1e6,
        "dense_bf16_MB": sum(2 * len(backend.interval(i)) for i in range(len(backend.names))) / 1e6,
        "between_MB": (memory()["now"] - began) / 1e6,
        "peak_MB": (memory()["peak"] - began) / 1e6,
        "loading_MB": loading / 1e6,
    }
    every: list[Any] = [None] * world_size
    dist.all_gather_object(every, result)
    if rank == 0:
        keys = [key for key in result if key != "loss"]
        Path(options.result).write_text(
            json.dumps({key: max(row[key] for row in every) for key in keys} | {"loss": [row["loss"] for row in every]})
        )
    dist.barrier()
    dist.destroy_process_group()


def train(model: Any, seft: Any, ids: Any, count: int, sent: list[int]) -> tuple[float, list[tuple[float, int, int]]]:
    """Train on one batch.

    Returns:
        The last loss; and for each step but the first its duration, gathered bytes, and bytes on the link.
    """
    import torch.distributed as dist

    steps = []
    for step in range(count + 1):
        sent.clear()
        before = link_bytes()
        dist.barrier()
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        seft.step()
        seft.zero_grad()
        dist.barrier()
        if step:  # the first step compiles kernels and records the order of layers
            steps.append((time.perf_counter() - start, sum(sent), link_bytes() - before))
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    return float(loss.detach()), steps


def count_gathered(sent: list[int], world_size: int) -> None:
    """Add the bytes that each all-gather of weights sends, FSDP2's and ours, as a ring would."""
    import torch.distributed as dist

    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # before torch 2.13
    plain = getattr(dist, name)

    def counted(output: Any, given: Any, *args: Any, **rest: Any) -> Any:
        sent.append(given.nbytes * (world_size - 1))
        return plain(output, given, *args, **rest)

    setattr(dist, name, counted)


def memory() -> dict[str, int]:
    """Current and peak resident memory of this process in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"now": int(status["VmRSS"].split()[0]) << 10, "peak": int(status["VmHWM"].split()[0]) << 10}


def link_bytes() -> int:
    """Bytes sent through the shaped link; 0 without one."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        if line.strip().startswith(LINK):
            return int(line.split(":")[1].split()[8])
    return 0


@contextmanager
def link(rate: str | None) -> Iterator[list[list[str]]]:
    """Context in which the namespaces exist; yields the prefix of each rank's command."""
    if rate is None:
        yield [[]] * 64
        return
    try:
        for space in SPACES:
            call("ip", "netns", "add", space)
            call("ip", "-n", space, "link", "set", "lo", "up")
        call(
            "ip", "link", "add", f"{LINK}0", "netns", SPACES[0], "type", "veth", "peer", f"{LINK}1", "netns", SPACES[1]
        )
        for i, space in enumerate(SPACES):
            call("ip", "-n", space, "address", "add", f"10.231.0.{i + 1}/24", "dev", f"{LINK}{i}")
            call("ip", "-n", space, "link", "set", f"{LINK}{i}", "up")
            shape = ["tbf", "rate", rate, "burst", "256kb", "latency", "50ms"]
            call("tc", "-n", space, "qdisc", "add", "dev", f"{LINK}{i}", "root", *shape)
        yield [["ip", "netns", "exec", space] for space in SPACES]
    finally:
        for space in SPACES:
            subprocess.run(["ip", "netns", "delete", space], check=False, stderr=subprocess.DEVNULL)


def call(*command: str) -> None:
    """Run a command, and raise an error if it fails."""
    subprocess.run(command, check=True)


def measure(options: argparse.Namespace, mode: str, prefixes: list[list[str]]) -> dict[str, Any]:
    """Run all ranks with one way of holding the weights."""
    result = Path(options.scratch) / f"{mode}.json"
    result.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, *sys.argv[1:], "--mode", mode, "--result", str(result)]
    ranks = []
    for rank in range(options.ranks):
        env = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(options.ranks), "MASTER_PORT": "29777"}
        env["MASTER_ADDR"] = "10.231.0.1" if options.link else "127.0.0.1"
        env["GLOO_SOCKET_IFNAME"] = f"{LINK}{rank}" if options.link else "lo"
        env["PYTHONPATH"] = f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"
        ranks.append(subprocess.Popen([*prefixes[rank], *command], env=env))
    codes = [process.wait() for process in ranks]
    if any(codes):
        sys.exit(f"{mode}: exit codes {codes}")
    return json.loads(result.read_text())


def main() -> None:
    """Measure the ways that the options name, and print a table."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a link is taken down again
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a pruned causal LM")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--link", help="rate between two ranks, as tc writes it, e.g. 1gbit; needs root")
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1, help="of a rank")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--scratch", default="/tmp/packing-benchmark")
    parser.add_argument("--mode", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mode:
        worker(options)
        return
    if options.link and options.ranks != 2:
        parser.error("--link joins two ranks")
    with link(options.link) as prefixes:
        rows = {mode: measure(options, mode, prefixes) for mode in options.modes}
    losses = {json.dumps(row["loss"]) for row in rows.values()}
    print(
        f"{options.ranks} ranks, link {options.link or 'loopback'}, 1 x {options.tokens} tokens a rank, {options.dtype}"
    )
    keys = ("seconds", "fastest", "gathered_MB", "link_MB", "held_MB", "between_MB", "peak_MB", "loading_MB")
    print(f"{'':10}" + "".join(f"{key:>13}" for key in keys))
    for mode, row in rows.items():
        print(f"{mode:10}" + "".join(f"{row[key]:13.2f}" for key in keys))
    dense = next(iter(rows.values()))["dense_bf16_MB"]
    print(
        f"own rows of the targets, dense in bf16: {dense:.2f} MB; the same last loss, bit for bit: {len(losses) == 1}"
    )
    for mode, row in rows.items():
        if mode != "none" and "none" in rows:
            crossover(mode, row, rows["none"])


def crossover(mode: str, row: dict[str, Any], plain: dict[str, Any]) -> None:
    """Print the bandwidth below which the saved bytes outweigh the time of packing, if the two do not overlap."""
    saved, lost = plain["gathered_MB"] - row["gathered_MB"], row["fastest"] - plain["fastest"]
    if lost > 0 and saved > 0:
        even = 8 * saved / lost
        print(f"{mode}: {saved:.1f} MB a step less, {lost:.2f} s more: even at {even:.0f} Mbit/s if this link is free")
    else:
        print(f"{mode}: {saved:.1f} MB a step less, {-lost:.2f} s faster")


if __name__ == "__main__":
    main()
