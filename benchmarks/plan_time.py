"""Comparison of the duration of real steps on this machine with the predictions of `seft plan`.

    python benchmarks/plan_time.py

The rates are measured first, by `seft plan` itself, on matrices of one fixed shape; no case below is used to set
them.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from plan_memory import SHAPES, Case, content_of, measure, write_model

from seft_dist.config import ClusterConfig
from seft_dist.planning.plan import estimate, make_plan
from seft_dist.planning.rates import find_rates

SHAPES["smollm2"] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
_ONCE: dict[str, Any] = {"steps": 8, "seft": {"interval": 4, "window": 1, "end": 4}}
"""Options of a run of eight steps, of which the first and the fourth have an evolution."""
CASES = [
    Case("smollm2", **_ONCE),
    Case("smollm2", checkpoint=True, batch=2, length=512, **_ONCE),
    Case("wide", **_ONCE),
    Case("wide", "fsdp", 2, checkpoint=True, **_ONCE),
    Case("deep", "ddp", 2, **_ONCE),
    Case("deep", "zero3", 2, **_ONCE),
]
"""The cases, all in fp32."""


def measured_rates(folder: str) -> str:
    """Measure this machine by `seft plan`; returns the path of the file with its rates."""
    file, model = f"{folder}/rates.json", Path(folder, "rates-model.json")
    model.write_text(json.dumps(content_of("deep")))
    tiny = [f"--model={model}", "--dtype=float32", "--seq_len=64", "--global_batch=null"]
    cluster = ["--cluster.gpu=cpu", "--cluster.nodes=1", "--cluster.gpus_per_node=2", f"--save_rates={file}"]
    command = [sys.executable, "launch/plan.py", *tiny, *cluster]
    environment = os.environ | {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    print(Path(file).read_text(), file=sys.stderr)
    return file


def main() -> None:
    """Measure the rates, then every case."""
    torch.set_num_threads(1)  # processes with more threads cannot be forked
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", help="a file of rates that was measured before")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    print(
        "| model | layout | checkpointing | tokens | s/step planned | measured | ratio "
        "| evolution planned | measured | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as parent:
        rates = args.rates or measured_rates(parent)
        for number, case in enumerate(CASES):
            folder = f"{parent}/{number}"
            write_model(content_of(case.model), folder, case.dtype)
            plan = case.plan(folder)
            plan = dataclasses.replace(plan, cluster=ClusterConfig(gpu=rates, nodes=1, gpus_per_node=case.ranks))
            seconds = measure(case, folder, plan, threads=max(1, cores // case.ranks), frees=False)[0]["seconds"]
            plain, evolving = statistics.median([*seconds[1:3], *seconds[4:]]), seconds[3]
            time = estimate(make_plan(plan, find_rates(plan)), case.layout, case.ranks).time  # type: ignore[arg-type]
            planned = time.seconds + time.window + time.evolution
            print(
                f"| {case.model} | {case.name} | {'yes' if case.checkpoint else 'no'} | "
                f"{case.batch} x {case.length} | {time.seconds:.2f} | {plain:.2f} | {time.seconds / plain:.2f} | "
                f"{planned:.2f} | {evolving:.2f} | {planned / evolving:.2f} |",
                flush=True,
            )
            print(time.step, seconds, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
