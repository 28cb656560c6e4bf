"""Bytes that a rank sends, by collective and link, and the seconds they take. docs/planning.md has the formulas."""

from dataclasses import dataclass

from seft_dist.config import PlanConfig
from seft_dist.optim.window import Needs
from seft_dist.planning.architectures import Shapes
from seft_dist.planning.hardware import Rates
from seft_dist.planning.layout import Layout, packed_bytes
from seft_dist.sparsity.selection import BINS, DIGITS


@dataclass(frozen=True)
class Sent:
    """One kind of exchange, of one rank."""

    what: str
    intra: float
    """Bytes to ranks of the own node."""
    inter: float
    """Bytes to other nodes."""
    seconds: float

    def times(self, count: float) -> "Sent":
        """The same, several times."""
        return Sent(self.what, self.intra * count, self.inter * count, self.seconds * count)


@dataclass(frozen=True)
class Links:
    """Collectives of a layout on given links."""

    layout: Layout
    rates: Rates

    @property
    def _together(self) -> int:
        """Ranks of a group of owners on one node."""
        return min(self.layout.owners, self.layout.per_node)

    def ring(self, what: str, size: float) -> Sent:
        """Owners gather ``size`` bytes, or reduce them to owners, along a ring."""
        owners, near = self.layout.owners, self._together
        sent = size * (owners - 1) / owners
        if owners <= near:
            return Sent(what, sent, 0.0, sent / self.rates.intra)
        # One edge of the ring in ``near`` leaves the node; several rings share its ports.
        seconds = sent / min(self.rates.intra, self.rates.inter)
        return Sent(what, sent * (1 - 1 / near), sent / near, seconds)

    def exchange(self, what: str, size: float) -> Sent:
        """Every owner sends each other one its part of ``size`` bytes."""
        owners, near = self.layout.owners, self._together
        intra, inter = size * (near - 1) / owners, size * (owners - near) / owners
        return Sent(what, intra, inter, max(intra / self.rates.intra, inter * near / self.rates.inter))

    def replicas(self, what: str, size: float) -> Sent:
        """All-reduce of ``size`` bytes between the replicas of a rank."""
        sent = 2 * size * (self.layout.replicas - 1) / self.layout.replicas
        return Sent(what, 0.0, sent, sent * self._together / self.rates.inter)


def weights_gathered(config: PlanConfig, shapes: Shapes, layout: Layout, item: int) -> float:
    """Bytes of weights that a micro-batch gathers: each layer twice; FSDP keeps the root from forward to backward."""
    each = item if layout.packing == "none" else packed_bytes(config.sparsity, item)
    total = 0.0
    for weight in shapes.weights:
        padded = layout.own(weight) * layout.owners * (each if weight.target else item)
        total += padded * (1 if weight.layer is None and layout.held in ("fsdp", "hsdp") else 2)
    return total


def gathers(config: PlanConfig, shapes: Shapes, links: Links, item: int, micro: int) -> list[Sent]:
    """Weights fetched in a step."""
    layout = links.layout
    if not layout.sharded:
        return []
    size = weights_gathered(config, shapes, layout, item)
    found = [links.ring("weights", size).times(micro)]
    if layout.held == "zero3_offload":
        found.append(Sent("weights from host memory", 0, 0, micro * size / layout.owners / links.rates.host))
    return found


def seft_step(config: PlanConfig, shapes: Shapes, links: Links, item: int) -> list[Sent]:
    """What a step sends beside weights: the sparse gradients, and new weights where ranks hold copies."""
    layout, deltas = links.layout, shapes.budget(config.seft.density)
    found = [links.exchange("gradients of deltas", 4 * deltas)]
    if layout.replicas > 1:
        found.append(links.replicas("gradients between replicas", 4 * deltas / layout.owners))
    if not layout.sharded:
        found.append(links.ring("new weights", item * deltas))
    return found


def seft_window(config: PlanConfig, shapes: Shapes, links: Links, micro: int) -> list[Sent]:
    """What each step of a window with dense gradients sends more."""
    if not Needs.of(config.seft).dense:
        return []
    found = [links.exchange("dense gradients", 4 * shapes.target_numel).times(micro)]
    if links.layout.replicas > 1:
        own = 4 * shapes.target_numel / links.layout.owners
        found.append(links.replicas("dense gradients between replicas", own).times(micro))
    return found


def seft_evolution(config: PlanConfig, shapes: Shapes, links: Links, item: int) -> list[Sent]:
    """What an evolution sends: rankings (drop, grow, adapt), and all positions."""
    layout, deltas = links.layout, shapes.budget(config.seft.density)
    problems = len(shapes.targets)
    moved = config.seft.drop_fraction * deltas
    radix = 2 * 8 * BINS * len(DIGITS) * problems
    ranked = 3 * min(4 * moved * layout.owners, radix) if config.seft.selection == "auto" else 3 * radix
    found = [
        *(_factors(shapes, links) if Needs.of(config.seft).factored else []),
        links.ring("rankings", ranked),
        links.ring("positions of all deltas", shapes.position_bytes * deltas * layout.skew(shapes)),
    ]
    if not layout.sharded:
        found.append(links.ring("changes of weights", (8 + item) * 2 * moved))
    return found


def _factors(shapes: Shapes, links: Links) -> list[Sent]:
    return [links.ring("row and column sums", 8.0 * sum(sum(w.target) for w in shapes.targets if w.target))]


def adam_step(shapes: Shapes, links: Links, item: int, trained: int) -> list[Sent]:
    """What AdamW's step sends beside weights."""
    if links.layout.replicas > 1:
        own = item * trained / links.layout.owners
        return [links.ring("gradients", item * trained), links.replicas("gradients between replicas", own)]
    return [links.ring("gradients", item * trained).times(1 if links.layout.sharded else 2)]
