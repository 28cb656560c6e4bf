"""A rank that holds something else than the others, or breaks a promise, stops every rank with the same error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from seft_dist import SeftConfig, SeftOptimizer
from seft_dist.optim.delta import Support
from tests.layouts import build
from tests.models import batch, moving, prune_, tiny_llama
from tests.ranks import run_ranks


def _other_mask(state: Any) -> None:
    state.masks[1] = state.masks[1].roll(1)  # as many bits, elsewhere


def _other_support(state: Any) -> None:
    support = state.supports[1]
    state.supports[1] = Support(support.shape, [support.positions()[:-1]])


def _fewer_active(state: Any) -> None:
    state.masks[1] = state.masks[1].clone()
    state.masks[1][: len(state.masks[1]) // 2] = 0


ACTS: dict[str, Callable[[Any], None]] = {"mask": _other_mask, "support": _other_support, "active": _fewer_active}


@pytest.mark.parametrize(
    ("layout", "world_size", "what", "message"),
    [
        ("hsdp", 4, "mask", r"ranks \[[13]\] hold another mask"),
        ("hsdp", 4, "support", r"ranks \[3\] hold another support"),
        ("hsdp", 4, "active", r"ranks \[[13]\] hold another mask"),
        ("fsdp", 2, "mask", r"ranks \[1\] hold an active delta outside the mask, or a non-zero weight there"),
        ("fsdp", 3, "support", r"ranks \[2\] hold another support"),
        ("fsdp", 2, "active", r"mask has \d+ active positions, needs exactly \d+"),
        ("single", 1, "mask", r"ranks \[0\] hold an active delta outside the mask"),
    ],
)
def test_all_ranks_raise_the_same_error(layout: str, world_size: int, what: str, message: str) -> None:
    def on_rank(rank: int, world: int) -> str:
        model, seft, backward, step = build(layout, moving(density=0.05, interval=4, window=2, steps=8))
        backward(model(**batch(0, rank)).loss)
        step()
        seft.backend.drop_gathered()
        seft.sparse_state.verify(seft.backend, seft.config)
        if rank == world - 1:
            ACTS[what](seft.sparse_state)
        with pytest.raises(RuntimeError, match=message) as error:
            seft.sparse_state.verify(seft.backend, seft.config)
        return str(error.value)

    texts = run_ranks(on_rank, world_size, timeout=60)
    assert len(set(texts)) == 1, texts
    assert "layers.0" in texts[0]


def test_replicas_of_other_weights_are_refused() -> None:
    def on_rank(rank: int, world: int) -> str:
        model: Any = prune_(tiny_llama())
        with torch.no_grad():
            weight = model.model.layers[1].mlp.up_proj.weight
            weight[weight != 0] *= 1 if rank < world // 2 else 1.5
        _, seft, _, _ = build("hsdp", moving(density=0.05, interval=4, window=2, steps=8), model)
        with pytest.raises(ValueError, match="is not the same in all replicas") as error:
            seft.attach()
        return str(error.value)

    texts = run_ranks(on_rank, 4, timeout=60)
    assert len(set(texts)) == 1 and "layers.1.mlp.up_proj" in texts[0]


@pytest.mark.parametrize("store", ["full", "factored"])
def test_a_window_that_is_not_finite_in_one_replica_stops_all(store: str) -> None:
    def on_rank(rank: int, world: int) -> str:
        config = moving(density=0.05, interval=4, window=3, steps=8, adapt="activation", window_store=store)
        model, seft, backward, step = build("hsdp", config)
        for t in range(2):  # the second step is the window's first
            backward(model(**batch(t, rank)).loss)
            if t == 1 and rank == 3:
                window: Any = seft._windows[2]
                window._step_sums["norms"][0] = float("nan")
            if t == 0:
                step()
        with pytest.raises(FloatingPointError, match="step 2: the gradient of .* is not finite") as error:
            step()
        return str(error.value)

    assert len(set(run_ranks(on_rank, 4, timeout=60))) == 1


def test_a_refused_optimizer_leaves_the_model_as_it_was() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    model = prune_(tiny_llama())
    for name in [name for name, _ in model.named_modules()]:  # without any norm
        if name.endswith("norm"):
            model.set_submodule(name, Scaled())
    wants = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match="set train_norms to false"):
        SeftOptimizer(model, SeftConfig(density=0.05, train_norms=True))
    assert [parameter.requires_grad for parameter in model.parameters()] == wants
    seft = SeftOptimizer(model, SeftConfig(density=0.05, interval=4))
    with pytest.raises(ValueError, match=r"already has a SeftOptimizer: call detach\(\)"):
        SeftOptimizer(model, SeftConfig(density=0.05))
    model(**batch(0)).loss.backward()
    seft.step()
    assert seft.num_steps == 1
