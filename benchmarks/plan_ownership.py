"""Comparison of planned and real FSDP2 shards of a whole model, for many ranks on one machine (fake process group).

    python benchmarks/plan_ownership.py --model Llama-2-70B --ranks 8 16 64 256 512 768

The model is built on the meta device and sharded by ``fully_shard`` as each of the sampled ranks would; every local
shape is compared with `seft plan`'s partition.
"""

import argparse
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

from seft_dist.backends.shards import fsdp_mesh, shard_fsdp
from seft_dist.io.models import decoder_layers
from seft_dist.planning.architectures import ModelShapes, find_architecture
from seft_dist.planning.layout import Layout
from seft_dist.sparsity.partition import Partition


def local_sizes(shapes: ModelShapes, rank: int, ranks: int) -> dict[str, int]:
    """Number of entries of every parameter on one rank, as fully_shard shards it."""
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(shapes.config)
        mesh = fsdp_mesh(torch.device("cpu"), 1)
        shard_fsdp(model, decoder_layers(model), mesh, False, set())  # type: ignore[arg-type]
        sizes = {}
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor)
            sizes[name] = parameter.to_local().numel()
        return sizes
    finally:
        dist.destroy_process_group()


def check(shapes: ModelShapes, ranks: int, sampled: list[int]) -> str:
    """Compare one number of ranks; returns a line of the table, and raises an error if plan and fully_shard differ."""
    layout = Layout("fsdp", ranks, 8)
    for rank in sampled:
        sizes = local_sizes(shapes, rank, ranks)
        for weight in shapes.weights:
            rows = (weight.shape[0], weight.numel // weight.shape[0])
            planned = len(Partition.rows(rows, ranks).interval(rank))
            assert sizes[weight.name] == planned, (weight.name, rank, sizes[weight.name], planned)
            assert sizes[weight.name] <= layout.own_numel(weight)
    own = sum(map(layout.own_numel, shapes.targets))
    return (
        f"| {ranks} | {len(sampled)} | {own / 1e6:,.1f} | {layout.skew(shapes):.3f} | {layout.empty_ranks(shapes)} | "
        f"{Layout('zero3', ranks, 8).skew(shapes):.6f} |"
    )


def main() -> None:
    """Compare for every number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Llama-2-70B")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512, 768])
    args = parser.parse_args()
    began = time.perf_counter()
    shapes = ModelShapes.of(find_architecture(args.model), "all-linear")
    print(
        "| ranks | ranks compared | own target weights of the fullest, millions "
        "| over the mean | without any | ZeRO-3 |"
    )
    print("|---|---|---|---|---|---|")
    for ranks in args.ranks:
        sampled = sorted({0, 1, ranks // 2, ranks - 2, ranks - 1})
        print(check(shapes, ranks, sampled), flush=True)
    print(f"every shape equal; {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
