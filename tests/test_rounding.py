"""Near-ties: selections that rounding can decide are counted for every criterion on any number of ranks, few others."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seft_dist import SeftConfig, SeftOptimizer
from seft_dist.backends.group import Group
from seft_dist.optim import rounding
from seft_dist.optim.collectives import near_ties, next_to_border, select
from seft_dist.sparsity.bitmask import unpack
from seft_dist.sparsity.selection import INELIGIBLE, keys, values_of
from tests.models import moving
from tests.ranks import run_ranks

ROWS, COLUMNS = 40, 96
STEPS = 9
BASE = moving(density=0.3, interval=3, window=2, steps=STEPS, end=STEPS - 1, drop_fraction=0.5)


def test_keys_give_their_numbers_back() -> None:
    scores = torch.tensor([0.0, 1.5, -1.5, 3e38, -1e-45, 1e-45])
    assert torch.equal(values_of(keys(scores, largest=True)), scores)
    assert torch.equal(values_of(keys(scores, largest=False)), -scores)
    assert values_of(torch.tensor([INELIGIBLE], dtype=torch.int32)).isnan().all()


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("form", ["gather", "radix"])
def test_near_ties_are_counted_over_ranks(world_size: int, form: Any) -> None:
    scores = torch.tensor([9.0, 5.0, 5.00001, 4.99999, 5.001, 1.0, 8.0, 2.0, 3.0, 3.00001, 7.0, 6.0])
    errors = torch.full_like(scores, 2e-5)
    errors[3] = 0.0  # known exactly
    errors[5] = 4.5  # hardly known

    def on_rank(rank: int, world: int) -> list[list[int]]:
        import torch.distributed as dist

        group = Group(dist.group.WORLD if world > 1 else None)
        own, error = (values.view(2, world, -1)[:, rank] for values in (scores, errors))  # two layers
        key = [keys(layer, True) for layer in own]
        found = []
        for problems, wanted in (([0, 1], [3, 3]), ([0, 0], [7]), ([0, 1], [6, 0])):
            chosen = select(group, key.__getitem__, problems, wanted, form)
            found.append(near_ties(group, key.__getitem__, problems, chosen, error.__getitem__))
        return [
            *found,
            next_to_border(group, key.__getitem__, 2, 7, 2),
            next_to_border(group, key.__getitem__, 2, 7, 0),
        ]

    # Layer 0 takes 9, 5.001, 5.00001: near are it, 5 and 1. Of all, the 7th is 5: near are it, 5.00001 and 1.
    expected = [[3, 0], [3, 0], [0, 0], [3, 1], [0, 0]]
    assert run_ranks(on_rank, world_size) == [expected] * world_size


class Given(nn.Module):
    """Linears whose weight gradients are given; seeded ones, each with noise of its own, and where it is put."""

    def __init__(self, noise: float = 0.0, pattern: bool = False) -> None:
        super().__init__()
        self.draw = torch.Generator().manual_seed(7)
        self.noisy = torch.Generator().manual_seed(8)
        self.noise = noise
        self.linears = nn.ModuleList(nn.Linear(COLUMNS, ROWS, bias=False) for _ in range(2))
        with torch.no_grad():
            for linear in self.linears:
                weight = torch.randn(ROWS, COLUMNS, generator=self.draw)
                order = torch.rand(ROWS * COLUMNS // 4, 4, generator=self.draw).argsort(1).view_as(weight)
                free = torch.rand(ROWS, COLUMNS, generator=self.draw) < 0.5
                linear.weight.copy_(weight * (order < 2 if pattern else free))  # type: ignore[operator]
        # rows and columns of very different sizes, as in a model
        self.sizes = [
            torch.randn(ROWS, 1, generator=self.draw).exp() * torch.randn(COLUMNS, generator=self.draw).exp()
        ] * 2

    def forward(self) -> Tensor:
        total = torch.zeros(())
        for linear, size in zip(self.linears, self.sizes, strict=True):
            gradient = torch.randn(ROWS, COLUMNS, generator=self.draw)
            gradient = (gradient + self.noise * torch.randn(ROWS, COLUMNS, generator=self.noisy)) * size
            # inputs of different sizes too, and not quite the same on another layout
            inputs = size[0] * (1 + self.noise * torch.randn(COLUMNS, generator=self.noisy))
            total = total + (linear(torch.diag(inputs)) * (gradient / inputs).T).sum()
        return total


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "random start": {"init": "random"},
    "movement": {"drop": "movement"},
    "random drop": {"drop": "random"},
    "momentum": {"grow": "momentum"},
    "random growth": {"grow": "random"},
    "activation": {"adapt": "activation"},
    "magnitude": {"adapt": "magnitude"},
    "none": {"adapt": "none"},
    "global": {"scope": "global"},
    "some reactivation": {"reactivation": 0.4},
    "keep": {"on_drop": "keep"},
    "seeded": {"moments": "seeded"},
    "candidates": {"window_store": "candidates"},
    "factored": {"window_store": "factored"},
    "2:4": {"pattern": "2:4"},
    "2:4, activation": {"pattern": "2:4", "adapt": "activation"},
}


def states(config: SeftConfig, noise: float) -> list[tuple[list[tuple[Tensor, Tensor]], list[int]]]:
    """Masks and supports of both layers after each evolution, and the near-ties until then."""
    model = Given(noise, pattern=config.known_pattern is not None)
    seft, found = SeftOptimizer(model, config, lr=1e-1), []
    seft.attach()
    seft.counts_near_ties = True
    for _ in range(STEPS):
        model().backward()
        seft.step()
        seft.zero_grad()
        if seft.evolution is not None:
            pairs = []
            for layer in seft.deltas():
                support = torch.zeros(ROWS * COLUMNS, dtype=torch.bool)
                support[layer.columns.indices.long()] = True
                pairs.append((unpack(layer.mask, ROWS * COLUMNS), support))
            assert seft.evolution.near_ties is not None
            found.append((pairs, seft.evolution.near_ties))
    return found


@pytest.mark.parametrize("option", OPTIONS)
def test_what_falls_the_other_way_was_near(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise of a share of the terms, far above rounding so that it decides something: all of it was announced."""
    monkeypatch.setattr(rounding, "ROUNDING", 2.0**-7)
    config = dataclasses.replace(BASE, **OPTIONS[option])
    for (here, near), (there, also) in zip(states(config, 0.0), states(config, 2.0**-11), strict=True):
        moved = [
            sum(int((one ^ two).sum()) for one, two in zip(*pair, strict=True))
            for pair in zip(here, there, strict=True)
        ]
        for count, *ties in zip(moved, near, also, strict=True):
            assert count <= 4 * min(ties), f"{moved} positions differ, near-ties {near} and {also}"
        assert max(near) < ROWS * COLUMNS / 10
        if any(moved):
            return
    pytest.fail("nothing fell the other way")


