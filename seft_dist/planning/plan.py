"""Planning: the memory and time of every layout on every number of ranks, with the recommended layout first."""

import dataclasses
from dataclasses import dataclass

import torch

from seft_dist.config import PlanConfig
from seft_dist.io.positions import check_length
from seft_dist.planning.architectures import ModelShapes, find_architecture
from seft_dist.planning.hardware import Rates, gpu_rates
from seft_dist.planning.layout import Layout, LayoutKind, Packing, possible_layouts, world_sizes
from seft_dist.planning.memory import MemoryEstimate, adam_memory, seft_memory
from seft_dist.planning.model_trace import PassCost, trace_pass
from seft_dist.planning.timing import TimeEstimate, adam_time, seft_time

NEAR_CHEAPEST = 1.25
"""Layouts whose device-hours are at most this factor above the cheapest are ranked by time."""
METHODS = ("SEFT", "LoRA", "full")


@dataclass(frozen=True)
class Estimate:
    """Estimated memory and time of a method on a layout."""

    layout: Layout
    memory: MemoryEstimate
    time: TimeEstimate
    rates: Rates
    """Rates of one rank."""

    @property
    def fits(self) -> bool:
        """The fullest rank has enough memory."""
        return self.memory.total <= self.rates.memory

    @property
    def device_hours(self) -> float:
        """Hours of the whole run, times the number of ranks."""
        return self.time.hours * self.layout.world_size


@dataclass(frozen=True)
class ClusterPlan:
    """Estimates for a run on a cluster, with a recommendation."""

    config: PlanConfig
    shapes: ModelShapes
    cost: PassCost
    """Cost of a pass with SEFT."""
    peer_cost: PassCost
    """Cost of a pass with LoRA or full fine-tuning, which keep the inputs of their linears."""
    rates: Rates
    estimates: list[Estimate]
    """SEFT on every layout: first those that fit, with the recommended one at the top."""
    peers: dict[str, Estimate | None]
    """Recommended layout of each method; None if it fits nowhere."""
    advice: list[str]
    """Changes that would make the run fit; empty if it fits."""

    @property
    def best(self) -> Estimate | None:
        """The recommended layout; None if no layout fits."""
        return self.estimates[0] if self.estimates[0].fits else None


def make_plan(config: PlanConfig, rates: Rates | None = None) -> ClusterPlan:
    """Estimate all methods on all layouts, and rank the layouts.

    Args:
        config: Model, training settings and cluster.
        rates: Measured rates; None: those of the device's data sheet.

    Raises:
        ValueError: The model or the device is not known, or settings contradict each other.
    """
    rates = rates or gpu_rates(config.cluster, config.dtype, config.seft.density)
    dataclasses.replace(config.seft, steps=config.steps)  # checks the schedule against the run's length
    architecture = find_architecture(config.model)
    check_length(architecture, config.seq_len, config.model, "seq_len")
    shapes = ModelShapes.of(architecture, config.seft.targets)
    traces = _Traces(shapes)
    cost = traces.cost(config)
    # Checkpointed layers keep no inputs of linears, whatever the method
    peer_cost = cost if config.activation_checkpointing else traces.cost(config, inputs_kept=True)
    layouts = [layout for size in world_sizes(config.cluster) for layout in possible_layouts(config.cluster, size)]
    if config.global_batch is not None:  # ranks without a sequence would have nothing to compute
        used = [layout for layout in layouts if layout.world_size * config.batch_size <= config.global_batch]
        layouts = used or layouts[:1]
    ranked = {}
    for name in METHODS:
        own_cost = cost if name == "SEFT" else peer_cost
        ranked[name] = _rank([_estimate(name, config, shapes, layout, own_cost, rates) for layout in layouts])
    estimates = ranked["SEFT"]
    peers = {name: of_method[0] if of_method[0].fits else None for name, of_method in ranked.items()}
    advice = [] if estimates[0].fits else _advice(config, traces, estimates, rates)
    return ClusterPlan(config, shapes, cost, peer_cost, rates, estimates, peers, advice)


def estimate(
    plan: ClusterPlan,
    kind: LayoutKind,
    world_size: int,
    method: str = "SEFT",
    packing: Packing = "none",
    replicas: int = 1,
) -> Estimate:
    """Estimate one method on one layout, with the model and settings of a plan.

    Args:
        plan: The plan.
        kind: Way of sharding or replicating the weights.
        world_size: Number of ranks.
        method: One of ``METHODS``.
        packing: Packing of the targets.
        replicas: Number of sharded copies of the model (HSDP).
    """
    layout = Layout(kind, world_size, plan.config.cluster.gpus_per_node, replicas, packing)
    cost = plan.cost if method == "SEFT" else plan.peer_cost
    return _estimate(method, plan.config, plan.shapes, layout, cost, plan.rates)


