"""Invariants of every run with any options: counts, restored bits, no change off schedule, repeatability."""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from seft_dist import SeftOptimizer
from seft_dist.sparsity.bitmask import unpack
from tests.models import batch, moving, prune_, tiny_llama

VOCAB = 48
BASE = moving(density=0.05, interval=3, window=2, steps=12, end=9, drop_fraction=0.4)


def make_model(sparsity: float = 0.55, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    model = tiny_llama(
        seed,
        vocab_size=VOCAB,
        hidden_size=20,
        intermediate_size=33,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return prune_(model, sparsity).to(dtype) if sparsity else model.to(dtype)


def view(seft: SeftOptimizer) -> dict[str, dict[str, Tensor]]:
    """Copies of mask, support, delta columns and weight of every target, flat."""
    out = {}
    modules = dict(zip(seft.target_names, seft.backend.holders, strict=True))
    for layer in seft.deltas():
        columns = {
            field.name: getattr(layer.columns, field.name).clone() for field in dataclasses.fields(layer.columns)
        }
        out[layer.name] = columns | {
            "mask": unpack(layer.mask, len(layer.interval)),
            "weight": modules[layer.name].weight.detach().flatten().clone(),
        }
    return out


def run(
    model: nn.Module, seft: SeftOptimizer, steps: int, seed: int = 0
) -> Iterator[tuple[int, dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]]:
    """Train; after each step give its number and what was there before and after it."""
    seft.attach()
    for _ in range(steps):
        before = view(seft)
        model(**batch(1000 * seed + seft.num_steps, vocab=VOCAB)).loss.backward()
        seft.step()
        seft.zero_grad()
        yield seft.num_steps, before, view(seft)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(one[name][key], other[name][key]) for name in one for key in one[name])


def positions_of(layer: dict[str, Tensor]) -> set[int]:
    return set(layer["indices"].tolist())


options = st.fixed_dictionaries(
    {
        "reactivation": st.sampled_from([0.0, 0.3, 1.0]),
        "on_drop": st.sampled_from(["commit_reactivated", "keep"]),
        "drop": st.sampled_from(["magnitude", "movement", "random"]),
        "grow": st.sampled_from(["gradient", "momentum", "random"]),
        "adapt": st.sampled_from(["sensitivity", "activation", "curvature", "magnitude"]),
        "reactivate": st.sampled_from(["commit", "trial"]),
        "scope": st.sampled_from(["layer", "global"]),
        "init": st.sampled_from(["gradient", "random"]),
        "moments": st.sampled_from(["zero", "seeded"]),
        "drop_fraction": st.just(0.0) | st.floats(0.01, 1),
        "density": st.floats(0.005, 0.4),
        "interval": st.integers(2, 3),
        "seed": st.integers(0, 2**63 - 1),
    }
)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(options, st.sampled_from([torch.float32, torch.bfloat16]), st.floats(0.1, 0.6))
def test_counts_hold_through_every_evolution(over: dict[str, Any], dtype: torch.dtype, sparsity: float) -> None:
    assume(over["reactivate"] == "commit" or over["reactivation"] > 0)  # else nothing goes on trial
    model = make_model(sparsity, dtype)
    config = dataclasses.replace(BASE, **over)
    seft = SeftOptimizer(model, config, lr=1e-2)
    targets: dict[str, int] = {}
    for t, before, after in run(model, seft, 12):
        targets = targets or {name: int((layer["weight"] != 0).sum()) for name, layer in before.items()}
        trial = {layer.name: len(layer.trial) for layer in seft.deltas()}
        active = {name: int(layer["mask"].sum()) - trial[name] for name, layer in after.items()}
        assert all(trial[name] <= int(config.density * len(layer["mask"]) + 0.5) for name, layer in after.items())
        assert sum(active.values()) == sum(targets.values())
        if config.scope == "layer":
            assert active == targets
        updated_since = seft.evolution is None or seft.evolution.first
        for name, layer in after.items():
            assert layer["mask"][layer["indices"].long()].all(), "a delta outside the mask"
            assert len(layer["indices"]) <= int(config.density * layer["mask"].numel() + 0.5)
            assert not layer["weight"][~layer["mask"]].any()
            wanted = int((~layer["mask"]).sum())
            # A reactivated position is 0 until the next update, which moves it whatever its gradient is.
            still = 0 if updated_since else int(((layer["base"] == 0) & (layer["values"] == 0)).sum())
            for weight in (layer["weight"], layer["weight"].bfloat16()):
                assert wanted <= int((weight == 0).sum()) <= wanted + still, f"step {t}, {name}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "over", [{}, {"reactivation": 0.5}, {"scope": "global"}, {"moments": "seeded"}, {"interval": 2}]
)
def test_zeros_are_exactly_as_many_as_at_the_start(over: dict[str, Any], dtype: torch.dtype) -> None:
    model = make_model(dtype=dtype)
    zeros_before = sum(int((p == 0).sum()) for p in model.parameters())
    seft = SeftOptimizer(model, dataclasses.replace(BASE, **over), lr=1e-2)
    reactivated = 0
    for _ in run(model, seft, 12):
        if seft.evolution is None or seft.evolution.first:
            counts = seft.sparsity()
            assert sum(layer.zeros for layer in counts) == zeros_before
            assert all(layer.zeros == layer.numel - layer.mask_size for layer in counts)
            assert all(layer.active == layer.mask_size for layer in counts)
        else:
            reactivated += seft.evolution.reactivated
    assert reactivated > 0
    seft.detach()
    assert sum(int((p.bfloat16() == 0).sum()) for p in model.parameters()) == zeros_before


