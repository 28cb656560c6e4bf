"""Memory of real runs, rank by rank, beside what launch/plan.py calculates.

    python benchmarks/plan_memory.py                        # every case, as a table
    python benchmarks/plan_memory.py --model CONFIG.json --dtype float32 --ranks 2 --held fsdp

A case trains a randomly initialised, pruned model of the given shape for a few steps, an evolution with a window of two
steps among them, on gloo ranks. Measured is the growth of each rank's largest resident set since just before the model
was made, with an allocator that gives freed memory back at once.
"""

import argparse
import ctypes
import json
import multiprocessing as mp
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from seft_dist.backends.shards import fsdp_mesh, shard_fsdp, stored_part, zero3_construction
from seft_dist.config import ClusterConfig, PlanConfig, SeftConfig
from seft_dist.io.models import decoder_layers
from seft_dist.optim.optimizer import SeftOptimizer
from seft_dist.planning.architectures import find_architecture
from seft_dist.planning.hardware import Rates
from seft_dist.planning.plan import choose, make_plan

SHAPES = {
    "llama-wide": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "num_attention_heads": 16},
    "llama-deep": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8},
}
"""Llamas of 142 and 71 million parameters."""
CASES = [
    ("llama-wide", "float32", "single", 1, False, 1, 256),
    ("llama-wide", "float32", "single", 1, True, 2, 512),
    ("llama-wide", "bfloat16", "single", 1, True, 1, 512),
    ("llama-wide", "float32", "fsdp", 2, False, 1, 256),
    ("llama-wide", "float32", "fsdp", 4, True, 1, 256),
    ("llama-wide", "float32", "ddp", 2, True, 1, 256),
    ("llama-wide", "float32", "zero3", 2, True, 1, 256),
    ("llama-deep", "float32", "ddp", 4, False, 1, 128),
    ("llama-deep", "float32", "zero3", 4, False, 1, 256),
]
"""(shape, type, held, ranks, checkpointing, sequences, tokens of each)."""


def plan_of(model: str, dtype: str, checkpoint: bool, batch: int, length: int, ranks: int) -> PlanConfig:
    """The recipe of a case."""
    return PlanConfig(
        model=model,
        dtype=dtype,  # type: ignore[arg-type]
        activation_checkpointing=checkpoint,
        batch_size=batch,
        seq_len=length,
        global_batch=None,
        steps=3,
        seft=SeftConfig(interval=2, window=2, density=0.01, end=2),
        cluster=ClusterConfig(nodes=1, gpus_per_node=ranks, fragmentation=0.0),
    )