def test_gradients_that_cancel_are_near_whatever_their_score() -> None:
    """The gradients of 12 weights are only rounding errors, and 5 are pruned: any 5 of these 12, but no others."""
    draw = torch.Generator().manual_seed(0)
    linear = nn.Linear(24, 16, bias=False)
    with torch.no_grad():
        linear.weight.copy_(1 + torch.rand(16, 24, generator=draw))
        linear.weight[:, 12:] = 0
    x, gradient = torch.randn(96, 24, generator=draw), torch.randn(96, 16, generator=draw)
    q, _ = torch.linalg.qr(x[:, :12].double())
    gradient[:, 3] -= (q @ (q.T @ gradient[:, 3].double())).float()  # row 3: no part along its 12 active inputs
    config = moving(density=0.05, interval=1, window=1, steps=3, end=1, drop_fraction=1.0, init="random", drop="random")
    for order in (torch.arange(96), torch.randperm(96, generator=draw)):
        model = nn.Sequential(nn.Linear(24, 16, bias=False))
        model[0].weight = nn.Parameter(linear.weight.detach().clone())
        seft = SeftOptimizer(model, config, lr=1e-3)
        seft.attach()
        seft.counts_near_ties = True
        (model(x[order]) * gradient[order]).sum().backward()
        seft.step()
        assert seft.evolution is not None and 4 <= seft.evolution.pruned <= 11
        (layer,) = seft.deltas()
        gone = ~unpack(layer.mask, 16 * 24).view(16, 24)[:, :12]
        assert not gone[:3].any() and not gone[4:].any()
        assert seft.evolution.near_ties == [12]
