"""Bytes of every phase of an evolution against the formulas of docs/evolution.md, and what a global ranking needs."""

import resource
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from seft_dist import SeftConfig
from seft_dist.backends.group import Group
from seft_dist.modules.targets import find_targets
from seft_dist.optim.collectives import select
from seft_dist.optim.evolution import Evolution
from seft_dist.optim.report import EvolutionReport
from seft_dist.sparsity.bitmask import popcount
from seft_dist.sparsity.selection import BINS, DIGITS, keys
from tests.layouts import build
from tests.models import Parent, batch, moving, prune_, tiny_llama
from tests.ranks import return_freed_memory, run_ranks

CONFIG = moving(density=0.05, interval=4, window=2, steps=8)


@dataclass(frozen=True)
class Wire:
    """Bytes that one of W ranks sends in each collective."""

    size: int

    def total(self, nbytes: int) -> int:
        """Everybody gets the sum of a vector."""
        return 2 * nbytes * (self.size - 1) // self.size

    def every(self, nbytes: int) -> int:
        """Everybody gets everybody's vector."""
        return nbytes * (self.size - 1)

    def ragged(self, longest: int, element: int) -> int:
        """Bytes of a gather of vectors of different lengths."""
        return self.every(8) + self.every(longest * element)

    def selection(self, form: str, wanted: list[int], competing: list[list[int]]) -> int:
        """One exact top-k of each layer; ``competing``: candidates of each rank and layer."""
        layers = len(wanted)
        if form == "radix":
            return len(DIGITS) * self.total(8 * BINS * layers) + self.every(8 * layers)
        sent = [sum(map(min, wanted, own)) for own in competing]
        return self.every(8 * layers) + self.ragged(max(sent), 4)


@dataclass(frozen=True)
class Seen:
    """One rank's evolution. Lists have one number for each layer, of this rank's own positions."""

    own: list[int]
    deltas: list[int]
    active: list[int]
    dropped: list[int]
    grown: list[int]
    pruned: list[int]
    reactivated: list[int]
    deltas_after: list[int]
    numel: int
    free: list[int]
    """Places in each layer's budget before the drop, over all ranks."""
    replicates: bool
    report: EvolutionReport


def evolve(layout: str, rank: int, config: SeftConfig, **options: Any) -> Seen:
    """Train until the first evolution after the first support, and look at it from this rank."""
    found: list[Evolution] = []
    run = Evolution.run

    def watched(self: Evolution, *args: Any) -> EvolutionReport:
        found.append(self)
        return run(self, *args)

    Evolution.run = watched  # type: ignore[method-assign, assignment]
    called, seft, backward, step = build(layout, config, **options)
    for t in range(config.interval):
        if t + 1 == config.interval:
            layers = list(seft.deltas())
            deltas, active = [len(layer.columns) for layer in layers], [popcount(layer.mask) for layer in layers]
            sizes = [len(support) for support in seft.sparse_state.supports]
        backward(called(**batch(t, rank)).loss)
        step()
    Evolution.run = run  # type: ignore[method-assign]
    assert len(found) == 2 and seft.evolution is not None
    evolution = found[1].work
    return Seen(
        own=[len(layer.interval) for layer in layers],
        deltas=deltas,
        active=active,
        dropped=list(map(len, evolution.dropped)),
        grown=list(map(len, evolution.grown)),
        pruned=list(map(len, evolution.pruned)),
        reactivated=list(map(len, evolution.reactivated)),
        deltas_after=[len(layer.columns) for layer in seft.deltas()],
        numel=sum(partition.numel for partition in seft.backend.partitions),
        free=[budget - size for budget, size in zip(seft.sparse_state.budgets, sizes, strict=True)],
        replicates=seft.backend.replicates,
        report=seft.evolution,
    )


def expected(ranks: list[Seen], rank: int, form: str) -> dict[str, int]:
    """docs/evolution.md, for fp32 weights, one backward pass a step and the default criteria."""
    wire, me, layers = Wire(len(ranks)), ranks[rank], len(ranks[0].own)
    dropped, reactivated = (
        [sum(n) for n in zip(*(getattr(r, k) for r in ranks), strict=True)] for k in ("dropped", "reactivated")
    )
    grow = [free + gone for free, gone in zip(me.free, dropped, strict=True)]
    outside = [[n - k for n, k in zip(r.own, r.deltas, strict=True)] for r in ranks]
    prunable = [[a + r - g for a, r, g in zip(s.active, s.reactivated, s.grown, strict=True)] for s in ranks]
    counts = 8 * layers
    commit = wire.every(counts) + wire.ragged(max(sum(r.deltas_after) for r in ranks), 4)
    if me.replicates:
        changed = max(sum(r.dropped) + sum(r.pruned) for r in ranks)
        commit += wire.every(counts) + wire.ragged(changed, 8) + wire.ragged(changed, 4)
    return {
        "window": CONFIG.window * 4 * (me.numel - sum(me.own)),
        "drop": wire.selection(form, dropped, [r.deltas for r in ranks]) + wire.total(counts),
        "grow": wire.selection(form, grow, outside),
        "adapt": wire.total(counts) + wire.selection(form, reactivated, prunable),
        "commit": commit,
        "verify": wire.total(counts) + wire.every(3 * counts) + wire.total(32 * layers),
    }


