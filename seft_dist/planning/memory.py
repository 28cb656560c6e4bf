"""Bytes of the fullest rank, term by term. docs/planning.md has the same formulas in words."""

from dataclasses import dataclass, field

import torch

from seft_dist.config import PlanConfig
from seft_dist.optim.window import Needs
from seft_dist.planning.architectures import Shapes
from seft_dist.planning.layout import Layout, micro_batches, packed_bytes
from seft_dist.planning.model_trace import Work
from seft_dist.sparsity.partition import position_dtype

GB = 1e9
_DELTA = 20
"""Bytes of an own delta beside its position: base, value, two moments, age."""
_RANKED = 8
"""Bytes for each own weight of the layer that is being ranked: the weight and its key."""
ZERO3_LIVE, ZERO3_AHEAD = 1_000_000_000, 50_000_000
"""Of ds_configs/zero3*.json: weights that stay gathered from forward to backward, and that are fetched ahead."""
DDP_BROADCASTS = 2.0 * (250 << 20)
"""Bytes of the two buckets in which DistributedDataParallel has weights on their way when a run begins."""
_ITEM = {"bfloat16": 2, "float32": 4}

Terms = dict[str, float]


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank."""

    resident: Terms
    """What stays from step to step."""
    phases: dict[str, Terms]
    """What is added in each part of a step."""
    reserve: float
    """Gone before the first tensor."""
    margin: float
    """Fragmentation, as a share of what tensors need."""
    host: Terms = field(default_factory=dict)
    """In the node's own memory instead, for each rank."""

    @property
    def worst(self) -> str:
        """The phase with the largest need."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def tensors(self) -> float:
        """Bytes of all tensors in the worst phase."""
        return sum(self.resident.values()) + sum(self.phases[self.worst].values())

    @property
    def total(self) -> float:
        """Bytes needed of the device."""
        return self.tensors * (1 + self.margin) + self.reserve

    def terms(self) -> Terms:
        """Every term of the worst phase; they add up to ``total``."""
        return {
            **self.resident,
            **self.phases[self.worst],
            "fragmentation": self.margin * self.tensors,
            "reserved (context, libraries)": self.reserve,
        }


def base_weights(config: PlanConfig, shapes: Shapes, layout: Layout, item: int) -> Terms:
    """The weights at rest."""
    if layout.packing != "resident":
        return {"base weights": float(item * sum(map(layout.stored, shapes.weights)))}
    rest = item * sum(layout.stored(weight) for weight in shapes.weights if not weight.target)
    values = item * (1 - config.sparsity) * sum(map(layout.own, shapes.targets))
    return {
        "base weights, packed values of targets": values,  # their bits are the masks
        "base weights, dense rest": float(rest),
        "one target, dense": float(item * max(weight.numel for weight in shapes.targets)),
        "places of own deltas": config.seft.density
        * sum(position_dtype(own).itemsize * own for own in map(layout.own, shapes.targets)),
    }


def gathered(config: PlanConfig, shapes: Shapes, layout: Layout, item: int, at_end: bool = False) -> Terms:
    """Weights that are whole for a while on a rank that stores shards.

    Args:
        config: The recipe.
        shapes: The model's.
        layout: How it is held.
        item: Bytes of a weight.
        at_end: In the backward pass of the first layers.
    """
    if not layout.sharded:
        return {}
    padded = {w.name: layout.own(w) * layout.owners for w in shapes.weights}
    dense, packed = [0] * len(shapes.kinds), [0.0] * len(shapes.kinds)
    for weight in shapes.weights:
        if weight.layer is not None:
            dense[weight.layer] += padded[weight.name]
            if weight.target:
                packed[weight.layer] += padded[weight.name] * packed_bytes(config.sparsity, item)
    whole = sum(padded.values())
    if layout.held in ("zero3", "zero3_offload") and not at_end:
        fetched = max(padded.values()) + min(2 * max(dense), ZERO3_AHEAD)
        return {
            "gathered weights, not released yet": min(whole, ZERO3_LIVE) * item,
            "gathered weights, being fetched": min(whole, fetched) * item,
        }
    root = {"gathered embeddings, head": float((whole - sum(dense)) * item)}
    if layout.packing == "resident":
        return {"gathered layers, packed (2)": 2 * max(packed), **root}
    # The layer that is computed, and the buffer of the one that is fetched.
    layers = {"gathered layers (2)": float(2 * max(dense) * item)}
    if layout.packing == "gather":
        layers["gathered layer, packed"] = max(packed)
    return layers | root


def activations(work: Work) -> tuple[Terms, Terms]:
    """What lives at the loss, and while layers are differentiated."""
    saved = {"activations": work.saved}
    head = max(0.0, work.head - work.saved)
    layers = max(0.0, work.layers - work.saved)
    return {**saved, "logits and loss": head}, {**saved, "working tensors of a layer": layers}


def seft_memory(config: PlanConfig, shapes: Shapes, layout: Layout, work: Work, reserve: float) -> Memory:
    """What SEFT needs on the fullest rank.

    Args:
        config: The recipe.
        shapes: The model's.
        layout: How it is held.
        work: Of one micro-batch.
        reserve: Bytes that are gone before the first tensor.
    """
    item, needs = _ITEM[config.dtype], Needs.of(config.seft)
    own = sum(map(layout.own, shapes.targets))
    deltas = shapes.budget(config.seft.density)
    own_deltas = config.seft.density * own
    rows = sum(weight.target[0] for weight in shapes.targets if weight.target)
    weights = base_weights(config, shapes, layout, item)
    offloaded = layout.held == "zero3_offload"
    resident = {
        **({} if offloaded else weights),
        "buffers": shapes.buffers,
        "masks": own / 8,
        "own deltas, moments, ages": (_DELTA + shapes.position_bytes) * own_deltas,
        "positions of all deltas": 4 * deltas + 4 * rows,
    }
    grads = {"gradients of all deltas": 4.0 * deltas}
    earlier = micro_batches(config, layout) > 1  # a micro-batch finds the gradients of those before it
    head, layers = activations(work)
    whole = gathered(config, shapes, layout, item)
    exchange = {"gradients of all deltas, exchange (3)": 12.0 * deltas}
    phases: dict[str, Terms] = {
        "loss": {**whole, **head, **(grads if earlier else {})},
        "backward": {**whole, **layers, **(grads if earlier else {})},
        "step": exchange,
    }
    if layout.held == "ddp":
        phases["begin of the run"] = {"weights that DDP broadcasts": min(weights["base weights"], DDP_BROADCASTS)}
    if layout.held in ("fsdp", "hsdp"):  # the root's buffer lives until the first layer has its weights
        phases["begin of forward"] = {**whole, "buffer of embeddings, head": whole["gathered embeddings, head"]}
    if needs.gradient and (not config.seft.static or config.seft.init == "gradient"):
        window = _window_phases(config, shapes, layout, work, grads)
        window["evolution"] |= exchange
        if "begin of forward" in phases:
            kept = {key: size for key, size in window["window"].items() if key == "window: accumulated gradient"}
            phases["begin of forward"] |= kept
        phases |= window
    host = weights if offloaded else {}
    return Memory(resident, phases, reserve, config.cluster.fragmentation, host)


def _window_phases(config: PlanConfig, shapes: Shapes, layout: Layout, work: Work, grads: Terms) -> dict[str, Terms]:
    """A window's step: the loss, its backward pass at the first and at the last layer, and the evolution after it."""
    item, needs = _ITEM[config.dtype], Needs.of(config.seft)
    whole, (head, layers) = gathered(config, shapes, layout, item), activations(work)
    own = sum(map(layout.own, shapes.targets))
    # the window's sums are in fp32 only where they are kept whole and so
    ranked = _RANKED + (4 if needs.factored or needs.candidates or needs.dtype != torch.float32 else 0)
    ranking = {"ranking of one weight": float(ranked * max(map(layout.own, shapes.targets)))}
    if needs.factored:
        sums = {"window: row and column sums (2)": 8.0 * sum(sum(w.target) for w in shapes.targets if w.target)}
        return {
            "loss in a window": {**whole, **head, **sums},
            "window": {**whole, **layers, **sums, **grads},
            "evolution": {**sums, **ranking},
        }
    each = needs.dtype.itemsize
    total = {"window: accumulated gradient": float(each * own)}
    if needs.squares:
        total["window: squares"] = float(each * own)
    # of candidates only their own sums are left after the first step, the only dense one
    before = total if config.seft.window > 1 and not needs.candidates else {}
    largest = max(shapes.targets, key=lambda weight: weight.numel)
    # the gradient and what its exchange receives; of half-precision operands also copies in fp32
    dense = 4.0 * largest.numel * (1 + (layout.owners > 1))
    if item < 4:
        dense += 4.0 * config.batch_size * config.seq_len * sum(largest.target or ())
    one = {"window: dense gradient of one weight, exchange": dense}
    step = {**grads, "window: gradient of the step": float(each * own)}
    earlier = micro_batches(config, layout) > 1
    found = {
        "loss in a window": {**whole, **head, **before, **(step if earlier else {})},
        "window": {**whole, **layers, **before, **one, **(step if earlier else {})},
        "evolution": {**total, **ranking},
    }
    if needs.candidates:  # later steps: their positions and gradients are the whole model's on every rank
        kept = min(1.0, (1 + 2 * config.seft.window_candidates) * config.seft.density)
        of_all = {
            "window: candidates, own sums": (8.0 + shapes.position_bytes) * kept * own,
            "window: candidates": 8.0 * kept * shapes.target_numel,
        }
        found["window of candidates"] = {**whole, **layers, **of_all}
        found["loss in a window of candidates"] = {**whole, **head, **of_all}
    if not earlier:  # activations go as gradients come
        rest = {"activations and working tensors of the first layer": work.first}
        found["end of a window's backward"] = {
            **gathered(config, shapes, layout, item, True),
            **rest,
            **before,
            **one,
            **step,
        }
    return found