def test_dropping_restores_the_base_bit_for_bit() -> None:
    config = dataclasses.replace(BASE, drop_fraction=1.0, drop_schedule="constant", reactivation=0.0, end=3)
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(dtype=dtype)
        original = {name: p.detach().clone() for name, p in model.named_parameters()}
        seft = SeftOptimizer(model, config, lr=1e-2)
        dropped = 0
        for t, before, after in run(model, seft, 3):
            for name, layer in after.items():
                gone = torch.tensor(sorted(positions_of(before[name]) - positions_of(layer)), dtype=torch.int64)
                first = original[f"{name}.weight"].flatten()
                assert torch.equal(layer["weight"][gone].view(torch.uint8), first[gone].view(torch.uint8))
                assert t < 3 or not torch.equal(before[name]["weight"][gone], first[gone])
                dropped += len(gone)
        # Everything left, nothing else was ever touched: the model is the one it was.
        assert dropped == sum(len(layer["indices"]) for layer in view(seft).values()) > 0
        for name, parameter in model.named_parameters():
            if "anchor" not in name:
                assert torch.equal(parameter, original[name]), name


def test_a_dropped_reactivated_position_keeps_its_weight() -> None:
    config = dataclasses.replace(BASE, drop_fraction=1.0, drop_schedule="constant", adapt="none", interval=3, end=3)
    model = make_model()
    original = {name: p.detach().clone() for name, p in model.named_parameters()}
    seft = SeftOptimizer(model, config, lr=1e-2)
    committed = 0
    for t, before, after in run(model, seft, 3):
        if t < 3:
            continue
        for name, layer in after.items():
            gone = before[name]["indices"].long()
            pruned = gone[original[f"{name}.weight"].flatten()[gone] == 0]
            committed += len(pruned)
            assert layer["weight"][pruned].all(), "an active position went back to 0"
            assert layer["mask"][pruned].all()
    assert committed > 0


def test_drop_fraction_0_changes_nothing() -> None:
    model = make_model()
    seft = SeftOptimizer(model, dataclasses.replace(BASE, drop_fraction=0.0), lr=1e-2)
    full = False
    evolutions = 0
    for _, before, after in run(model, seft, 10):
        for name, layer in after.items():
            if full:
                assert torch.equal(layer["mask"], before[name]["mask"]) and torch.equal(
                    layer["indices"], before[name]["indices"]
                )
        if seft.evolution is not None:
            evolutions += 1
            assert not full or (seft.evolution.dropped, seft.evolution.grown, seft.evolution.pruned) == (0, 0, 0)
            # Adapt may take a delta away only in the first support, where all deltas are new and exempt: so it is full.
            full = True
    assert evolutions == 4


