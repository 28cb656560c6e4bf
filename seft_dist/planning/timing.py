"""Seconds of a step and of a run. docs/planning.md has the formulas."""

import dataclasses
from dataclasses import dataclass

from seft_dist.config import PlanConfig, SeftConfig
from seft_dist.planning import traffic
from seft_dist.planning.architectures import Shapes
from seft_dist.planning.hardware import Rates
from seft_dist.planning.layout import Layout, micro_batches
from seft_dist.planning.memory import lora_numel
from seft_dist.planning.model_trace import Work
from seft_dist.planning.traffic import Links, Sent
from seft_dist.sparsity.schedule import in_window, is_evolution


@dataclass(frozen=True)
class Time:
    """Seconds, part by part, and what is sent in them by one rank."""

    step: dict[str, float]
    """Of an ordinary step."""
    window: float
    """More in each step of a window."""
    evolution: float
    """More in each step with an evolution."""
    windows: int
    """Steps in a window, in the whole run."""
    evolutions: int
    sent_step: list[Sent]
    sent_window: list[Sent]
    sent_evolution: list[Sent]
    steps: int
    tokens: int
    """Of a step."""

    @property
    def seconds(self) -> float:
        """Of an ordinary step."""
        return sum(self.step.values())

    @property
    def hours(self) -> float:
        """Of the whole run."""
        total = self.steps * self.seconds + self.windows * self.window + self.evolutions * self.evolution
        return total / 3600

    @property
    def tokens_per_second(self) -> float:
        """Over the whole run."""
        return self.steps * self.tokens / (3600 * self.hours)


def tokens_of(config: PlanConfig, layout: Layout) -> int:
    """Tokens of a step over all ranks."""
    return config.seq_len * (config.global_batch or config.batch_size * layout.world_size)


def dense_flops(config: PlanConfig, shapes: Shapes, work: Work) -> float:
    """Of the weight gradients of all targets, one micro-batch: as many as their forward pass."""
    passes = 3 if config.activation_checkpointing else 2
    head = next((w.numel for w in shapes.weights if w.layer is None and w.target is None and len(w.shape) == 2), 0)
    tokens = config.batch_size * config.seq_len
    return (work.matmul - 4.0 * tokens * head) / passes


def seft_time(config: PlanConfig, shapes: Shapes, layout: Layout, work: Work, rates: Rates) -> Time:
    """What SEFT takes.

    Args:
        config: The recipe.
        shapes: The model's.
        layout: How it is held.
        work: Of one micro-batch.
        rates: Of one rank.
    """
    item, links, micro = (2 if config.dtype == "bfloat16" else 4), Links(layout, rates), micro_batches(config, layout)
    deltas = shapes.budget(config.seft.density)
    own = sum(map(layout.own, shapes.targets))
    compute = micro * _pass(work, rates)
    weight_grads = dense_flops(config, shapes, work)
    sampled = micro * weight_grads * deltas / shapes.target_numel / rates.sampled
    sent = traffic.gathers(config, shapes, links, item, micro)
    waits = sum(s.seconds for s in sent)
    decoding = micro * _decoded(config, shapes, layout, item) / rates.decode
    exchanges = traffic.seft_step(config, shapes, links, item)
    step = {
        "forward and backward": compute,
        "sampled gradients": sampled,
        **({"decoding packed weights": decoding} if decoding else {}),
        "waiting for weights": max(0.0, waits - compute) if rates.overlaps else waits,
        "exchange of gradients": sum(s.seconds for s in exchanges),
        "update": rates.update * config.seft.density * own,
    }
    sent_window = traffic.seft_window(config, shapes, links, micro)
    dense = micro * weight_grads / rates.dense - sampled if sent_window else 0.0
    sent_evolution = traffic.seft_evolution(config, shapes, links, item)
    method = dataclasses.replace(config.seft, steps=config.steps)
    number = range(1, config.steps + 1)
    first = int(config.seft.init == "gradient")
    return Time(
        step=step,
        window=max(0.0, dense) + sum(s.seconds for s in sent_window),
        evolution=rates.evolve * own + sum(s.seconds for s in sent_evolution),
        windows=_dense_steps(method, config.steps) if sent_window else 0,
        evolutions=sum(is_evolution(method, t) for t in number) + first,
        sent_step=[*sent, *exchanges],
        sent_window=sent_window,
        sent_evolution=sent_evolution,
        steps=config.steps,
        tokens=tokens_of(config, layout),
    )


def _dense_steps(method: SeftConfig, steps: int) -> int:
    """Steps of a run that compute dense gradients."""
    begins = {t for t in range(1, steps + 1) if in_window(method, t) and not (t > 1 and in_window(method, t - 1))}
    if method.window_store != "candidates":
        begins = {t for t in range(1, steps + 1) if in_window(method, t)}
    return len(begins | ({1} if method.init == "gradient" else set()))


def adam_time(config: PlanConfig, shapes: Shapes, layout: Layout, work: Work, rates: Rates, trained: str) -> Time:
    """What AdamW takes, for all weights ("full") or for adapters ("lora")."""
    item, links, micro = (2 if config.dtype == "bfloat16" else 4), Links(layout, rates), micro_batches(config, layout)
    count = shapes.numel if trained == "full" else lora_numel(config, shapes)
    if trained == "full":
        more = dense_flops(config, shapes, work)
    else:
        more = 6.0 * count * config.batch_size * config.seq_len * (4 / 3 if config.activation_checkpointing else 1)
    compute = micro * (_pass(work, rates) + more / rates.matmul)
    sent = traffic.gathers(config, shapes, links, item, micro)
    waits = sum(s.seconds for s in sent)
    exchanges = [s.times(micro if layout.sharded else 1) for s in traffic.adam_step(shapes, links, item, count)]
    exchanged = sum(s.seconds for s in exchanges)
    step = {
        "forward and backward": compute,
        "waiting for weights and gradients": max(0.0, waits + exchanged - compute)
        if rates.overlaps
        else waits + exchanged,
        "update": rates.update * count / layout.owners / 4,  # in order, not scattered
    }
    return Time(step, 0.0, 0.0, 0, 0, [*sent, *exchanges], [], [], config.steps, tokens_of(config, layout))


def _decoded(config: PlanConfig, shapes: Shapes, layout: Layout, item: int) -> float:
    """Dense bytes that a micro-batch makes of packed weights: each time a layer is computed, or gathered."""
    passes = {"none": 0, "gather": 2, "resident": 3 if config.activation_checkpointing else 2}
    return float(passes[layout.packing] * item * shapes.target_numel)


def _pass(work: Work, rates: Rates) -> float:
    moved = work.moved / rates.moved if rates.moved else 0.0
    return work.matmul / rates.matmul + work.attention / rates.attention + moved + work.calls * rates.call
