"""Memory of the fullest rank, term by term. docs/planning.md has the same formulas in words."""

from dataclasses import dataclass, field

import torch

from seft_dist.config import PlanConfig
from seft_dist.config.teacher import TEACHER_CHUNK
from seft_dist.optim.window import Needs
from seft_dist.planning.architectures import ModelShapes
from seft_dist.planning.layout import Layout, micro_batches_of, packed_bytes
from seft_dist.planning.model_trace import PassCost
from seft_dist.sparsity.partition import position_dtype

_DELTA = 20
"""Bytes of an own delta without its position: base, value, two moments, age."""
_VECTOR = 20
"""Bytes of a trained norm's or bias's value, which every rank has: fp32 value, two moments, gradient, its exchange."""
_RANKED = 8
"""Bytes for each own weight of the layer that is being ranked: the weight and its key."""
ZERO3_LIVE, ZERO3_AHEAD = 1_000_000_000, 50_000_000
"""Numbers of weights that stay gathered until backward, and that are fetched ahead (ds_configs/zero3*.json)."""
DDP_BROADCASTS = 2.0 * (250 << 20)
"""Bytes of the two buckets in which DistributedDataParallel broadcasts the weights when a run begins."""
ITEM_BYTES = {"bfloat16": 2, "float32": 4}
"""Bytes of a weight of each dtype."""

MemoryTerms = dict[str, float]
"""Bytes by the name of what needs them."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of a rank, in bytes."""

    resident: MemoryTerms
    """Memory that is in use all the time."""
    phases: dict[str, MemoryTerms]
    """Additional memory in each phase of a step."""
    reserve: float
    """Memory in use before the first tensor is allocated."""
    margin: float
    """Fragmentation, as a share of the memory of tensors."""
    host: MemoryTerms = field(default_factory=dict)
    """Memory of the node that each rank uses instead of that of its device."""

    @property
    def worst(self) -> str:
        """Name of the phase that needs most memory."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def tensors(self) -> float:
        """Bytes of all tensors in the worst phase."""
        return sum(self.resident.values()) + sum(self.phases[self.worst].values())

    @property
    def total(self) -> float:
        """Bytes of the device that are needed."""
        return self.tensors * (1 + self.margin) + self.reserve

    def terms(self) -> MemoryTerms:
        """Return every term of the worst phase; their sum is ``total``."""
        return {
            **self.resident,
            **self.phases[self.worst],
            "fragmentation": self.margin * self.tensors,
            "reserved (context, libraries)": self.reserve,
        }


def base_weights(config: PlanConfig, shapes: ModelShapes, layout: Layout, item: int) -> MemoryTerms:
    """Memory of the weights as they are stored between their uses."""
    if layout.packing != "resident":
        return {"base weights": float(item * sum(map(layout.stored_numel, shapes.weights)))}
    rest = item * sum(layout.stored_numel(weight) for weight in shapes.weights if not weight.target)
    values = item * (1 - config.sparsity) * sum(map(layout.own_numel, shapes.targets))
    return {
        "base weights, packed values of targets": values,  # the bits are not counted: they are SEFT's masks
        "base weights, dense rest": float(rest),
        "one target, dense": float(item * max(weight.numel for weight in shapes.targets)),
        "memory indices of own deltas": config.seft.density
        * sum(position_dtype(own).itemsize * own for own in map(layout.own_numel, shapes.targets)),
    }


def teacher_weights(config: PlanConfig, shapes: ModelShapes, layout: Layout, item: int) -> MemoryTerms:
    """Memory of the teacher's weights, which are never packed, between their uses."""
    if not config.teacher:
        return {}
    return {"teacher's weights": float(item * sum(map(layout.stored_numel, shapes.weights)))}


