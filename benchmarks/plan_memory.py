"""Comparison of the memory of real runs, rank by rank, with the estimates of `seft plan`.

    python benchmarks/plan_memory.py                        # every case, as a table
    python benchmarks/plan_memory.py --model CONFIG.json --dtype float32 --ranks 2 --layout fsdp

A case writes a randomly initialised, pruned model of the given shape to disk, loads it as `seft train` does, in the
same layout, and trains it on gloo ranks for a few steps, which include an evolution with a window of two steps. It
measures by how much the peak resident set of each rank exceeds that just before the model is loaded, with an allocator
that returns freed memory to the system at once.
"""

import argparse
import ctypes
import json
import multiprocessing as mp
import os
import resource
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from seft_dist.config import ClusterConfig, DataConfig, ModelConfig, PlanConfig, SeftConfig, TeacherConfig, TrainConfig
from seft_dist.io.source import open_source
from seft_dist.planning.architectures import find_architecture
from seft_dist.planning.hardware import Rates
from seft_dist.planning.plan import estimate, make_plan
from seft_dist.session import distributed
from seft_dist.training.build import build
from seft_dist.training.ds_config import read_ds_config
from seft_dist.training.step import forward_backward, update_weights
from seft_dist.training.teacher import open_teacher

SHAPES: dict[str, dict[str, int]] = {
    "wide": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "num_attention_heads": 16},
    "deep": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8},
}
"""Llamas of 142 and 71 million parameters."""
_SPARSITY = 0.6


