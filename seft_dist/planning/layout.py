"""Ways of holding a model on ranks, and what launch/train.py is told to get each of them."""

from dataclasses import dataclass, replace
from typing import Literal

from seft_dist.config import ClusterConfig, PlanConfig
from seft_dist.planning.architectures import Shapes, Weight

Packing = Literal["none", "gather", "resident"]
Held = Literal["single", "ddp", "fsdp", "hsdp", "zero0", "zero1", "zero2", "zero3", "zero3_offload"]


@dataclass(frozen=True)
class Layout:
    """How ranks hold the weights."""

    held: Held
    world_size: int
    per_node: int
    """Ranks on a node."""
    replicas: int = 1
    """HSDP: groups of ranks that each hold a whole sharded copy."""
    packing: Packing = "none"
    """As ``TrainConfig.packing``."""

    @property
    def name(self) -> str:
        """For tables."""
        name = f"hsdp x{self.replicas}" if self.held == "hsdp" else self.held
        return name if self.packing == "none" else f"{name}, {self.packing}"

    @property
    def sharded(self) -> bool:
        """Whether a rank stores only its own part of the weights."""
        return self.held in ("fsdp", "hsdp", "zero3", "zero3_offload")

    @property
    def owners(self) -> int:
        """Ranks that divide each weight among themselves."""
        return self.world_size // self.replicas

    @property
    def nodes(self) -> int:
        """Nodes in use."""
        return -(-self.world_size // self.per_node)

    def own(self, weight: Weight) -> int:
        """Entries of a weight that the fullest rank owns."""
        return weight.rows_of(self.owners) if self.held in ("fsdp", "hsdp") else weight.flat_of(self.owners)

    def stored(self, weight: Weight) -> int:
        """Entries of a weight that the fullest rank stores."""
        return self.own(weight) if self.sharded else weight.numel

    def skew(self, shapes: Shapes) -> float:
        """Target weights of the fullest rank over the mean."""
        return sum(map(self.own, shapes.targets)) * self.owners / shapes.target_numel

    def empty_ranks(self, shapes: Shapes) -> int:
        """Ranks of a group of owners that own nothing of any target."""
        by_rows = self.held in ("fsdp", "hsdp")
        lengths = [weight.shape[0] if by_rows else weight.numel for weight in shapes.targets]
        used = max(-(-length // -(-length // self.owners)) for length in lengths)
        return self.owners - used

    def options(self, config: PlanConfig) -> list[str]:
        """Options of launch/train.py that choose this layout."""
        if self.held.startswith("zero"):
            suffix = "_bf16" if config.dtype == "bfloat16" else ""
            return ["--deepspeed", f"ds_configs/{self.held}{suffix}.json"]
        options = ["--backend", "fsdp" if self.held == "hsdp" else self.held]
        options += ["--replicas", str(self.replicas)] if self.held == "hsdp" else []
        return options + (["--packing", self.packing] if self.packing != "none" else [])


def layouts(cluster: ClusterConfig, world_size: int) -> list[Layout]:
    """Every way of holding a model on a number of ranks."""
    if world_size == 1:
        alone = Layout("single", 1, cluster.gpus_per_node)
        return [alone, replace(alone, packing="resident")]
    kinds: tuple[Held, ...] = ("fsdp", "zero3", "ddp", "zero2", "zero1", "zero0", "zero3_offload")
    found = [Layout(held, world_size, cluster.gpus_per_node) for held in kinds]
    nodes, rest = divmod(world_size, cluster.gpus_per_node)
    if not rest:  # whole nodes: copies of the model on groups of nodes
        found += [
            Layout("hsdp", world_size, cluster.gpus_per_node, copies)
            for copies in range(2, nodes + 1)
            if nodes % copies == 0
        ]
    packed = [
        replace(layout, packing=packing)
        for layout in found
        if layout.held in ("fsdp", "hsdp")
        for packing in ("gather", "resident")
    ]
    return found + packed


def world_sizes(cluster: ClusterConfig) -> list[int]:
    """Numbers of ranks worth looking at: within a node, then whole nodes; each about twice the last."""
    within = [2**i for i in range(cluster.gpus_per_node.bit_length()) if 2**i < cluster.gpus_per_node]
    nodes = [2**i for i in range(cluster.nodes.bit_length()) if 2**i < cluster.nodes]
    return within + [cluster.gpus_per_node * count for count in (*nodes, cluster.nodes)]


def packed_bytes(sparsity: float, item: int) -> float:
    """Bytes of a packed weight: one bit, and a value if it is not pruned."""
    return 1 / 8 + item * (1 - sparsity)


def micro_batches(config: PlanConfig, layout: Layout) -> int:
    """Forward passes of a rank in a step."""
    if config.global_batch is None:
        return 1
    return -(-config.global_batch // (config.batch_size * layout.world_size))