def adam_memory(config: PlanConfig, shapes: Shapes, layout: Layout, work: Work, reserve: float, trained: str) -> Memory:
    """What AdamW needs on the fullest rank, for all weights or for adapters.

    Args:
        config: The recipe.
        shapes: The model's.
        layout: How it is held.
        work: Of one micro-batch.
        reserve: Bytes that are gone before the first tensor.
        trained: "full" or "lora".
    """
    item = _ITEM[config.dtype]
    weights = base_weights(config, shapes, layout, item)
    offloaded = layout.held == "zero3_offload"
    count = float(shapes.numel if trained == "full" else lora_numel(config, shapes))
    divides_grads = layout.sharded or layout.held == "zero2"
    divides_state = divides_grads or layout.held == "zero1"
    states = 12 if item == 2 else 8  # fp32 copy and two moments
    resident = {**({} if offloaded else weights), "buffers": float(shapes.buffers)}
    if trained == "lora":
        resident["adapters"] = item * count / (layout.owners if layout.sharded else 1)
    resident["optimizer states"] = states * count / (layout.owners if divides_state else 1)
    grads = {"gradients": item * count / (layout.owners if divides_grads else 1)}
    whole = gathered(config, shapes, layout, item)
    if layout.sharded and trained == "full":
        whole["gradients of a layer"] = item * max(shapes.unit_numels())
    head, layers = activations(work)
    if trained == "lora":
        tokens = config.batch_size * config.seq_len
        layers["adapters' activations"] = head["adapters' activations"] = (
            item * tokens * config.lora_rank * (1 if config.activation_checkpointing else len(shapes.targets))
        )
    phases = {"loss": {**whole, **head, **grads}, "backward": {**whole, **layers, **grads}, "step": grads}
    host = weights if offloaded else {}
    return Memory(resident, phases, reserve, config.cluster.fragmentation, host)


def lora_numel(config: PlanConfig, shapes: Shapes) -> int:
    """Parameters of LoRA on all targets."""
    total = 0
    for weight in shapes.targets:
        experts = weight.shape[0] if len(weight.shape) == 3 else 1
        total += config.lora_rank * experts * sum(weight.shape[-2:])
    return total
