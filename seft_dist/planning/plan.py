"""A plan: every way of holding the model on every number of ranks, what each needs and takes, the best first."""

import dataclasses
from dataclasses import dataclass

import torch

from seft_dist.config import PlanConfig
from seft_dist.planning.architectures import Shapes, find_architecture
from seft_dist.planning.hardware import Rates, gpu_rates
from seft_dist.planning.layout import Held, Layout, Packing, layouts, world_sizes
from seft_dist.planning.memory import Memory, adam_memory, seft_memory
from seft_dist.planning.model_trace import Work, trace
from seft_dist.planning.timing import Time, adam_time, seft_time

NEAR_CHEAPEST = 1.25
"""Layouts that cost at most this times the cheapest one's device-hours are ranked by time."""
METHODS = ("SEFT", "LoRA", "full")


@dataclass(frozen=True)
class Choice:
    """A method on a layout."""

    layout: Layout
    memory: Memory
    time: Time
    rates: Rates

    @property
    def fits(self) -> bool:
        """Whether the fullest rank has the memory."""
        return self.memory.total <= self.rates.memory

    @property
    def device_hours(self) -> float:
        """Of the whole run."""
        return self.time.hours * self.layout.world_size


@dataclass(frozen=True)
class Plan:
    """What is known before anything is started."""

    config: PlanConfig
    shapes: Shapes
    work: Work
    """Of SEFT's passes."""
    peer_work: Work
    """Of those of LoRA and full fine-tuning, which keep the inputs of their linears."""
    rates: Rates
    choices: list[Choice]
    """SEFT on every layout; those that fit first, the recommended one at the top."""
    peers: dict[str, Choice | None]
    """Each method's recommended layout; None: fits nowhere."""
    advice: list[str]
    """If nothing fits: what would."""

    @property
    def best(self) -> Choice | None:
        """The recommended layout; None if nothing fits."""
        return self.choices[0] if self.choices[0].fits else None


def make_plan(config: PlanConfig, rates: Rates | None = None) -> Plan:
    """Calculate a plan.

    Args:
        config: Model, recipe and cluster.
        rates: Measured ones; None: by the device's data sheet.

    Raises:
        ValueError: Unknown model or device, or values that contradict each other.
    """
    rates = rates or gpu_rates(config.cluster, config.dtype, config.seft.density)
    dataclasses.replace(config.seft, steps=config.steps)  # checks the schedule against the run's length
    architecture = find_architecture(config.model)
    longest = getattr(architecture, "max_position_embeddings", config.seq_len)
    if isinstance(longest, int) and config.seq_len > longest:
        raise ValueError(
            f"seq_len={config.seq_len}: {config.model} reads at most {longest} tokens; choose a shorter one"
        )
    shapes = Shapes.of(architecture, config.seft.targets)
    work, peer_work = _works(config, shapes)
    found = [layout for size in world_sizes(config.cluster) for layout in layouts(config.cluster, size)]
    if config.global_batch is not None:  # more ranks than sequences would compute for nothing
        found = [layout for layout in found if layout.world_size * config.batch_size <= config.global_batch] or found[
            :1
        ]
    ranked = {
        name: _ranked(
            [_choice(name, config, shapes, layout, work if name == "SEFT" else peer_work, rates) for layout in found]
        )
        for name in METHODS
    }
    choices = ranked["SEFT"]
    peers = {name: of[0] if of[0].fits else None for name, of in ranked.items()}
    advice = [] if choices[0].fits else _advice(config, shapes, choices, rates)
    return Plan(config, shapes, work, peer_work, rates, choices, peers, advice)


def choose(
    plan: Plan, held: Held, world_size: int, method: str = "SEFT", packing: Packing = "none", replicas: int = 1
) -> Choice:
    """One method on one layout of a plan's model and recipe."""
    layout = Layout(held, world_size, plan.config.cluster.gpus_per_node, replicas, packing)
    work = plan.work if method == "SEFT" else plan.peer_work
    return _choice(method, plan.config, plan.shapes, layout, work, plan.rates)


