"""Positions on trial: exact counts at every moment, decisions that use what training found, and weights that hide."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from seft_dist import SeftOptimizer
from seft_dist.io import checkpoint
from seft_dist.sparsity.bitmask import unpack
from seft_dist.sparsity.schedule import next_evolution
from tests.layouts import build, snapshot
from tests.models import batch, moving, prune_, prune_groups_, tiny_llama
from tests.ranks import run_ranks

STEPS = 14
CONFIG = moving(density=0.05, interval=4, window=2, steps=STEPS, end=12, reactivate="trial", adapt="activation")


def steps_of(model: nn.Module, seft: SeftOptimizer, last: int) -> None:
    while seft.num_steps < last:
        model(**batch(seft.num_steps)).loss.backward()
        seft.step()
        seft.zero_grad()


def test_counts_are_exact_on_trial_and_after_it() -> None:
    model = prune_(tiny_llama())
    seft = SeftOptimizer(model, CONFIG, lr=1e-2)
    kept = pruned = 0
    for t in range(1, STEPS + 1):
        trial_before = {} if t == 1 else {layer.name: layer.trial for layer in seft.deltas()}
        steps_of(model, seft, t)
        counts, on_trial = seft.sparsity(), {layer.name: layer.trial for layer in seft.deltas()}
        for layer in counts:
            assert layer.active == layer.mask_size + layer.trial
            assert layer.trial == len(on_trial[layer.name]) <= round(CONFIG.density * layer.numel)
            if seft.evolution is None or seft.evolution.first:  # what has just grown is 0 until the next update
                assert layer.zeros == layer.numel - layer.active
        report = seft.evolution
        if report is None:
            assert all(torch.equal(on_trial[name], before) for name, before in trial_before.items())
        elif report.first:
            assert report.tried == report.kept == report.pruned == 0 < report.reactivated
        else:
            assert report.tried == report.pruned == sum(map(len, trial_before.values()))
            assert 0 <= report.kept <= report.tried
            kept, pruned = kept + report.kept, pruned + report.tried - report.kept
    assert sum(layer.trial for layer in counts) == 0, "nothing may stay on trial after the last evolution"
    assert kept > 0 and pruned > 0


@pytest.mark.parametrize(
    "over",
    [
        {"steps": 8, "end": None},
        {"begin": 6},
        {"end": 3},
        {"static": True},
        {"interval": 1, "window": 1, "steps": 6, "end": None},
    ],
)
def test_nothing_is_left_on_trial(over: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, **over)
    model = prune_(tiny_llama())
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    seft = SeftOptimizer(model, config, lr=1e-2)
    assert config.steps is not None
    steps_of(model, seft, config.steps)
    assert next_evolution(config, config.steps) is None
    assert all(layer.trial == 0 and layer.zeros == layer.numel - layer.mask_size for layer in seft.sparsity())
    seft.detach()
    assert sum(int((p == 0).sum()) for p in model.parameters()) == zeros


def test_groups_hold_their_pattern_after_each_decision() -> None:
    config = dataclasses.replace(CONFIG, pattern="2:4", density=0.2)
    model = prune_groups_(tiny_llama(), "2:4")
    seft = SeftOptimizer(model, config, lr=1e-2)
    fullest = 0
    for t in range(1, STEPS + 1):
        steps_of(model, seft, t)
        for layer in seft.deltas():
            mask = unpack(layer.mask, len(layer.interval))
            fullest = max(fullest, int(mask.view(-1, 4).sum(1).max()))
            mask[layer.trial.long()] = False
            assert int(mask.view(-1, 4).sum(1).max()) == 2
    assert fullest > 2, "no group had more than N active positions while on trial"
    assert not any(layer.trial for layer in seft.sparsity())


def regression(reactivate: Any, adapt: Any = "magnitude") -> tuple[float, nn.Linear]:
    """Fit y = W x, where the pruned weight misses one entry of W that matters and holds a small one that does not."""
    torch.manual_seed(0)
    wanted = torch.zeros(4, 8)
    wanted[:, :4] = torch.eye(4) * 2
    wanted[0, 6] = 1.0
    layer = nn.Linear(8, 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(wanted)
        layer.weight[0, 6], layer.weight[2, 7] = 0.0, 0.05
    model = nn.Sequential(layer)
    config = moving(
        density=1 / 32, interval=60, window=5, steps=200, end=120, reactivate=reactivate, adapt=adapt, drop_fraction=0.0
    )
    seft = SeftOptimizer(model, config, lr=2e-2)
    for _ in range(200):
        x = torch.randn(64, 8)
        # with noise, because the second moments of gradients say nothing about the curvature of a perfect fit
        loss = (model(x) - x @ wanted.T - 0.1 * torch.randn(64, 4)).square().mean()
        loss.backward()
        seft.step()
        seft.zero_grad()
    return loss.item(), layer


@pytest.mark.parametrize("adapt", ["magnitude", "curvature", "activation"])
def test_a_position_that_proves_useful_takes_the_place_of_the_least_useful(adapt: Any) -> None:
    loss, layer = regression("trial", adapt)
    assert layer.weight[0, 6] == pytest.approx(1.0, abs=0.05) and layer.weight[2, 7] == 0
    assert int((layer.weight != 0).sum()) == 5
    assert loss < 0.02


@pytest.mark.parametrize("reactivate", ["commit", "trial"])
def test_a_weight_with_a_huge_input_is_never_pruned_by_curvature(reactivate: Any) -> None:
    """By the signed price h w^2 / 2 - w g it would look profitable to remove."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 16, bias=False)
    with torch.no_grad():
        layer.weight[:, 8:] = 0.0
        layer.weight[3, 2] = 0.02  # small, but its input is large
    scale = torch.ones(16)
    scale[2] = 1000.0
    config = moving(
        density=0.1, interval=5, window=2, steps=40, adapt="curvature", reactivate=reactivate, drop_fraction=0.5
    )
    model = nn.Sequential(layer)
    seft = SeftOptimizer(model, config, lr=1e-4)
    for _ in range(40):
        x = torch.randn(32, 16) * scale
        (model(x) - x.roll(1, 1)).square().mean().backward()
        seft.step()
        seft.zero_grad()
    assert layer.weight[3, 2] != 0
    assert all(counts.zeros == counts.numel - counts.mask_size for counts in seft.sparsity())