@dataclass(frozen=True)
class Case:
    """A run that is planned and measured."""

    model: str
    """A key of SHAPES, or a config.json."""
    layout: str = "single"
    ranks: int = 1
    dtype: str = "float32"
    checkpoint: bool = False
    batch: int = 1
    length: int = 256
    packing: str = "none"
    teacher: bool = False
    steps: int = 3
    seft: dict[str, Any] = field(default_factory=dict)
    """Options of the method that differ from the benchmark's defaults."""

    @property
    def replicas(self) -> int:
        """Number of sharded copies of the model."""
        return 2 if self.layout == "hsdp" else 1

    @property
    def name(self) -> str:
        """Name of the case in tables."""
        parts = [self.layout, str(self.ranks)] + [self.packing] * (self.packing != "none")
        parts += ["teacher"] * self.teacher
        return " ".join(parts + [self.seft[key] for key in ("window_store",) if key in self.seft])

    def plan(self, model: str) -> PlanConfig:
        """Configuration of `seft plan`.

        Args:
            model: A folder or config.json.
        """
        options = {"interval": 2, "window": 2, "density": 0.01, "end": 2} | self.seft
        return PlanConfig(
            model=model,
            dtype=self.dtype,  # type: ignore[arg-type]
            sparsity=_SPARSITY,
            activation_checkpointing=self.checkpoint,
            batch_size=self.batch,
            seq_len=self.length,
            global_batch=None,
            steps=self.steps,
            teacher=self.teacher,
            seft=SeftConfig(**options),
            cluster=ClusterConfig(nodes=self.replicas, gpus_per_node=self.ranks // self.replicas, fragmentation=0.0),
        )

    def run(self, folder: str, plan: PlanConfig) -> TrainConfig:
        """Configuration of `seft train`.

        Args:
            folder: Folder of the model.
            plan: The result of ``plan``.
        """
        zero = self.layout.startswith("zero")
        suffix = "_bf16" if self.dtype == "bfloat16" else ""
        return TrainConfig(
            model=ModelConfig(
                path=folder,
                dtype=self.dtype,  # type: ignore[arg-type]
                activation_checkpointing=self.checkpoint,
            ),
            data=DataConfig(path="none"),
            output="none",
            seft=plan.seft,
            steps=plan.steps,
            batch_size=self.batch,
            global_batch=self.batch * self.ranks,
            backend="deepspeed" if zero else "fsdp" if self.layout == "hsdp" else self.layout,  # type: ignore[arg-type]
            deepspeed=f"ds_configs/{self.layout}{suffix}.json" if zero else None,
            replicas=self.replicas,
            packing=self.packing,  # type: ignore[arg-type]
            teacher=TeacherConfig(path=folder if self.teacher else None),
        )


_BF16 = {"dtype": "bfloat16", "checkpoint": True, "length": 512}
CASES = [
    Case("wide"),
    Case("wide", checkpoint=True, batch=2, length=512),
    Case("wide", **_BF16),
    Case("wide", packing="resident", **_BF16),
    *[Case("wide", seft={"window_store": store}, **_BF16) for store in ("bf16", "candidates", "factored")],
    Case("wide", teacher=True),
    Case("wide", teacher=True, **_BF16),
    Case("wide", "fsdp", 2),
    Case("wide", "fsdp", 2, teacher=True, **_BF16),
    Case("wide", "zero3", 2, teacher=True, checkpoint=True),
    Case("wide", "fsdp", 2, packing="gather", **_BF16),
    Case("wide", "fsdp", 2, packing="resident", **_BF16),
    Case("wide", "fsdp", 2, packing="resident", seft={"window_store": "factored"}, **_BF16),
    Case("wide", "fsdp", 4, checkpoint=True),
    Case("wide", "hsdp", 4, checkpoint=True),
    Case("wide", "ddp", 2, checkpoint=True),
    *[Case("wide", f"zero{stage}", 2, checkpoint=True) for stage in (0, 1, 2, 3)],
    Case("wide", "zero3_offload", 2, checkpoint=True),
    Case("deep", "ddp", 4, length=128),
    Case("deep", "zero3", 4),
]


def measure(case: Case, folder: str, plan: PlanConfig, threads: int = 1, frees: bool = True) -> list[dict[str, Any]]:
    """Run a case; returns the measured bytes of each rank, and the duration of each step.

    Args:
        case: The case.
        folder: Folder of its model, written by ``write_model``.
        plan: The result of ``case.plan``, whose method and steps are run.
        threads: Number of threads of each rank.
        frees: Return freed memory to the system at once, so that the peak is that of tensors; this takes time.
    """
    context = mp.get_context("fork")  # libraries are loaded once, and shared
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with context.Pool(case.ranks) as pool:
        args = [(rank, port, case, folder, plan, threads, frees) for rank in range(case.ranks)]
        return pool.starmap(_train, args, chunksize=1)


def _train(
    rank: int, port: int, case: Case, folder: str, plan: PlanConfig, threads: int, frees: bool
) -> dict[str, Any]:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case.ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu")
    zero = case.layout.startswith("zero")
    ranks = distributed.start(deepspeed=zero, group=case.layout in ("fsdp", "hsdp", "ddp"), threads=threads)
    if frees:
        ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 18)
    tiny = replace(case, batch=1, length=32)
    _steps(
        tiny.run(f"{folder}-tiny", tiny.plan(folder)), ranks, 32
    )  # warms up: the first step loads and compiles things
    low = _resident()
    seconds = _steps(case.run(folder, plan), ranks, case.length)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak": peak - low, "seconds": seconds}


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _steps(config: TrainConfig, ranks: distributed.Ranks, length: int) -> list[float]:
    ds = read_ds_config(config, ranks.world_size)
    source = open_source(config.model, ds.dtype if ds else None)
    run = build(config, ranks, source, ds, open_teacher(config, source))
    generator = torch.Generator().manual_seed(ranks.rank)
    seconds = []
    for step in range(1, config.steps + 1):
        if dist.is_initialized():
            dist.barrier()
        began = time.perf_counter()
        ids = torch.randint(0, source.config.vocab_size, (config.batch_size, length), generator=generator)
        forward_backward(run, [{"input_ids": ids, "labels": ids}])
        update_weights(run, step)
        if dist.is_initialized():
            dist.barrier()
        seconds.append(time.perf_counter() - began)
    return seconds