def _predictions(config: PlanConfig, shapes: ModelShapes, item: int) -> MemoryTerms:
    """Memory at the loss of what a teacher predicts."""
    if not config.teacher:
        return {}
    tokens, vocabulary = config.batch_size * config.seq_len, shapes.config.get_text_config().vocab_size
    whole = 3.0 * item * tokens * vocabulary  # the teacher's, and those of both models at the learnt tokens
    compared = 4.0 * 4 * min(tokens, TEACHER_CHUNK) * vocabulary  # fp32, for some tokens at a time
    return {"teacher's predictions": whole, "comparison with the teacher": compared}


def gathered(config: PlanConfig, shapes: ModelShapes, layout: Layout, item: int, at_end: bool = False) -> MemoryTerms:
    """Memory of the weights that are gathered at a time, on a rank that stores shards.

    Args:
        config: The planned run.
        shapes: Shapes of the model.
        layout: Layout of the run.
        item: Bytes of a weight.
        at_end: At the end of the backward pass, when ZeRO-3 has released most weights.
    """
    if not layout.sharded:
        return {}
    padded = {w.name: layout.own_numel(w) * layout.owners for w in shapes.weights}
    dense, packed = [0] * len(shapes.kinds), [0.0] * len(shapes.kinds)
    for weight in shapes.weights:
        if weight.layer is not None:
            dense[weight.layer] += padded[weight.name]
            if weight.target:
                packed[weight.layer] += padded[weight.name] * packed_bytes(config.sparsity, item)
    whole = sum(padded.values())
    if layout.kind in ("zero3", "zero3_offload") and not at_end:
        fetched = max(padded.values()) + min(2 * max(dense), ZERO3_AHEAD)
        return {
            "gathered weights, not released yet": min(whole, ZERO3_LIVE) * item,
            "gathered weights, being fetched": min(whole, fetched) * item,
        }
    root = {"gathered embeddings, head": float((whole - sum(dense)) * item)}
    if layout.packing == "resident":
        return {"gathered layers, packed (2)": 2 * max(packed), **root}
    # The layer that is being computed, and the buffer of the next one, which is being fetched
    layers = {"gathered layers (2)": float(2 * max(dense) * item)}
    if layout.packing == "gather":
        layers["gathered layer, packed"] = max(packed)
    return layers | root


def activations(cost: PassCost) -> tuple[MemoryTerms, MemoryTerms]:
    """Memory of activations at the loss, and during the backward pass of the layers."""
    saved = {"activations": cost.saved}
    head = max(0.0, cost.head - cost.saved)
    layers = max(0.0, cost.layers - cost.saved)
    return {**saved, "logits and loss": head}, {**saved, "working tensors of a layer": layers}


def seft_memory(
    config: PlanConfig, shapes: ModelShapes, layout: Layout, cost: PassCost, reserve: float
) -> MemoryEstimate:
    """Estimate the memory of SEFT on the fullest rank.

    Args:
        config: The planned run.
        shapes: Shapes of the model.
        layout: Layout of the run.
        cost: Cost of one micro-batch.
        reserve: Bytes in use before the first tensor is allocated.
    """
    item, needs = ITEM_BYTES[config.dtype], Needs.of_any_step(config.seft)
    own = sum(map(layout.own_numel, shapes.targets))
    deltas = shapes.budget(config.seft.density)
    own_deltas = config.seft.density * own
    rows = sum(weight.target[0] for weight in shapes.targets if weight.target)
    weights = base_weights(config, shapes, layout, item)
    offloaded = layout.kind == "zero3_offload"
    weights |= teacher_weights(config, shapes, layout, item)
    resident = {
        **({} if offloaded else weights),
        "buffers": shapes.buffers,
        "masks": own / 8,
        "own deltas, moments, ages": (_DELTA + shapes.position_bytes) * own_deltas,
        "positions of all deltas": 4 * deltas + 4 * rows,
    }
    if config.seft.train_norms:
        resident["norms and biases, moments, gradients"] = float(_VECTOR * shapes.vector_numel)
    grads = {"gradients of all deltas": 4.0 * deltas}
    earlier = micro_batches_of(config, layout) > 1  # gradients of the micro-batch before are kept
    head, layers = activations(cost)
    head |= _predictions(config, shapes, item)
    whole = gathered(config, shapes, layout, item)
    exchange = {"gradients of all deltas, exchange (3)": 12.0 * deltas}
    phases: dict[str, MemoryTerms] = {
        "loss": {**whole, **head, **(grads if earlier else {})},
        "backward": {**whole, **layers, **(grads if earlier else {})},
        "step": exchange,
    }
    if layout.kind == "ddp":
        phases["begin of the run"] = {"weights that DDP broadcasts": min(weights["base weights"], DDP_BROADCASTS)}
    if layout.kind in ("fsdp", "hsdp"):  # the root's buffer is freed only when the first layer has its weights
        phases["begin of forward"] = {**whole, "buffer of embeddings, head": whole["gathered embeddings, head"]}
    if needs.gradient and (not config.seft.static or config.seft.init == "gradient"):
        window = _window_phases(config, shapes, layout, cost, grads)
        window["evolution"] |= exchange
        if "begin of forward" in phases:
            kept = {key: size for key, size in window["window"].items() if key == "window: accumulated gradient"}
            phases["begin of forward"] |= kept
        phases |= window
    host = weights if offloaded else {}
    return MemoryEstimate(resident, phases, reserve, config.cluster.fragmentation, host)


