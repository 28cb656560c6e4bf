"""Duration of a step and of a run. docs/planning.md has the formulas."""

import dataclasses
from dataclasses import dataclass

from seft_dist.config import PlanConfig, SeftConfig
from seft_dist.optim.window import Needs
from seft_dist.planning import traffic
from seft_dist.planning.architectures import ModelShapes
from seft_dist.planning.hardware import Rates
from seft_dist.planning.layout import Layout, micro_batches_of
from seft_dist.planning.memory import ITEM_BYTES, lora_numel
from seft_dist.planning.model_trace import PassCost
from seft_dist.planning.traffic import Links, Traffic
from seft_dist.sparsity.schedule import in_window, is_evolution


@dataclass(frozen=True)
class TimeEstimate:
    """Estimated time of a run in seconds, and the bytes that one rank sends."""

    step: dict[str, float]
    """Parts of an ordinary step."""
    window: float
    """Additional time in each step of a window."""
    evolution: float
    """Additional time in each step with an evolution."""
    windows: int
    """Number of steps in the run that are in a window."""
    evolutions: int
    """Number of evolutions in the run."""
    sent_step: list[Traffic]
    """Traffic of an ordinary step."""
    sent_window: list[Traffic]
    """Additional traffic in each step of a window."""
    sent_evolution: list[Traffic]
    """Additional traffic in each step with an evolution."""
    steps: int
    """Number of steps in the run."""
    tokens: int
    """Number of tokens in a step, over all ranks."""

    @property
    def seconds(self) -> float:
        """Seconds of an ordinary step."""
        return sum(self.step.values())

    @property
    def hours(self) -> float:
        """Hours of the whole run."""
        total = self.steps * self.seconds + self.windows * self.window + self.evolutions * self.evolution
        return total / 3600

    @property
    def tokens_per_second(self) -> float:
        """Mean over the whole run."""
        return self.steps * self.tokens / (3600 * self.hours)


def tokens_per_step(config: PlanConfig, layout: Layout) -> int:
    """Number of tokens in a step, over all ranks."""
    return config.seq_len * (config.global_batch or config.batch_size * layout.world_size)


def dense_flops(config: PlanConfig, shapes: ModelShapes, cost: PassCost) -> float:
    """Floating-point operations of the dense gradients of all targets in one micro-batch.

    They are as many as those of the targets' forward pass, which is the traced cost of the pass, without the output
    head, divided by the number of times that a product of the same size is computed.
    """
    passes = 3 if config.activation_checkpointing else 2
    head = next((w.numel for w in shapes.weights if w.layer is None and w.target is None and len(w.shape) == 2), 0)
    tokens = config.batch_size * config.seq_len
    return (cost.matmul - 4.0 * tokens * head) / passes


def seft_time(config: PlanConfig, shapes: ModelShapes, layout: Layout, cost: PassCost, rates: Rates) -> TimeEstimate:
    """Estimate the time of a run with SEFT.

    Args:
        config: The planned run.
        shapes: Shapes of the model.
        layout: Layout of the run.
        cost: Cost of one micro-batch.
        rates: Rates of one rank.
    """
    item, links, micro = (
        ITEM_BYTES[config.dtype],
        Links(layout, rates),
        micro_batches_of(config, layout),
    )
    deltas = shapes.budget(config.seft.density)
    own = sum(map(layout.own_numel, shapes.targets))
    compute = micro * _pass(cost, rates)
    taught = micro * _teacher_pass(config, cost, rates)
    weight_grads = dense_flops(config, shapes, cost)
    dense = micro * weight_grads / rates.dense
    # The time of sampling is linear in the density, and that of a dense product does not depend on it
    sampled = min(dense, micro * weight_grads * deltas / shapes.target_numel / rates.sampled)
    sent = traffic.gathers(config, shapes, links, item, micro)
    waits = sum(s.seconds for s in sent)
    decoding = micro * _decoded(config, shapes, layout, item) / rates.decode
    exchanges = traffic.seft_step(config, shapes, links, item)
    step = {
        "forward and backward": compute,
        **({"teacher's forward": taught} if taught else {}),
        "sampled gradients": sampled,
        **({"decoding packed weights": decoding} if decoding else {}),
        "waiting for weights": max(0.0, waits - compute - taught) if rates.overlaps else waits,
        "exchange of gradients": sum(s.seconds for s in exchanges),
        "update": rates.update * config.seft.density * own,
    }
    sent_window = traffic.seft_window(config, shapes, links, micro)
    sent_evolution = traffic.seft_evolution(config, shapes, links, item)
    method = dataclasses.replace(config.seft, steps=config.steps)
    number = range(1, config.steps + 1)
    first = int(config.seft.init == "gradient")
    return TimeEstimate(
        step=step,
        window=(dense - sampled if sent_window else 0.0) + sum(s.seconds for s in sent_window),
        evolution=rates.evolve * own + sum(s.seconds for s in sent_evolution),
        windows=_dense_steps(method, config.steps) if sent_window else 0,
        evolutions=sum(is_evolution(method, t) for t in number) + first,
        sent_step=[*sent, *exchanges],
        sent_window=sent_window,
        sent_evolution=sent_evolution,
        steps=config.steps,
        tokens=tokens_per_step(config, layout),
    )