def write_model(content: dict[str, Any], folder: str, dtype: str) -> None:
    """Write a random model with zeros, and a tiny one of the same kind to ``folder``-tiny for warming up.

    Args:
        content: Content of its config.json.
        folder: Folder of the model.
        dtype: Dtype of its weights.
    """
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    kept = {key: value for key, value in content.items() if key not in ("head_dim", "layer_types")}
    tiny = kept | sizes | {"num_key_value_heads": 4}
    writer = mp.get_context("fork").Process(target=_write, args=([(folder, content), (f"{folder}-tiny", tiny)], dtype))
    writer.start()
    writer.join()
    if writer.exitcode:
        raise ValueError(f"the model could not be written to {folder}")


def _write(models: list[tuple[str, dict[str, Any]]], dtype: str) -> None:
    for folder, content in models:
        Path(folder).mkdir()
        Path(folder, "config.json").write_text(json.dumps(content))
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(find_architecture(folder), dtype=getattr(torch, dtype))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.masked_fill_(torch.rand(parameter.shape) < _SPARSITY, 0)
        model.save_pretrained(folder)


def content_of(model: str) -> dict[str, Any]:
    """Content of the config.json of a case's model."""
    if model not in SHAPES:
        return json.loads(Path(model).read_text())
    return {"model_type": "llama", "vocab_size": 32000, "tie_word_embeddings": False, **SHAPES[model]}


def compare(case: Case) -> dict[str, Any]:
    """Run one case; returns the estimated and measured bytes of the fullest rank."""
    with tempfile.TemporaryDirectory() as parent:
        folder = f"{parent}/model"
        write_model(content_of(case.model), folder, case.dtype)
        plan = case.plan(folder)
        measured = measure(case, folder, plan)
        nothing = Rates("cpu", 1e18, 0.0, *[1e12] * 4, None, 0.0, 1e9, 1e-9, 1e-9, 1e9, 1e9, 1e9, False, True, True)
        of = make_plan(plan, nothing)
    chosen = estimate(of, case.layout, case.ranks, packing=case.packing, replicas=case.replicas)  # type: ignore[arg-type]
    memory, largest = chosen.memory, max(rank["peak"] for rank in measured)
    resident = sum(memory.resident.values())
    return {
        "calculated": memory.total + sum(memory.host.values()),  # a CPU's own memory is also its host's
        "measured": largest,
        "worst": memory.worst,
        "phases": {name: sum(terms.values()) + resident for name, terms in memory.phases.items()},
        "ranks": measured,
    }


def main() -> None:
    """Run the cases that the command line names."""
    torch.set_num_threads(1)  # processes with more threads cannot be forked
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="wide, deep or a config.json; without it every case of the benchmark is run")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--layout", default="single", help="single, ddp, fsdp, hsdp (2 replicas), zero0 to zero3, zero3_offload"
    )
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--packing", default="none", choices=["none", "gather", "resident"])
    parser.add_argument("--window_store", default="full", choices=["full", "bf16", "candidates", "factored"])
    parser.add_argument("--checkpoint", action="store_true")
    parser.add_argument("--teacher", action="store_true", help="distillation from a model of the same shape")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=256)
    args = vars(parser.parse_args())
    store = args.pop("window_store")
    cases = [Case(**args, seft={"window_store": store} if store != "full" else {})] if args["model"] else CASES
    print("| model | type | layout | checkpointing | tokens | largest in | calculated MB | measured MB | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case in cases:
        found = compare(case)
        calculated, measured = found["calculated"], found["measured"]
        print(
            f"| {Path(case.model).name} | {case.dtype} | {case.name} | {'yes' if case.checkpoint else 'no'} | "
            f"{case.batch} x {case.length} | {found['worst']} | {calculated / 1e6:,.0f} | {measured / 1e6:,.0f} | "
            f"{calculated / measured:.2f} |",
            flush=True,
        )
        print({k: round(v / 1e6) for k, v in found["phases"].items()}, found["ranks"], file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