def _window_phases(
    config: PlanConfig, shapes: ModelShapes, layout: Layout, cost: PassCost, grads: MemoryTerms
) -> dict[str, MemoryTerms]:
    """Additional memory in a step of a window: at the loss, during and at the end of backward, and in the evolution."""
    item, needs = ITEM_BYTES[config.dtype], Needs.of_any_step(config.seft)
    whole, (head, layers) = gathered(config, shapes, layout, item), activations(cost)
    head |= _predictions(config, shapes, item)
    own = sum(map(layout.own_numel, shapes.targets))
    ranking = _ranking(config, needs, max(map(layout.own_numel, shapes.targets)), own)
    if layout.packing == "resident" and (config.seft.reactivation > 0 or config.seft.swap_fraction > 0):
        ranking["masks before the evolution"] = own / 8  # packed weights keep theirs until all are chosen
    sums: MemoryTerms = {}
    if needs.outputs:
        sums = {"window: row and column sums (2)": 8.0 * shapes.window_sums}
    if needs.factored:
        return {
            "loss in a window": {**whole, **head, **sums},
            "window": {**whole, **layers, **sums, **grads},
            "evolution": {**sums, **ranking},
        }
    each = needs.dtype.itemsize
    total = {"window: accumulated gradient": float(each * own), **sums}
    if needs.squares:
        total["window: squares"] = float(each * own)
    # With candidates only the first step is dense; after it only the sums of the candidates are kept
    before = total if config.seft.window > 1 and not needs.candidates else {}
    largest = max(shapes.targets, key=lambda weight: weight.numel)
    # The gradient, what its exchange receives, and fp32 copies of half-precision operands
    dense = 4.0 * largest.numel * (1 + (layout.owners > 1))
    if item < 4:
        dense += 4.0 * config.batch_size * config.seq_len * sum(largest.target or ())
    one = {"window: dense gradient of one weight, exchange": dense}
    step = {**grads, "window: gradient of the step": float(each * own)}
    earlier = micro_batches_of(config, layout) > 1
    phases = {
        "loss in a window": {**whole, **head, **before, **(step if earlier else {})},
        "window": {**whole, **layers, **before, **one, **(step if earlier else {})},
        "evolution": {**total, **ranking},
    }
    if needs.candidates:  # in later steps every rank has the positions and gradients of all candidates of the model
        kinds = 1 + (config.seft.adapts_by == "sensitivity")  # those to grow and those to prune
        kept = min(1.0, (1 + kinds * config.seft.window_candidates) * config.seft.density)
        of_all = {
            "window: candidates, own sums": (8.0 + shapes.position_bytes) * kept * own,
            "window: candidates": 8.0 * kept * shapes.target_numel,
        }
        phases["window of candidates"] = {**whole, **layers, **of_all}
        phases["loss in a window of candidates"] = {**whole, **head, **of_all}
    if not earlier:  # activations are freed while gradients are computed, so the end may need more than the beginning
        rest = {"activations and working tensors of the first layer": cost.first}
        phases["end of a window's backward"] = {
            **gathered(config, shapes, layout, item, True),
            **rest,
            **before,
            **one,
            **step,
        }
    return phases