def _works(config: PlanConfig, shapes: Shapes) -> tuple[Work, Work]:
    work = _work(config, shapes, inputs_kept=False)
    # checkpointed layers keep nothing of anybody's
    return work, work if config.activation_checkpointing else _work(config, shapes, inputs_kept=True)


def _work(config: PlanConfig, shapes: Shapes, inputs_kept: bool) -> Work:
    kind, checkpoint = getattr(torch, config.dtype), config.activation_checkpointing
    try:
        return trace(shapes.config, shapes.kinds, kind, config.batch_size, config.seq_len, checkpoint, inputs_kept)
    except (RuntimeError, TypeError, IndexError, ZeroDivisionError) as error:  # of the model's own forward pass
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error).strip() else ''}"
        raise ValueError(f"model={config.model}: the model of its config cannot run ({reason})") from error


def _choice(method: str, config: PlanConfig, shapes: Shapes, layout: Layout, work: Work, rates: Rates) -> Choice:
    rates = rates.of_rank(min(layout.world_size, layout.per_node))
    if method == "SEFT":
        memory = seft_memory(config, shapes, layout, work, rates.reserve)
        return Choice(layout, memory, seft_time(config, shapes, layout, work, rates), rates)
    memory = adam_memory(config, shapes, layout, work, rates.reserve, method.lower())
    return Choice(layout, memory, adam_time(config, shapes, layout, work, rates, method.lower()), rates)


def _ranked(choices: list[Choice]) -> list[Choice]:
    """Those that fit: the fastest of the cheap, then by device-hours; behind them the others, the smallest first."""
    fitting = [choice for choice in choices if choice.fits]
    limit = NEAR_CHEAPEST * min((choice.device_hours for choice in fitting), default=0.0)
    fitting.sort(key=lambda c: (c.device_hours > limit, c.time.hours if c.device_hours <= limit else c.device_hours))
    rest = sorted((choice for choice in choices if not choice.fits), key=lambda choice: choice.memory.total)
    return fitting + rest


def _advice(config: PlanConfig, shapes: Shapes, choices: list[Choice], rates: Rates) -> list[str]:
    smallest = choices[0]
    lacking = (smallest.memory.total - rates.memory) / 1e9
    said = [
        f"the smallest layout, {smallest.layout.name} on {smallest.layout.world_size}, needs {smallest.memory.total / 1e9:.1f} "
        f"GB of {rates.memory / 1e9:.1f} GB in its phase '{smallest.memory.worst}': {lacking:.1f} GB too many"
    ]
    changes: dict[str, dict[str, object]] = {
        "--activation_checkpointing true": {"activation_checkpointing": True},
        "--batch_size 1": {"batch_size": 1},
        f"--seq_len {config.seq_len // 2}": {"seq_len": config.seq_len // 2},
    }
    for said_so, change in changes.items():
        other = dataclasses.replace(config, **change)  # type: ignore[arg-type]
        if other != config and _smallest(other, shapes, rates, config.cluster.nodes) <= rates.memory:
            said.append(f"{said_so} would fit")
    for store in dict.fromkeys((config.seft.window_store, "factored")):
        for divisor in (1, 2, 5, 10, 20, 50, 100):
            seft = dataclasses.replace(config.seft, density=config.seft.density / divisor, window_store=store)
            if _smallest(dataclasses.replace(config, seft=seft), shapes, rates, config.cluster.nodes) <= rates.memory:
                said.append(f"--seft.density {seft.density:g} --seft.window_store {store} would fit")
                break
    for factor in (2, 4, 8, 16, 32, 64):
        if _smallest(config, shapes, rates, factor * config.cluster.nodes) <= rates.memory:
            return [*said, f"--cluster.nodes {factor * config.cluster.nodes} would fit"]
    return [*said, "more nodes alone would not help: other devices, or several of these changes"]


def _smallest(config: PlanConfig, shapes: Shapes, rates: Rates, nodes: int) -> float:
    """Bytes of the fullest rank on the layout that needs least, with all ranks of some nodes."""
    work = _work(config, shapes, inputs_kept=False)
    cluster = dataclasses.replace(config.cluster, nodes=nodes)
    found = layouts(cluster, nodes * cluster.gpus_per_node)
    return min(seft_memory(config, shapes, layout, work, rates.reserve).total for layout in found)
