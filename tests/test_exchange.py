"""Gradients that leave in backward: the same result, whenever they left; nothing waits for the device."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seft_dist import SeftConfig, SeftOptimizer
from seft_dist.kernels import adamw
from seft_dist.optim.exchange import buckets_of
from tests.layouts import build
from tests.models import batch, moving, prune_, tiny_llama
from tests.ranks import run_ranks
from tests.waits import Waits

CONFIG = moving(density=0.05, interval=3, window=2, steps=8)
STEPS = 6


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=50), st.integers(4, 5000))
def test_buckets_hold_every_layer_once_in_backward_order(sizes: list[int], limit: int) -> None:
    buckets = buckets_of(sizes, limit)
    assert [layer for bucket in buckets for layer in bucket] == list(reversed(range(len(sizes))))
    weights = [4 * sum(sizes[layer] for layer in bucket) for bucket in buckets]
    for bucket, weight in zip(buckets, weights, strict=True):
        assert weight - 4 * sizes[bucket[-1]] < limit  # it was closed by the layer that filled it
    assert all(weight > 0 for weight in weights[:-1])
    if sum(sizes):
        assert len(buckets) <= 1 + max(4, 4 * sum(sizes) // min(limit, max(1, sum(sizes))))


def run(rank: int, world: int, layout: str, overlap: bool, micro: int) -> tuple[list[float], list[str], list[int]]:
    """Losses, digests, and how many buckets had left when backward was over."""
    model = prune_(tiny_llama())
    called, seft, backward, step = build(layout, CONFIG, model, ds={"gradient_accumulation_steps": micro})
    losses, digests, left = [], [], []
    for t in range(STEPS):
        data = batch(t, size=2 * world * micro)
        for m in range(micro):
            begin = 2 * (rank * micro + m)
            loss = called(**{key: value[begin : begin + 2] for key, value in data.items()}).loss
            if overlap:
                seft.set_is_last_backward(m + 1 == micro)
            backward(loss)
            losses.append(loss.item())
            if m + 1 == micro:
                left.append(seft.exchange.num_sent)
            if layout.startswith("zero") or m + 1 == micro:
                step()
        if seft.evolution:
            digests.append(seft.evolution.digest)
    return losses, digests, left


@pytest.mark.slow
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("layout", ["ddp", "fsdp", "hsdp", "zero3"])
def test_leaving_early_changes_no_bit(layout: str, micro: int) -> None:
    early = run_ranks(lambda rank, world: run(rank, world, layout, True, micro), 2)
    late = run_ranks(lambda rank, world: run(rank, world, layout, False, micro), 2)
    for (losses, digests, left), (losses_late, digests_late, left_late) in zip(early, late, strict=True):
        assert losses == losses_late
        assert digests == digests_late and len(digests) == 3
        assert left_late == [0] * STEPS
        if layout != "hsdp":  # with 2 ranks a shard group is one rank, there is nothing to send
            assert left[0] == 0 and all(count >= 4 for count in left[1:])


def test_a_module_used_more_often_than_before_is_refused() -> None:
    def on_rank(rank: int, world: int) -> None:
        model = prune_(tiny_llama())
        seft = SeftOptimizer(model, CONFIG, lr=1e-3)
        data = batch(0, size=2)
        for uses in (1, 1, 2):
            loss = sum(model(**data).loss for _ in range(uses))
            assert isinstance(loss, torch.Tensor)
            seft.set_is_last_backward(True)
            if uses == 2:
                with pytest.raises(RuntimeError, match="more often than in the one before"):
                    loss.backward()
            else:
                loss.backward()
                seft.step()
                seft.zero_grad()

    run_ranks(on_rank, 2)


def one_process(late: bool, config: SeftConfig) -> tuple[Any, SeftOptimizer]:
    model = prune_(tiny_llama())
    seft = SeftOptimizer(model, config, lr=1e-2, max_grad_norm=1.0)
    seft.attach()
    seft._checks_late = late
    return model, seft


def test_an_ordinary_step_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "library", lambda: None)  # as on a GPU
    model, seft = one_process(late=True, config=moving(density=0.05, static=True, steps=8))
    for t in range(4):
        model(**batch(t, size=2)).loss.backward()
        with Waits() as waits:
            seft.step()
        seft.zero_grad()
        if t:  # the first step chooses the support and checks its write
            # one value is read: what the step before found out, which on a GPU has been copied long since
            assert waits.found == ["aten._local_scalar_dense.default"] * (t > 1), t


def test_a_step_refused_late_changed_nothing_and_does_not_count() -> None:
    config = moving(density=0.05, interval=4, steps=12)

    def train(poison: bool, late: bool) -> list[Any]:
        model, seft = one_process(late, config)
        seen: list[Any] = []
        for t in range(8):
            if poison and t == 2:
                slot = seft._slots[3]
                model(**batch(99, size=2)).loss.backward()
                assert slot.grad is not None
                slot.grad[0] = float("nan")
                columns = seft.sparse_state.columns
                before = {key: value.clone() for key, value in vars(columns).items()}
                if late:
                    seft.step()
                    assert all(torch.equal(before[key], value) for key, value in vars(columns).items())
                    model(**batch(98, size=2)).loss.backward()
                with pytest.raises(FloatingPointError, match=r"step 3: the gradient of .* is not finite \(1 of "):
                    seft.step()
                assert seft.num_steps == 2
                assert all(torch.equal(before[key], value) for key, value in vars(columns).items())
                seft.zero_grad()
            loss = model(**batch(t, size=2)).loss
            loss.backward()
            seft.step()
            seft.zero_grad()
            seen += [loss.item(), seft.evolution.digest if seft.evolution else None]
        return seen

    clean = train(poison=False, late=False)
    assert train(poison=True, late=False) == train(poison=True, late=True) == clean