def _ranking(config: PlanConfig, needs: Needs, largest: int, own: int) -> MemoryTerms:
    """Memory of an evolution's rankings: of one weight at a time, and of lists that cover all of them.

    Args:
        config: The planned run.
        needs: Statistics of the window.
        largest: Number of own positions in the largest target.
        own: The same in all targets.
    """
    # Ranking needs fp32 sums: those of a window that keeps them otherwise are converted for it
    ranked = _RANKED + (4 if needs.factored or needs.candidates or needs.dtype != torch.float32 else 0)
    swaps = config.seft.swap_fraction > 0
    if config.seft.adapts_by == "curvature" or swaps:  # the price
        ranked += 4
    if not swaps:
        return {"ranking of one weight": float(ranked * largest)}
    ranked += ITEM_BYTES[config.dtype] + 4  # the parent's values, as read and in fp32
    # positions and prices of what could leave and what could come, and which of them do
    lists = 40.0 * config.seft.swap_fraction * own
    return {"ranking of one weight": float(ranked * largest), "lists of swaps": lists}


def adam_memory(
    config: PlanConfig, shapes: ModelShapes, layout: Layout, cost: PassCost, reserve: float, trained: str
) -> MemoryEstimate:
    """Estimate the memory of training all weights, or LoRA adapters, with AdamW on the fullest rank.

    Args:
        config: The planned run.
        shapes: Shapes of the model.
        layout: Layout of the run.
        cost: Cost of one micro-batch.
        reserve: Bytes in use before the first tensor is allocated.
        trained: "full" or "lora".
    """
    item = ITEM_BYTES[config.dtype]
    weights = base_weights(config, shapes, layout, item) | teacher_weights(config, shapes, layout, item)
    offloaded = layout.kind == "zero3_offload"
    count = float(shapes.numel if trained == "full" else lora_numel(config, shapes))
    divides_grads = layout.sharded or layout.kind == "zero2"
    divides_state = divides_grads or layout.kind == "zero1"
    states = 12 if item == 2 else 8  # two moments and, of 16-bit weights, a copy in fp32
    resident = {**({} if offloaded else weights), "buffers": float(shapes.buffers)}
    if trained == "lora":
        resident["adapters"] = item * count / (layout.owners if layout.sharded else 1)
    resident["optimizer states"] = states * count / (layout.owners if divides_state else 1)
    grads = {"gradients": item * count / (layout.owners if divides_grads else 1)}
    whole = gathered(config, shapes, layout, item)
    if layout.sharded and trained == "full":
        whole["gradients of a layer"] = item * max(shapes.unit_numels())
    head, layers = activations(cost)
    head |= _predictions(config, shapes, item)
    if trained == "lora":
        tokens = config.batch_size * config.seq_len
        layers["adapters' activations"] = head["adapters' activations"] = (
            item * tokens * config.lora_rank * (1 if config.activation_checkpointing else len(shapes.targets))
        )
    phases = {"loss": {**whole, **head, **grads}, "backward": {**whole, **layers, **grads}, "step": grads}
    host = weights if offloaded else {}
    return MemoryEstimate(resident, phases, reserve, config.cluster.fragmentation, host)


def lora_numel(config: PlanConfig, shapes: ModelShapes) -> int:
    """Number of entries in the adapters of LoRA on all targets."""
    total = 0
    for weight in shapes.targets:
        experts = weight.shape[0] if len(weight.shape) == 3 else 1
        total += config.lora_rank * experts * sum(weight.shape[-2:])
    return total
