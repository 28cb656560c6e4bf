"""A rank that holds something else than the others, or breaks a promise, stops every rank with the same error."""

from collections.abc import Callable
from typing import Any

import pytest

from seft_dist.optim.delta import Support
from tests.layouts import build
from tests.models import batch, moving
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
        seft.backend.prepare_write()
        seft.sparse_state.verify(seft.backend, seft.config)
        if rank == world - 1:
            ACTS[what](seft.sparse_state)
        with pytest.raises(RuntimeError, match=message) as error:
            seft.sparse_state.verify(seft.backend, seft.config)
        return str(error.value)

    texts = run_ranks(on_rank, world_size, timeout=60)
    assert len(set(texts)) == 1, texts
    assert "layers.0" in texts[0]