def test_hidden_trials_come_back_bit_for_bit(layout: str = "single", world_size: int = 1) -> None:
    def on_rank(rank: int, world: int) -> None:
        model = prune_(tiny_llama())
        called, seft, backward, step = build(layout, CONFIG, model)
        for t in range(6):  # between the evolutions of steps 4 and 8
            backward(called(**batch(t, rank)).loss)
            step()
        before = {name: layer["weight"].clone() for name, layer in snapshot(model, seft).items()}
        on_trial = sum(layer.trial for layer in seft.sparsity())
        assert on_trial > 0
        with seft.exact_zeros():
            hidden = snapshot(model, seft)
            assert all(layer.zeros == layer.numel - layer.mask_size for layer in seft.sparsity())
            assert on_trial == sum(
                int(((layer["weight"] == 0) & (before[name] != 0)).sum()) for name, layer in hidden.items()
            )
        assert all(torch.equal(layer["weight"], before[name]) for name, layer in snapshot(model, seft).items())

    run_ranks(on_rank, world_size, timeout=120)


def test_zeros_are_exact_in_the_step_of_an_evolution_without_trials() -> None:
    model = prune_(tiny_llama())
    seft = SeftOptimizer(model, dataclasses.replace(CONFIG, reactivate="commit"), lr=1e-2)
    steps_of(model, seft, 4)
    assert seft.evolution is not None and seft.evolution.reactivated > 0
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert any(layer.zeros > layer.numel - layer.mask_size for layer in seft.sparsity())  # what grew is still 0
    with seft.exact_zeros():
        assert all(layer.zeros == layer.numel - layer.mask_size for layer in seft.sparsity())
        for name, weight in model.state_dict().items():
            assert (weight - before[name]).abs().max() <= 2.0**-126
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_trials_that_nothing_would_end_are_refused(tmp_path: Any) -> None:
    """A run that goes on with an earlier end than it had when the trials began."""
    first = SeftOptimizer(model := prune_(tiny_llama()), CONFIG, lr=1e-2)
    steps_of(model, first, 6)
    path = checkpoint.save(first, tmp_path, {})
    second = SeftOptimizer(prune_(tiny_llama()), dataclasses.replace(CONFIG, end=5), lr=1e-2)
    with pytest.raises(ValueError, match="positions are on trial after step 6, and no evolution follows"):
        checkpoint.load(second, path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", "fsdp", "zero3"])
def test_hidden_trials_come_back_on_every_rank(layout: str) -> None:
    test_hidden_trials_come_back_bit_for_bit(layout, 2)


def test_a_checkpoint_in_the_middle_of_a_trial_goes_on_bit_for_bit(tmp_path: Any) -> None:
    models = [prune_(tiny_llama()) for _ in range(3)]
    whole, first = SeftOptimizer(models[0], CONFIG, lr=1e-2), SeftOptimizer(models[1], CONFIG, lr=1e-2)
    steps_of(models[0], whole, STEPS)
    steps_of(models[1], first, 6)
    path = checkpoint.save(first, tmp_path, {})
    assert any(len(layer.trial) for layer in first.deltas())
    second = SeftOptimizer(models[2], CONFIG, lr=1e-2)
    checkpoint.load(second, path)
    steps_of(models[2], second, STEPS)
    for name, weight in models[0].state_dict().items():
        assert torch.equal(weight, models[2].state_dict()[name]), name


def test_positions_on_trial_without_a_delta_are_refused() -> None:
    model = prune_(tiny_llama())
    seft = SeftOptimizer(model, CONFIG, lr=1e-2)
    steps_of(model, seft, 3)
    layers = list(seft.deltas())
    at = next(i for i, layer in enumerate(layers) if len(layer.trial))
    support = layers[at].columns.indices
    active = unpack(layers[at].mask, len(layers[at].interval)).nonzero().view(-1).to(support.dtype)
    other = active[~torch.isin(active, support)][: len(layers[at].trial)]
    layers[at] = dataclasses.replace(layers[at], trial=other)
    fresh = SeftOptimizer(prune_(tiny_llama()), CONFIG, lr=1e-2)
    with pytest.raises(ValueError, match="on trial without a delta over base 0"):
        fresh.restore(3, copy.copy(layers))


def test_settings_that_would_leave_positions_on_trial_are_refused() -> None:
    with pytest.raises(ValueError, match="without a last evolution"):
        SeftOptimizer(prune_(tiny_llama()), moving(reactivate="trial")).attach()
    with pytest.raises(ValueError, match="ends a trial"):
        moving(reactivate="trial", adapt="none", steps=100)
    moving(reactivate="trial", static=True)
    moving(reactivate="trial", end=50, interval=10)
