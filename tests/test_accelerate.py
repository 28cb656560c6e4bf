"""SEFT in loops of accelerate, and what loops of one's own do by habit: clip, or step another optimizer."""

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from seft_dist import SeftOptimizer
from tests.hf_trainers import CONFIG, STEPS, loop, same_topology
from tests.models import batch, prune_, tiny_llama
from tests.ranks import run_ranks

OFFLOAD: dict[str, Any] = {
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero_force_ds_cpu_optimizer": False,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "over"),
    [
        ("ddp", {}),
        ("fsdp", {}),
        ("fsdp", {"activation_checkpointing": True}),
        ("zero2", {}),
        ("zero3", {}),
        pytest.param("zero2", OFFLOAD, marks=pytest.mark.long),
    ],
)
def test_accelerate_on_two_ranks_is_one_rank(layout: str, over: dict[str, Any]) -> None:
    def on_rank(rank: int, world: int) -> Any:
        return loop(rank, world, layout, **over)

    assert same_topology(run_ranks(on_rank, 2)[0], run_ranks(lambda rank, world: loop(rank, world, "ddp"), 1)[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [pytest.param("ddp", marks=pytest.mark.long), "fsdp", pytest.param("zero2", marks=pytest.mark.long), "zero3"],
)
def test_accelerate_goes_on_from_its_saved_state(layout: str, tmp_path: Path) -> None:
    def train_part(begin: int, end: int) -> Any:
        return run_ranks(lambda rank, world: loop(rank, world, layout, steps=(begin, end), saved=tmp_path), 2)[0]

    in_a_window = 7
    train_part(0, in_a_window)
    resumed, whole = train_part(in_a_window, STEPS), train_part(0, STEPS)
    for name in whole:
        for key, value in whole[name].items():
            assert torch.equal(resumed[name][key], value), (name, key)


def test_clipping_by_others_is_refused_or_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)  # what other tests have imported

    def step(seft: SeftOptimizer, model: torch.nn.Module) -> None:
        model(**batch(0)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        seft.step()

    model = prune_(tiny_llama())
    with pytest.raises(ValueError, match="gradients were clipped outside of SeftOptimizer"):
        step(SeftOptimizer(model, CONFIG), model)
    model = prune_(tiny_llama())
    with pytest.warns(UserWarning, match="SeftOptimizer itself clips to max_grad_norm=1"):
        step(SeftOptimizer(model, CONFIG, max_grad_norm=1.0), model)
    model = prune_(tiny_llama())
    monkeypatch.setitem(sys.modules, "deepspeed", sys)  # its own default clips what it sees
    with pytest.warns(UserWarning, match="SeftOptimizer itself does not clip"):
        step(SeftOptimizer(model, CONFIG), model)
    model = prune_(tiny_llama())
    seft = SeftOptimizer(model, CONFIG)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*clipped outside.*")
        model(**batch(0)).loss.backward()
        seft.step()


@pytest.mark.long  # compiles DeepSpeed's optimizer, for a minute
def test_the_optimizer_that_accelerate_puts_in_its_place_is_noticed() -> None:
    """With offload_optimizer in the ds_config, accelerate makes a DeepSpeedCPUAdam of any optimizer."""

    def on_rank(rank: int, world: int) -> None:
        with pytest.raises(RuntimeError, match="another optimizer updates the model"):
            loop(rank, world, "zero2", zero_optimization=OFFLOAD["zero_optimization"])

    run_ranks(on_rank, 2, timeout=280)


def test_an_optimizer_that_steps_instead_of_seft_is_noticed() -> None:
    """As accelerate's DeepSpeedCPUAdam does with offload_optimizer: it is given the anchors."""
    model = prune_(tiny_llama())
    seft = SeftOptimizer(model, CONFIG)
    other = torch.optim.AdamW(seft.param_groups[0]["params"], lr=1e-3)
    with pytest.raises(RuntimeError, match="another optimizer updates the model"):
        for t in range(3):
            model(**batch(t)).loss.backward()
            other.step()
            other.zero_grad()