def measure(config: PlanConfig, held: str, ranks: int, threads: int = 1) -> list[dict[str, Any]]:
    """Each rank's measured bytes, and seconds of each step."""
    context = mp.get_context("fork")  # libraries are loaded once, and shared
    with tempfile.TemporaryDirectory() as folder, context.Pool(ranks) as pool:
        return pool.starmap(
            _train, [(rank, ranks, folder, config, held, threads) for rank in range(ranks)], chunksize=1
        )


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _train(rank: int, ranks: int, folder: str, config: PlanConfig, held: str, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", DS_ACCELERATOR="cpu"
    )
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 18)
    tiny = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    Path(folder, f"tiny-{rank}.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 64, **tiny}))
    warm = plan_of(f"{folder}/tiny-{rank}.json", config.dtype, config.activation_checkpointing, 1, 32, ranks)
    _steps(warm, held, rank)  # what a first step loads and compiles is not counted
    low = _now()
    seconds = _steps(config, held, rank)
    return {"peak": _peak() - low, "seconds": seconds}


def _now() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _fill(model: Any, sparsity: float, everything_zeroed: bool) -> None:
    """Random weights with zeros; a ZeRO-3 shard does not tell whether it is of a matrix."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            torch.manual_seed(number)
            part, _ = stored_part(parameter)
            part.normal_(std=0.02)
            if parameter.dim() > 1 or everything_zeroed:
                for chunk in part.split(1 << 20):
                    chunk.masked_fill_(torch.rand(chunk.shape) < sparsity, 0)
            if name.endswith("norm.weight"):
                part.fill_(1.0)


def _steps(config: PlanConfig, held: str, rank: int) -> list[float]:
    architecture, kind = find_architecture(config.model), getattr(torch, config.dtype)
    ds = {
        "train_micro_batch_size_per_gpu": config.batch_size,
        "zero_optimization": json.loads(Path("ds_configs/zero3.json").read_text())["zero_optimization"],
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**6,
    }
    if held == "zero3":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo")
        with zero3_construction(ds):
            model = AutoModelForCausalLM.from_config(architecture, dtype=kind)
    else:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(architecture, dtype=kind)
        if held == "fsdp":
            shard_fsdp(model, decoder_layers(model), fsdp_mesh(torch.device("cpu"), 1), False, set())
        model.to_empty(device="cpu")
        rotary = type(model.model.rotary_emb)(architecture)
        model.model.rotary_emb.inv_freq.copy_(rotary.inv_freq)
    _fill(model, config.sparsity, everything_zeroed=held == "zero3")
    model.config.use_cache = False
    model.train()
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    seft = SeftOptimizer(model, config.seft, lr=1e-3)
    called, engine = model, None
    if held == "ddp":
        called = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    elif held == "zero3":
        engine, *_ = deepspeed.initialize(model=model, optimizer=seft, config=ds)
        called = engine
    generator = torch.Generator().manual_seed(rank)
    seconds = []
    for _ in range(config.steps):
        dist.barrier()
        began = time.perf_counter()
        ids = torch.randint(0, architecture.vocab_size, (config.batch_size, config.seq_len), generator=generator)
        loss = called(input_ids=ids, labels=ids).loss
        if engine is None:
            loss.backward()
            seft.step()
            seft.zero_grad()
        else:
            engine.backward(loss)
            engine.step()
        dist.barrier()
        seconds.append(time.perf_counter() - began)
    return seconds


def compare(model: str, dtype: str, held: str, ranks: int, checkpoint: bool, batch: int, length: int) -> dict[str, Any]:
    """One case: calculated and measured bytes of the fullest rank."""
    config = plan_of(model, dtype, checkpoint, batch, length, ranks)
    measured = measure(config, held, ranks)
    nothing = Rates("cpu", 1e18, 0.0, *[1e12] * 4, None, 1e9, 1e-9, 1e-9, 1e9, 1e9, 1e9, False, True, True)
    memory = choose(make_plan(config, nothing), held, ranks).memory
    largest = max(rank["peak"] for rank in measured)
    return {
        "calculated": memory.total,
        "measured": largest,
        "ratio": memory.total / largest,
        "worst": memory.worst,
        "phases": {name: sum(terms.values()) + sum(memory.resident.values()) for name, terms in memory.phases.items()},
        "ranks": measured,
    }


def main() -> None:
    """Run the cases that the command line names."""
    torch.set_num_threads(1)  # processes with more threads cannot be forked
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--held", default="single")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--checkpoint", action="store_true")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    cases = CASES
    if args.model:
        cases = [(args.model, args.dtype, args.held, args.ranks, args.checkpoint, args.batch, args.length)]
    print("| model | type | layout | checkpointing | tokens | largest in | calculated MB | measured MB | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for shape, dtype, held, ranks, checkpoint, batch, length in cases:
            model = shape
            if shape in SHAPES:
                model = f"{folder}/{shape}.json"
                content = {"model_type": "llama", "vocab_size": 32000, "tie_word_embeddings": False, **SHAPES[shape]}
                Path(model).write_text(json.dumps(content))
            found = compare(model, dtype, held, ranks, checkpoint, batch, length)
            print(
                f"| {Path(shape).name} | {dtype} | {held} {ranks} | {'yes' if checkpoint else 'no'} | {batch} x {length} | "
                f"{found['worst']} | {found['calculated'] / 1e6:,.0f} | {found['measured'] / 1e6:,.0f} | {found['ratio']:.2f} |",
                flush=True,
            )
            print({k: round(v / 1e6) for k, v in found["phases"].items()}, found["ranks"], file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