def cases() -> list[Any]:
    """All but one in the slow tier."""
    every = [("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 3), ("zero3", 2), ("zero3", 4)]
    return [pytest.param(*case, marks=[] if case == ("fsdp", 3) else [pytest.mark.slow]) for case in every]


@pytest.mark.parametrize(("layout", "world_size"), cases())
def test_bytes_of_every_phase_are_those_of_the_formulas(layout: str, world_size: int) -> None:
    def on_rank(rank: int, _: int) -> list[Seen]:
        return [evolve(layout, rank, moving(**(vars(CONFIG) | {"selection": form}))) for form in ("gather", "radix")]

    both = run_ranks(on_rank, world_size, timeout=120)
    for which, form in enumerate(("gather", "radix")):
        ranks = [seen[which] for seen in both]
        for rank, seen in enumerate(ranks):
            found = {name: phase.bytes_sent for name, phase in seen.report.phases.items()}
            assert found == expected(ranks, rank, form), f"{form}, rank {rank}"
            assert all(phase.seconds > 0 for phase in seen.report.phases.values())
            assert seen.report.bytes_sent == sum(found.values()) - found["window"]
    assert both[0][0].report.digest == both[0][1].report.digest


def test_bytes_of_trials_and_of_curvature() -> None:
    """What both send beyond the default, whose rankings have the same size as histograms."""

    def on_rank(rank: int, _: int) -> list[Seen]:
        common = vars(CONFIG) | {"selection": "radix", "end": 2 * CONFIG.interval, "steps": 3 * CONFIG.interval}
        return [
            evolve("fsdp", rank, moving(**(common | over)))
            for over in ({}, {"adapt": "curvature"}, {"reactivate": "trial"})
        ]

    shapes = [tuple(target.module.weight.shape) for target in find_targets(prune_(tiny_llama()), "all-linear").values()]
    wire, counts = Wire(3), 8 * len(shapes)
    sums = sum(wire.total(4 * rows) + wire.total(4 * columns) for rows, columns in shapes)
    tried = wire.total(4 * counts + 16) - wire.total(4 * counts)
    more = [
        {"window": sums},
        {"adapt": wire.total(counts), "verify": wire.total(counts) + tried},
    ]
    for default, *others in run_ranks(on_rank, 3, timeout=120):
        sent = {name: phase.bytes_sent for name, phase in default.report.phases.items()}
        for seen, added in zip(others, more, strict=True):
            found = {name: phase.bytes_sent for name, phase in seen.report.phases.items()}
            del found["commit"], found["drop"]
            assert found == {name: sent[name] + added.get(name, 0) for name in found}


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_bytes_of_swaps(scope: Any) -> None:
    swaps = {"reactivation": 0.0, "swap_fraction": 0.02, "swap_end": 8, "selection": "radix", "scope": scope}

    def on_rank(rank: int, _: int) -> Seen:
        return evolve("fsdp", rank, moving(**(vars(CONFIG) | swaps)), parent=Parent(tiny_llama()))

    layers = len(find_targets(prune_(tiny_llama()), "all-linear"))
    wire, counts = Wire(3), 8 * layers
    problems = layers if scope == "layer" else 1
    ranking = len(DIGITS) * wire.total(8 * BINS * problems) + wire.every(counts)
    for seen in run_ranks(on_rank, 3, timeout=120):
        found = {name: phase.bytes_sent for name, phase in seen.report.phases.items()}
        assert found["adapt"] == 0
        assert found["swap"] == 5 * ranking + (3 if scope == "layer" else 4) * wire.total(counts)


LAYER = 1 << 20
"""Scores of one layer of the global ranking, 4 MB in fp32."""


def global_ranking(rank: int, layers: int, wanted: int, numel: int = LAYER) -> tuple[int, int, int]:
    """Bytes sent, bytes of memory added at the peak, entries selected, of one ranking over all layers."""

    def layer_keys(layer: int) -> Tensor:
        return keys(
            torch.randn(numel, generator=torch.Generator().manual_seed(97 * layer + rank)).abs_(), largest=False
        )

    group = Group(dist.group.WORLD)
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    chosen = select(group, layer_keys, [0] * layers, [wanted])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle
    return group.bytes_sent, peak * 1024, sum(map(len, chosen))


def test_a_global_ranking_sends_and_holds_counters_only() -> None:
    """Only a few layers' scores exist at a time, and only histograms are sent, for any number of layers and entries."""
    cases = ((2, 20_000), (32, 20_000), (32, 400_000))

    def on_rank(rank: int, _: int) -> list[tuple[int, int, int]]:
        return_freed_memory()
        global_ranking(rank, 1, 10_000, 20_000)  # what a first call loads is not counted
        return [global_ranking(rank, *case) for case in cases]

    for (layers, wanted), results in zip(cases, zip(*run_ranks(on_rank, 2), strict=True), strict=True):
        assert sum(selected for *_, selected in results) == wanted
        histograms = len(DIGITS) * Wire(2).total(8 * BINS)
        assert [sent for sent, *_ in results] == [histograms + Wire(2).every(8 * layers)] * 2
        # Each may add this much to the peak of those before it; all scores of 32 layers would be 128 MB.
        assert all(peak < 8 * 4 * LAYER for _, peak, _ in results), results
