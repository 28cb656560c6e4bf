"""Bytes that a rank sends, by collective and link, and their duration. docs/planning.md has the formulas."""

from dataclasses import dataclass

from seft_dist.config import PlanConfig
from seft_dist.optim.window import Needs
from seft_dist.planning.architectures import ModelShapes
from seft_dist.planning.hardware import Rates
from seft_dist.planning.layout import Layout, packed_bytes
from seft_dist.sparsity.selection import BINS, DIGITS


@dataclass(frozen=True)
class Traffic:
    """Traffic of one rank for one purpose."""

    what: str
    """Description of what is sent."""
    intra: float
    """Bytes sent to ranks of the same node."""
    inter: float
    """Bytes sent to other nodes."""
    seconds: float
    """Duration."""

    def times(self, count: float) -> "Traffic":
        """Multiply bytes and duration by a count."""
        return Traffic(self.what, self.intra * count, self.inter * count, self.seconds * count)


@dataclass(frozen=True)
class Links:
    """Estimates the traffic of collectives, for a layout on links with given rates."""

    layout: Layout
    rates: Rates

    @property
    def _together(self) -> int:
        """Number of ranks of a group of owners that are on one node."""
        return min(self.layout.owners, self.layout.per_node)

    def ring(self, what: str, size: float) -> Traffic:
        """All-gather or reduce-scatter of ``size`` bytes among owners, along a ring."""
        owners, near = self.layout.owners, self._together
        sent = size * (owners - 1) / owners
        if owners <= near:
            return Traffic(what, sent, 0.0, sent / self.rates.intra)
        # One of ``near`` edges of the ring leaves the node, and several rings together use all of its ports
        seconds = sent / min(self.rates.intra, self.rates.inter)
        return Traffic(what, sent * (1 - 1 / near), sent / near, seconds)

    def exchange(self, what: str, size: float) -> Traffic:
        """All-to-all of ``size`` bytes among owners: each sends every other owner the part that it owns."""
        owners, near = self.layout.owners, self._together
        intra, inter = size * (near - 1) / owners, size * (owners - near) / owners
        return Traffic(what, intra, inter, max(intra / self.rates.intra, inter * near / self.rates.inter))

    def replicas(self, what: str, size: float) -> Traffic:
        """All-reduce of ``size`` bytes between the replicas of a rank."""
        sent = 2 * size * (self.layout.replicas - 1) / self.layout.replicas
        return Traffic(what, 0.0, sent, sent * self._together / self.rates.inter)


def weights_gathered(config: PlanConfig, shapes: ModelShapes, layout: Layout, item: int) -> float:
    """Bytes of weights that a micro-batch gathers.

    Each layer is gathered twice, for forward and for backward. FSDP gathers the root once, and keeps it until backward.
    """
    each = item if layout.packing == "none" else packed_bytes(config.sparsity, item)
    total = 0.0
    for weight in shapes.weights:
        padded = layout.own_numel(weight) * layout.owners * (each if weight.target else item)
        total += padded * (1 if weight.layer is None and layout.kind in ("fsdp", "hsdp") else 2)
    return total


def gathers(config: PlanConfig, shapes: ModelShapes, links: Links, item: int, micro: int) -> list[Traffic]:
    """Traffic of a step for gathering weights."""
    layout = links.layout
    if not layout.sharded:
        return []
    size = weights_gathered(config, shapes, layout, item)
    traffic = [links.ring("weights", size).times(micro)]
    if config.teacher:
        whole = float(item * sum(layout.own_numel(weight) * layout.owners for weight in shapes.weights))
        traffic.append(links.ring("teacher's weights", whole).times(micro))
    if layout.kind == "zero3_offload":
        fetched = size + (whole if config.teacher else 0.0)
        traffic.append(Traffic("weights from host memory", 0, 0, micro * fetched / layout.owners / links.rates.host))
    return traffic


def seft_step(config: PlanConfig, shapes: ModelShapes, links: Links, item: int) -> list[Traffic]:
    """Other traffic of a step with SEFT: the sparse gradients and, if ranks hold copies, the updated weights."""
    layout, deltas = links.layout, shapes.budget(config.seft.density)
    traffic = [links.exchange("gradients of deltas", 4 * deltas)]
    if layout.replicas > 1:
        traffic.append(links.replicas("gradients between replicas", 4 * deltas / layout.owners))
    if not layout.sharded:
        traffic.append(links.ring("new weights", item * deltas))
    if config.seft.train_norms:
        size = 4 * shapes.vector_numel
        traffic.append(links.exchange("gradients of norms and biases, to one rank each", size))
        traffic.append(links.ring("gradients of norms and biases, to all ranks", size))
    return traffic


def seft_window(config: PlanConfig, shapes: ModelShapes, links: Links, micro: int) -> list[Traffic]:
    """Additional traffic in each step of a window with dense gradients."""
    if not Needs.of_any_step(config.seft).dense:
        return []
    traffic = [links.exchange("dense gradients", 4 * shapes.target_numel).times(micro)]
    if links.layout.replicas > 1:
        own = 4 * shapes.target_numel / links.layout.owners
        traffic.append(links.replicas("dense gradients between replicas", own).times(micro))
    return traffic


def seft_evolution(config: PlanConfig, shapes: ModelShapes, links: Links, item: int) -> list[Traffic]:
    """Traffic of an evolution: its rankings, and the positions of all deltas."""
    layout, deltas = links.layout, shapes.budget(config.seft.density)
    moved, swaps = config.seft.drop_fraction * deltas, config.seft.swap_fraction * shapes.target_numel

    def ranking(entries: float, problems: int) -> float:
        radix = 2 * 8 * BINS * len(DIGITS) * problems
        return min(4 * entries * layout.owners, radix) if config.seft.selection == "auto" else radix

    layers = len(shapes.targets)
    ranked = (3 if config.seft.reactivation else 2) * ranking(moved, layers)
    ranked += 5 * ranking(swaps, layers if config.seft.scope == "layer" else 1) * (swaps > 0)
    traffic = [links.ring("row and column sums", 8.0 * shapes.window_sums)] if Needs.of(config.seft).outputs else []
    traffic += [
        links.ring("rankings", ranked),
        links.ring("positions of all deltas", shapes.position_bytes * deltas * layout.skew(shapes)),
    ]
    if not layout.sharded:
        traffic.append(links.ring("changes of weights", (8 + item) * 2 * (moved + swaps)))
    return traffic


def adam_step(shapes: ModelShapes, links: Links, item: int, trained: int) -> list[Traffic]:
    """Other traffic of a step with AdamW: the gradients."""
    if links.layout.replicas > 1:
        own = item * trained / links.layout.owners
        return [links.ring("gradients", item * trained), links.replicas("gradients between replicas", own)]
    return [links.ring("gradients", item * trained).times(1 if links.layout.sharded else 2)]
