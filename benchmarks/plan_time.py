"""Seconds of real steps on this machine beside what launch/plan.py predicts from measured rates.

    python benchmarks/plan_time.py

The rates are measured first, by launch/plan.py itself, on matrices of one fixed shape; no case below is used to set them.
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

from plan_memory import SHAPES, measure, plan_of

from seft_dist.config import ClusterConfig, PlanConfig, SeftConfig
from seft_dist.planning.plan import choose, make_plan
from seft_dist.planning.rates import find_rates

CASES = [
    ("smollm2", "single", 1, False, 1, 256),
    ("smollm2", "single", 1, True, 2, 512),
    ("llama-wide", "single", 1, False, 1, 256),
    ("llama-wide", "fsdp", 2, True, 1, 256),
    ("llama-deep", "ddp", 2, False, 1, 256),
    ("llama-deep", "zero3", 2, False, 1, 256),
]
"""(shape, held, ranks, checkpointing, sequences, tokens of each), fp32."""
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def recipe(model: str, checkpoint: bool, batch: int, length: int, ranks: int, rates: str) -> PlanConfig:
    """Eight steps; the fourth has the only evolution after the first step."""
    config = plan_of(model, "float32", checkpoint, batch, length, ranks)
    cluster = ClusterConfig(gpu=rates, nodes=1, gpus_per_node=ranks)
    return dataclasses.replace(config, cluster=cluster, steps=8, seft=SeftConfig(interval=4, window=1, end=4))


def main() -> None:
    """Measure the rates, then every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", help="a file of rates that was measured before")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    shapes = SHAPES | {"smollm2": SMOLLM2}
    print(
        "| model | layout | checkpointing | tokens | s/step planned | measured | ratio | evolution planned | measured | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for shape, content in shapes.items():
            entry = {"model_type": "llama", "vocab_size": 32000, "tie_word_embeddings": False, **content}
            Path(folder, f"{shape}.json").write_text(json.dumps(entry))
        rates = args.rates or f"{folder}/rates.json"
        if not args.rates:
            tiny = [f"--model={folder}/llama-deep.json", "--dtype=float32", "--seq_len=64", "--global_batch=null"]
            cluster = ["--cluster.gpu=cpu", "--cluster.nodes=1", "--cluster.gpus_per_node=2", f"--save_rates={rates}"]
            command = [sys.executable, "launch/plan.py", *tiny, *cluster]
            environment = os.environ | {"OMP_NUM_THREADS": str(cores)}
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
            print(Path(rates).read_text(), file=sys.stderr)
        for shape, held, ranks, checkpoint, batch, length in CASES:
            config = recipe(f"{folder}/{shape}.json", checkpoint, batch, length, ranks, rates)
            seconds = measure(config, held, ranks, threads=max(1, cores // ranks))[0]["seconds"]
            plain, evolving = statistics.median([*seconds[1:3], *seconds[4:]]), seconds[3]
            time = choose(make_plan(config, find_rates(config)), held, ranks).time
            planned = time.seconds + time.window + time.evolution
            print(
                f"| {shape} | {held} {ranks} | {'yes' if checkpoint else 'no'} | {batch} x {length} | {time.seconds:.2f} | "
                f"{plain:.2f} | {time.seconds / plain:.2f} | {planned:.2f} | {evolving:.2f} | {planned / evolving:.2f} |",
                flush=True,
            )
            print(time.step, seconds, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