@pytest.mark.parametrize("over", [{}, {"static": True}, {"begin": 5, "init": "random"}])
def test_nothing_moves_off_schedule(over: dict[str, Any]) -> None:
    model = make_model()
    config = dataclasses.replace(BASE, **over)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if "_proj.weight" not in name}
    seft = SeftOptimizer(model, config, lr=1e-2)
    when = []
    for t, before, after in run(model, seft, 12):
        if seft.evolution is not None:
            when.append(t)
            continue
        for name, layer in after.items():
            for key in ("mask", "indices", "base"):
                assert torch.equal(layer[key], before[name][key]), f"step {t}, {name}: {key}"
            outside = torch.ones_like(layer["mask"])
            outside[layer["indices"].long()] = False
            assert torch.equal(layer["weight"][outside], before[name]["weight"][outside]), f"step {t}, {name}"
    assert when == ([1] if config.static else [6, 9] if config.begin == 5 else [1, 3, 6, 9])
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in frozen.items())


@pytest.mark.parametrize("adapt", ["sensitivity", "activation", "magnitude"])
def test_grown_entries_survive_and_start_at_zero(adapt: Any) -> None:
    model = make_model()
    seft = SeftOptimizer(model, dataclasses.replace(BASE, adapt=adapt), lr=1e-2)
    for t, before, after in run(model, seft, 9):
        if seft.evolution is None or t == 1:
            continue
        found = reactivated = 0
        for name, layer in after.items():
            new = torch.tensor(sorted(positions_of(layer) - positions_of(before[name])), dtype=torch.int64)
            rows = torch.isin(layer["indices"].long(), new)
            for key in ("values", "exp_avg", "exp_avg_sq", "age"):
                assert not layer[key][rows].any(), key
            assert layer["mask"][new].all()
            assert torch.equal(layer["weight"][new], layer["base"][rows]), "a grown entry does not change the weight"
            found += len(new)
            reactivated += int((~before[name]["mask"][new]).sum())
        # Every grown entry is still there: none was pruned in the step that grew it.
        assert (found, reactivated) == (seft.evolution.grown, seft.evolution.reactivated) and reactivated > 0


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.floats(0.1, 1), st.sampled_from(["gradient", "random", "momentum"]), st.sampled_from(["magnitude", "random"]))
def test_dropped_positions_do_not_return_at_once(fraction: float, grow: Any, drop: Any) -> None:
    config = dataclasses.replace(
        BASE, drop_fraction=fraction, drop_schedule="constant", grow=grow, drop=drop, adapt="none"
    )
    model = make_model()
    seft = SeftOptimizer(model, config, lr=1e-2)
    for t, before, after in run(model, seft, 6):
        if seft.evolution is None or t == 1:
            continue
        # Without Adapt, whatever left was dropped: had one returned, fewer would have left.
        left = sum(len(positions_of(before[name]) - positions_of(layer)) for name, layer in after.items())
        assert left == seft.evolution.dropped == seft.evolution.grown > 0