class _Traces:
    """Costs of passes through one model. Each is traced once, since that takes a second or more."""

    def __init__(self, shapes: ModelShapes) -> None:
        self.shapes = shapes
        self._costs: dict[tuple[object, ...], PassCost] = {}

    def cost(self, config: PlanConfig, inputs_kept: bool = False) -> PassCost:
        """Return the cost of one pass with some settings.

        Args:
            config: The model and its settings.
            inputs_kept: See ``trace_pass``.

        Raises:
            ValueError: The model's own forward pass fails.
        """
        dtype, checkpoint = getattr(torch, config.dtype), config.activation_checkpointing
        settings = (dtype, config.batch_size, config.seq_len, checkpoint, inputs_kept)
        if settings not in self._costs:
            try:
                self._costs[settings] = trace_pass(self.shapes.config, self.shapes.kinds, *settings)
            except (RuntimeError, TypeError, IndexError, ZeroDivisionError) as error:
                first = (str(error).strip().splitlines() or [""])[0][:300]
                reason = f"{type(error).__name__}: {first}"
                raise ValueError(f"model={config.model}: the model of its config cannot run ({reason})") from error
        return self._costs[settings]


def _estimate(
    method: str, config: PlanConfig, shapes: ModelShapes, layout: Layout, cost: PassCost, rates: Rates
) -> Estimate:
    rates = rates.per_rank(min(layout.world_size, layout.per_node))
    if method == "SEFT":
        memory = seft_memory(config, shapes, layout, cost, rates.reserve)
        return Estimate(layout, memory, seft_time(config, shapes, layout, cost, rates), rates)
    memory = adam_memory(config, shapes, layout, cost, rates.reserve, method.lower())
    return Estimate(layout, memory, adam_time(config, shapes, layout, cost, rates, method.lower()), rates)


def _rank(estimates: list[Estimate]) -> list[Estimate]:
    """Rank layouts: first those that fit, then the others, the one with the smallest memory first.

    Among those that fit, the ones near the cheapest in device-hours come first, ordered by time; the others follow,
    ordered by device-hours.
    """
    fitting = [estimate for estimate in estimates if estimate.fits]
    limit = NEAR_CHEAPEST * min((estimate.device_hours for estimate in fitting), default=0.0)
    fitting.sort(key=lambda e: (e.device_hours > limit, e.time.hours if e.device_hours <= limit else e.device_hours))
    rest = sorted((estimate for estimate in estimates if not estimate.fits), key=lambda e: e.memory.total)
    return fitting + rest


def _advice(config: PlanConfig, traces: _Traces, estimates: list[Estimate], rates: Rates) -> list[str]:
    """Find changes with which a run would fit that fits nowhere: settings, a smaller density, or more nodes."""
    smallest = estimates[0]
    memory = smallest.rates.memory
    advice = [
        f"the smallest layout, {smallest.layout.name} on {smallest.layout.world_size}, needs "
        f"{smallest.memory.total / 1e9:.1f} GB of {memory / 1e9:.1f} GB in its phase "
        f"'{smallest.memory.worst}': {(smallest.memory.total - memory) / 1e9:.1f} GB too many"
    ]
    changes: dict[str, dict[str, object]] = {
        "--activation_checkpointing true": {"activation_checkpointing": True},
        "--batch_size 1": {"batch_size": 1},
        f"--seq_len {config.seq_len // 2}": {"seq_len": config.seq_len // 2},
    }
    for options, change in changes.items():
        other = dataclasses.replace(config, **change)  # type: ignore[arg-type]
        if other != config and _fits(other, traces, rates, config.cluster.nodes):
            advice.append(f"{options} would fit")
    for store in dict.fromkeys((config.seft.window_store, "factored")):
        for divisor in (1, 2, 5, 10, 20, 50, 100):
            density = config.seft.density / divisor
            try:
                seft = dataclasses.replace(config.seft, density=density, window_store=store)
            except ValueError:  # the criteria need the gradient itself
                break
            if _fits(dataclasses.replace(config, seft=seft), traces, rates, config.cluster.nodes):
                advice.append(f"--seft.density {density:g} --seft.window_store {store} would fit")
                break
    for factor in (2, 4, 8, 16, 32, 64):
        if _fits(config, traces, rates, factor * config.cluster.nodes):
            return [*advice, f"--cluster.nodes {factor * config.cluster.nodes} would fit"]
    return [*advice, "more nodes alone would not help: other devices, or several of these changes"]


def _fits(config: PlanConfig, traces: _Traces, rates: Rates, nodes: int) -> bool:
    """Return whether a run fits on some layout with all ranks of a number of nodes."""
    shapes, cost = traces.shapes, traces.cost(config)
    cluster = dataclasses.replace(config.cluster, nodes=nodes)
    return any(
        seft_memory(config, shapes, layout, cost, rates.reserve).total
        <= rates.per_rank(min(layout.world_size, layout.per_node)).memory
        for layout in possible_layouts(cluster, nodes * cluster.gpus_per_node)
    )