def _dense_steps(method: SeftConfig, steps: int) -> int:
    """Number of steps in a run that compute dense gradients."""
    begins = {t for t in range(1, steps + 1) if in_window(method, t) and not (t > 1 and in_window(method, t - 1))}
    if method.window_store != "candidates":
        begins = {t for t in range(1, steps + 1) if in_window(method, t)}
    if not Needs.of(method).dense:
        begins = set()  # only the first support reads the gradient
    return len(begins | ({1} if method.init == "gradient" else set()))


def adam_time(
    config: PlanConfig, shapes: ModelShapes, layout: Layout, cost: PassCost, rates: Rates, trained: str
) -> TimeEstimate:
    """Estimate the time of training all weights ("full"), or LoRA adapters ("lora"), with AdamW.

    Args:
        config: The planned run.
        shapes: Shapes of the model.
        layout: Layout of the run.
        cost: Cost of one micro-batch.
        rates: Rates of one rank.
        trained: "full" or "lora".
    """
    item, links, micro = (
        ITEM_BYTES[config.dtype],
        Links(layout, rates),
        micro_batches_of(config, layout),
    )
    count = shapes.numel if trained == "full" else lora_numel(config, shapes)
    if trained == "full":
        more = dense_flops(config, shapes, cost)
    else:
        more = 6.0 * count * config.batch_size * config.seq_len * (4 / 3 if config.activation_checkpointing else 1)
    compute = micro * (_pass(cost, rates) + more / rates.matmul + _teacher_pass(config, cost, rates))
    sent = traffic.gathers(config, shapes, links, item, micro)
    waits = sum(s.seconds for s in sent)
    exchanges = [s.times(micro if layout.sharded else 1) for s in traffic.adam_step(shapes, links, item, count)]
    exchanged = sum(s.seconds for s in exchanges)
    step = {
        "forward and backward": compute,
        "waiting for weights and gradients": max(0.0, waits + exchanged - compute)
        if rates.overlaps
        else waits + exchanged,
        "update": rates.update * count / layout.owners / 4,  # contiguous, so faster than the scattered update of deltas
    }
    return TimeEstimate(
        step, 0.0, 0.0, 0, 0, [*sent, *exchanges], [], [], config.steps, tokens_per_step(config, layout)
    )


def _decoded(config: PlanConfig, shapes: ModelShapes, layout: Layout, item: int) -> float:
    """Bytes of dense weights that a micro-batch decodes from packed ones, each time a layer is computed or gathered."""
    passes = {"none": 0, "gather": 2, "resident": 3 if config.activation_checkpointing else 2}
    return float(passes[layout.packing] * item * shapes.target_numel)


def _teacher_pass(config: PlanConfig, cost: PassCost, rates: Rates) -> float:
    """Seconds of a teacher's forward pass, as a share of the model's own pass (without its weight gradients)."""
    return _pass(cost, rates) / (3 if config.activation_checkpointing else 2) if config.teacher else 0.0


def _pass(cost: PassCost, rates: Rates) -> float:
    """Seconds of one forward and backward pass without communication."""
    moved = cost.moved / rates.moved if rates.moved else 0.0
    return cost.matmul / rates.matmul + cost.attention / rates.attention + moved + cost.calls * rates.call
