"""``weight * mask`` prunes to -0.0: a run begins with 0.0 there, so that resuming it or packing it changes no bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seft_dist import SeftOptimizer, pack_gathers, pack_weights
from seft_dist.io import checkpoint
from seft_dist.modules.targets import find_targets
from tests.layouts import build
from tests.models import batch, moving, prune_, tiny_llama
from tests.ranks import run_ranks

CONFIG = moving(density=0.05, interval=2, steps=6)


@torch.no_grad()
def model_with_negative_zeros(dtype: torch.dtype = torch.float32) -> Any:
    """Pruned as ``weight * mask`` does it."""
    model, pruned = tiny_llama(), prune_(tiny_llama())
    for name, target in find_targets(model).items():
        target.weight.mul_(pruned.get_parameter(f"{name}.weight").ne(0).float())
        assert negative_zeros(target.weight) > 100
    return model.to(dtype)


def negative_zeros(weight: Tensor) -> int:
    return int(((weight == 0) & weight.signbit()).sum())


def bits(seft: SeftOptimizer) -> list[Tensor]:
    """Bits of every whole target. Collective."""
    seft.backend.drop_gathered()
    kinds = {2: torch.int16, 4: torch.int32}
    whole = [seft.backend.full(target.weight).clone() for target in seft.backend.holders]
    assert not any(map(negative_zeros, whole))
    return [weight.view(kinds[weight.element_size()]) for weight in whole]


def train(layout: str, rank: int, folder: Path, *, first: int = 0, last: int = 5, dtype: Any = torch.float32) -> Any:
    """Steps first .. last - 1 on one of ``tests.layouts``, or "resident" or "gather"; the weights' bits."""
    model = model_with_negative_zeros(dtype)
    if layout == "resident":
        pack_weights(model)
    called, seft, backward, step = build(
        "fsdp" if layout == "gather" else "single" if layout == "resident" else layout, CONFIG, model
    )
    if layout == "gather":
        pack_gathers(model)
    seft.attach()
    assert not any(negative_zeros(seft.backend.own(i)) for i in range(len(seft.backend.names)))
    if first:
        checkpoint.load(seft, folder / f"step-{first:08d}")
    for t in range(first, last):
        backward(called(**batch(t, rank)).loss)
        step()
        if t == 2 and not first:
            checkpoint.save(seft, folder, {}, keep=9)
    return bits(seft)


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other) > 0 and all(map(torch.equal, one, other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_and_resident_are_the_whole_run_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    whole = train("single", 0, tmp_path, dtype=dtype)
    assert_equal(whole, train("single", 0, tmp_path, first=3, dtype=dtype))
    assert_equal(whole, train("resident", 0, tmp_path / "resident", dtype=dtype))


LONG = pytest.mark.long


@pytest.mark.parametrize(
    "layout", [pytest.param("ddp", marks=LONG), "fsdp", pytest.param("gather", marks=LONG), "zero3"]
)
def test_resumed_on_two_ranks_is_the_whole_run_bit_for_bit(layout: str, tmp_path: Path) -> None:
    def on_rank(rank: int, world: int, first: int) -> Any:
        return train(layout, rank, tmp_path, first=first)

    whole = run_ranks(on_rank, 2, 0)[0]
    assert_equal(whole, run_ranks(on_rank, 2, 3)[0])


def test_fingerprints_and_replicas_do_not_see_the_sign(tmp_path: Path) -> None:
    """One rank's copy has -0.0, the other's 0.0: the same model. A checkpoint of one goes on with the other."""

    def on_rank(rank: int, world: int) -> list[int]:
        model = model_with_negative_zeros() if rank else prune_(tiny_llama())
        _, seft, _, _ = build("ddp", CONFIG, model)
        seft.attach()
        return seft.sparse_state.fingerprints

    prints = run_ranks(on_rank, 2)
    plain = SeftOptimizer(prune_(tiny_llama()), CONFIG)
    plain.attach()
    assert prints == [plain.sparse_state.fingerprints] * 2
