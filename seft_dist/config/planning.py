"""Plans of seft plan: a model, a recipe and a cluster, nothing started."""

from dataclasses import dataclass, field
from typing import Literal

from seft_dist.config.checks import check, check_numbers
from seft_dist.config.method import SeftConfig

_NODES, _DEVICES = 100_000, 1024


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Devices that the ranks run on. Values that are left out come from the GPU's data sheet."""

    gpu: str = "H100-80GB"
    """Kind of device: H100-80GB, H200-141GB, A100-80GB, A100-40GB, "cpu" or "cuda" (this machine; its rates are
    measured first, about a minute), or a file of rates that was measured before (see save_rates)."""
    nodes: int = 8
    """Most nodes that may be used."""
    gpus_per_node: int = 8
    """Devices of a node; one rank on each."""
    memory_gb: float | None = None
    """Memory of a device, in 10^9 bytes."""
    tflops: float | None = None
    """Dense peak of a device in the weights' type, 10^12 operations a second."""
    mfu: float = 0.4
    """Share of that peak that training reaches (MFU), above 0, at most 1. Assumed; not used for measured rates."""
    sampled_share: float = 0.25
    """Time of a weight gradient sampled at the deltas over the dense one's. Assumed; not used for measured rates."""
    intra_gb_s: float | None = None
    """Bandwidth of one device inside its node, 10^9 bytes a second, in one direction."""
    inter_gb_s: float | None = None
    """Bandwidth of one whole node to others, 10^9 bytes a second, in one direction."""
    link_share: float = 0.7
    """Share of these bandwidths that collectives reach, above 0, at most 1. Assumed; not used for measured rates."""
    reserve_gb: float | None = None
    """Memory of a device that is gone before the first tensor (context, libraries, communication buffers), in 10^9
    bytes. None: 2 on a GPU; measured for a CPU."""
    fragmentation: float = 0.05
    """Memory lost to fragmentation, as a share of what tensors need. An assumption."""

    def __post_init__(self) -> None:
        check_numbers(self, "cluster.")
        check(1 <= self.nodes <= _NODES, f"cluster.nodes={self.nodes}", f"1 to {_NODES}")
        devices = self.gpus_per_node
        check(1 <= devices <= _DEVICES, f"cluster.gpus_per_node={devices}", f"1 to {_DEVICES}")
        for name in ("memory_gb", "tflops", "intra_gb_s", "inter_gb_s"):
            value = getattr(self, name)
            check(value is None or value > 0, f"cluster.{name}={value}", "a number above 0")
        for name in ("mfu", "sampled_share", "link_share"):
            value = getattr(self, name)
            check(0 < value <= 1, f"cluster.{name}={value}", "a share above 0 and at most 1")
        check(0 <= self.fragmentation < 1, f"cluster.fragmentation={self.fragmentation}", "a share from 0 to below 1")
        check(
            self.reserve_gb is None or self.reserve_gb >= 0, f"cluster.reserve_gb={self.reserve_gb}", "a number from 0"
        )


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """A run to be planned: its model, its settings and the cluster."""

    model: str
    """A name (Llama-2-7B, Llama-2-13B, Llama-2-70B, Llama-3-8B, Llama-3-70B, Mistral-7B, Qwen2.5-72B, DeepSeek-V3), a
    model's folder, or a config.json. No weights are read."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    seft: SeftConfig = field(default_factory=SeftConfig)
    sparsity: float = 0.6
    """Share of pruned weights in the targets, 0 to below 1."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the weights."""
    activation_checkpointing: bool = True
    """Keep only each decoder layer's input and compute the layer again in backward."""
    teacher: bool = False
    """Distillation from a dense teacher of the model's shape, held as the model is (docs/distillation.md)."""
    steps: int = 1000
    """Optimizer steps of the run."""
    batch_size: int = 1
    """Most sequences of a rank in one forward pass."""
    global_batch: int | None = 128
    """Sequences of one optimizer step over all ranks. None: batch_size for each rank."""
    seq_len: int = 4096
    """Tokens of a sequence."""
    lora_rank: int = 16
    """Rank of the LoRA that is compared with."""
    output: str | None = None
    """Also write the plan, with every term, as JSON to this file."""
    save_rates: str | None = None
    """With cluster.gpu cpu or cuda: write the measured rates to this file, for later plans."""

    def __post_init__(self) -> None:
        check_numbers(self)
        check(bool(self.model), "model is empty", "a name, a folder or a config.json")
        check(0 <= self.sparsity < 1, f"sparsity={self.sparsity}", "a share from 0 to below 1")
        check(
            self.seft.density <= 1 - self.sparsity,
            f"seft.density={self.seft.density} with sparsity={self.sparsity}",
            "no more deltas than active weights: a lower density",
        )
        for name in ("steps", "batch_size", "lora_rank"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)}", "at least 1")
        check(self.global_batch is None or self.global_batch >= 1, f"global_batch={self.global_batch}", "at least 1")
        check(self.seq_len >= 2, f"seq_len={self.seq_len}", "at least 2 tokens")
        check(
            self.save_rates is None or self.cluster.gpu in ("cpu", "cuda"),
            f"save_rates={self.save_rates} with cluster.gpu={self.cluster.gpu}",
            "cluster.gpu cpu or cuda",
        )
