"""Layouts of a model on ranks, and the options of seft train that choose them."""

from dataclasses import dataclass, replace
from typing import Literal

from seft_dist.config import ClusterConfig, PlanConfig
from seft_dist.data.micro_batches import num_micro_batches
from seft_dist.planning.architectures import ModelShapes, ParameterShape

Packing = Literal["none", "gather", "resident"]
LayoutKind = Literal["single", "ddp", "fsdp", "hsdp", "zero0", "zero1", "zero2", "zero3", "zero3_offload"]


@dataclass(frozen=True)
class Layout:
    """Division of the weights among the ranks."""

    kind: LayoutKind
    """Way of sharding or replicating the weights."""
    world_size: int
    """Number of ranks."""
    per_node: int
    """Number of ranks on a node."""
    replicas: int = 1
    """HSDP: number of groups of ranks that each hold a whole sharded copy."""
    packing: Packing = "none"
    """Packing of the targets, see ``TrainConfig.packing``."""

    @property
    def name(self) -> str:
        """Name of the layout in tables."""
        name = f"hsdp x{self.replicas}" if self.kind == "hsdp" else self.kind
        return name if self.packing == "none" else f"{name}, {self.packing}"

    @property
    def sharded(self) -> bool:
        """A rank stores only its own part of the weights."""
        return self.kind in ("fsdp", "hsdp", "zero3", "zero3_offload")

    @property
    def owners(self) -> int:
        """Number of ranks that divide each weight among themselves."""
        return self.world_size // self.replicas

    @property
    def nodes(self) -> int:
        """Number of nodes in use."""
        return -(-self.world_size // self.per_node)

    def own_numel(self, weight: ParameterShape) -> int:
        """Number of entries of a weight that the fullest rank owns."""
        by_rows = self.kind in ("fsdp", "hsdp")
        return weight.row_shard_numel(self.owners) if by_rows else weight.flat_shard_numel(self.owners)

    def stored_numel(self, weight: ParameterShape) -> int:
        """Number of entries of a weight that the fullest rank stores."""
        return self.own_numel(weight) if self.sharded else weight.numel

    def skew(self, shapes: ModelShapes) -> float:
        """Number of target weights that the fullest rank owns, divided by the mean over ranks."""
        return sum(map(self.own_numel, shapes.targets)) * self.owners / shapes.target_numel

    def empty_ranks(self, shapes: ModelShapes) -> int:
        """Number of ranks in a group of owners that own no part of any target."""
        by_rows = self.kind in ("fsdp", "hsdp")
        lengths = [weight.shape[0] if by_rows else weight.numel for weight in shapes.targets]
        used = max(-(-length // -(-length // self.owners)) for length in lengths)
        return self.owners - used

    def options(self, config: PlanConfig) -> list[str]:
        """Return the options of seft train that choose this layout."""
        if self.kind.startswith("zero"):
            suffix = "_bf16" if config.dtype == "bfloat16" else ""
            return ["--deepspeed", f"ds_configs/{self.kind}{suffix}.json"]
        options = ["--backend", "fsdp" if self.kind == "hsdp" else self.kind]
        options += ["--replicas", str(self.replicas)] if self.kind == "hsdp" else []
        return options + (["--packing", self.packing] if self.packing != "none" else [])


def possible_layouts(cluster: ClusterConfig, world_size: int) -> list[Layout]:
    """List every layout of a model on a number of ranks."""
    if world_size == 1:
        alone = Layout("single", 1, cluster.gpus_per_node)
        return [alone, replace(alone, packing="resident")]
    kinds: tuple[LayoutKind, ...] = ("fsdp", "zero3", "ddp", "zero2", "zero1", "zero0", "zero3_offload")
    layouts = [Layout(kind, world_size, cluster.gpus_per_node) for kind in kinds]
    nodes, rest = divmod(world_size, cluster.gpus_per_node)
    if not rest:  # HSDP is considered for whole nodes only, with a copy of the model on each group of nodes
        layouts += [
            Layout("hsdp", world_size, cluster.gpus_per_node, copies)
            for copies in range(2, nodes + 1)
            if nodes % copies == 0
        ]
    packed = [
        replace(layout, packing=packing)
        for layout in layouts
        if layout.kind in ("fsdp", "hsdp")
        for packing in ("gather", "resident")
    ]
    return layouts + packed


def world_sizes(cluster: ClusterConfig) -> list[int]:
    """Numbers of ranks that a plan considers: powers of two within a node, and of whole nodes, and all nodes."""
    within = [2**i for i in range(cluster.gpus_per_node.bit_length()) if 2**i < cluster.gpus_per_node]
    nodes = [2**i for i in range(cluster.nodes.bit_length()) if 2**i < cluster.nodes]
    return within + [cluster.gpus_per_node * count for count in (*nodes, cluster.nodes)]


def packed_bytes(sparsity: float, item: int) -> float:
    """Mean bytes of a weight in packed form: one bit, and the value of ``item`` bytes if it is not pruned."""
    return 1 / 8 + item * (1 - sparsity)


def micro_batches_of(config: PlanConfig, layout: Layout) -> int:
    """Number of micro-batches of a rank in one step of the planned run."""
    if config.global_batch is None:
        return 1
    return num_micro_batches(config.global_batch, config.batch_size, layout.world_size)