@pytest.mark.parametrize("over", [{}, {"drop": "random", "grow": "random", "init": "random"}])
def test_same_seed_same_run(over: dict[str, Any]) -> None:
    config = dataclasses.replace(BASE, **over)

    def final(seed: int) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
        model = make_model()
        seft = SeftOptimizer(model, dataclasses.replace(config, seed=seed), lr=1e-2, max_grad_norm=1.0)
        digests = [seft.evolution.digest for _ in run(model, seft, 8) if seft.evolution is not None]
        return view(seft), digests

    (one, first), (two, second), (three, third) = final(0), final(0), final(1)
    assert first == second and same(one, two)
    assert (first != third) == bool(over), "the seed matters to random criteria only"
    assert bool(over) or same(one, three)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_all_positions_without_evolution_is_adamw(weight_decay: float) -> None:
    model = make_model(sparsity=0)
    twin = copy.deepcopy(model)
    config = moving(density=1.0, allow_dense=True, static=True, steps=20)
    adam: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": weight_decay}
    seft = SeftOptimizer(model, config, **adam)
    for p in twin.parameters():
        p.requires_grad_(False)
    weights = [twin.get_parameter(f"{name}.weight") for name in seft.target_names]
    for weight in weights:
        weight.requires_grad_(True)
    torch_adam = torch.optim.AdamW(weights, **adam)
    for t in range(10):
        for net, optimizer in ((model, seft), (twin, torch_adam)):
            net(**batch(t, vocab=VOCAB)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    untrained = make_model(sparsity=0)
    for name, weight in zip(seft.target_names, weights, strict=True):
        found = model.get_parameter(f"{name}.weight")
        assert not torch.equal(found, untrained.get_parameter(f"{name}.weight"))
        torch.testing.assert_close(found, weight.detach(), rtol=1e-5, atol=1e-6)
    assert all(layer.support == layer.numel == layer.active for layer in seft.sparsity())


@pytest.mark.parametrize("init", ["gradient", "random"])
def test_static_never_changes(init: Any) -> None:
    model = make_model()
    seft = SeftOptimizer(model, dataclasses.replace(BASE, static=True, init=init), lr=1e-2)
    states = [after for _, _, after in run(model, seft, 9)]
    for name, layer in states[0].items():
        assert len(layer["indices"]) == int(BASE.density * layer["mask"].numel() + 0.5)
        for later in states[1:]:
            assert torch.equal(layer["indices"], later[name]["indices"]) and torch.equal(
                layer["mask"], later[name]["mask"]
            )


def test_without_adapt_sparsity_is_lost_and_said_so() -> None:
    model = make_model()
    seft = SeftOptimizer(model, dataclasses.replace(BASE, adapt="none"), lr=1e-2)
    reactivated = 0
    for _ in run(model, seft, 10):
        reactivated += seft.evolution.reactivated if seft.evolution is not None else 0
    assert reactivated > 0
    counts = seft.sparsity()
    assert sum(layer.active - layer.mask_size for layer in counts) == reactivated
    assert all(layer.zeros == layer.numel - layer.active for layer in counts)


@pytest.mark.parametrize("over", [{}, {"grow": "momentum", "moments": "seeded"}, {"adapt": "activation"}])
def test_accumulated_gradients_equal_one_batch(over: dict[str, Any]) -> None:
    results = []
    for parts in (1, 2):
        model = make_model()
        seft = SeftOptimizer(model, dataclasses.replace(BASE, **over), lr=1e-2, max_grad_norm=1.0)
        for t in range(10):
            data = batch(t, size=4, vocab=VOCAB)
            for ids in data["input_ids"].chunk(parts):
                (model(input_ids=ids, labels=ids).loss / parts).backward()
            seft.step()
            seft.zero_grad()
        results.append(view(seft))
    for name, layer in results[0].items():
        other = results[1][name]
        assert torch.equal(layer["mask"], other["mask"]) and torch.equal(layer["indices"], other["indices"])
        torch.testing.assert_close(layer["weight"], other["weight"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_gradient_that_is_not_finite_changes_nothing(step: int) -> None:
    runs = []
    for poisoned in (False, True):
        model = make_model()
        seft = SeftOptimizer(model, BASE, lr=1e-2)
        seft.attach()
        for t in range(1, 5):
            if poisoned and t == step:
                before = view(seft)
                (model(**batch(99, vocab=VOCAB)).loss * float("inf")).backward()
                with pytest.raises(FloatingPointError, match=f"step {t}: the gradient of .*_proj is not finite"):
                    seft.step()
                seft.zero_grad()
                assert same(before, view(seft)) and seft.num_steps == t - 1
            model(**batch(t, vocab=VOCAB)).loss.backward()
            seft.step()
            seft.zero_grad()
        runs.append(view(seft))
    assert same(*runs), "the refused batch left a trace"


def test_step_without_backward_does_nothing() -> None:
    model = make_model()
    seft = SeftOptimizer(model, BASE, lr=1e-2)
    seft.step()
    assert seft.num_steps == 0
    for t, _, after in run(model, seft, 2):
        seft.step()
        assert seft.num_steps == t and same(after, view(seft))
    with torch.no_grad():
        model(**batch(0, vocab=VOCAB))
    seft.step()
    assert seft.num_steps == 2
