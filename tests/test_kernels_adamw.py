"""AdamW of entries of different ages: against torch's own, and compiled against not."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seft_dist.kernels import adamw
from seft_dist.kernels.adamw import AdamW

RULE = AdamW(lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1, decay_weight=True, oldest=20)
YES = torch.tensor(True)


def entries(n: int, seed: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    moments = [torch.randn(n, generator=draw), torch.rand(n, generator=draw)]
    age = torch.randint(1, 20, (n,), generator=draw, dtype=torch.int32)
    age[torch.rand(n, generator=draw) < 0.3] = 0
    for moment in moments:
        moment[age == 0] = 0
    base, values = torch.randn(n, generator=draw), torch.randn(n, generator=draw)
    return {"base": base, "values": values, "moments": moments, "age": age}


def columns(of: dict[str, Any]) -> list[Tensor]:
    return [of["base"], of["values"], *of["moments"], of["age"]]


@settings(deadline=None)  # the first example may compile
@given(
    n=st.one_of(st.integers(0, 40), st.integers(8_000, 20_000)),
    seed=st.integers(0, 99),
    scale=st.floats(0, 1),
    decay=st.sampled_from([0.0, 0.1]),
    decay_weight=st.booleans(),
)
def test_compiled_or_not_it_is_the_same(n: int, seed: int, scale: float, decay: float, decay_weight: bool) -> None:
    rule = dataclasses.replace(RULE, weight_decay=decay, decay_weight=decay_weight)
    grad = torch.randn(n, generator=torch.Generator().manual_seed(seed + 1))
    mine, other = entries(n, seed), entries(n, seed)
    weight = rule.update_(grad, torch.tensor(scale), YES, **mine)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adamw, "library", lambda: None)
        wanted = rule.update_(grad, torch.tensor(scale), YES, **other)
    torch.testing.assert_close([weight, *columns(mine)], [wanted, *columns(other)])
    assert torch.equal(weight, mine["base"] + mine["values"])
    assert torch.equal(mine["age"], entries(n, seed)["age"] + 1)


def test_an_entry_does_not_depend_on_its_neighbours_or_the_threads() -> None:
    n, grad = 50_001, torch.randn(50_001)
    whole, threads = entries(n, 0), torch.get_num_threads()
    RULE.update_(grad, torch.tensor(0.5), YES, **whole)
    parts = [columns(entries(n, 0)), columns(entries(n, 0))]
    try:
        torch.set_num_threads(1)
        for pick in (slice(0, 12_345), slice(12_345, n)):
            base, values, mean, square, age = (column[pick].clone() for column in parts[0])
            RULE.update_(grad[pick], torch.tensor(0.5), YES, base, values, [mean, square], age)
            assert all(
                torch.equal(mine, all_of[pick])
                for mine, all_of in zip((base, values, mean, square, age), columns(whole), strict=True)
            )
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("compiled", [True, False])
def test_not_finite_leaves_every_bit(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(adamw, "library", lambda: None)
    mine = entries(100, 3)
    weight = RULE.update_(torch.full((100,), float("nan")), torch.tensor(1.0), ~YES, **mine)
    assert all(map(torch.equal, columns(mine), columns(entries(100, 3))))
    assert torch.equal(weight, mine["base"] + mine["values"])


@pytest.mark.parametrize("compiled", [True, False])
def test_it_is_torchs(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(adamw, "library", lambda: None)
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(1000, generator=draw)
    theirs = torch.nn.Parameter(base.clone())
    torchs = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
    values, mean, square, age = (torch.zeros(1000, dtype=t) for t in (*[torch.float32] * 3, torch.int32))
    for step in range(10):
        theirs.grad = torch.randn(1000, generator=draw)
        rule = dataclasses.replace(RULE, oldest=step)
        weight = rule.update_(theirs.grad, torch.tensor(1.0), YES, base, values, [mean, square], age)
        torchs.step()
    torch.testing.assert_close(weight, theirs.detach())


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("age", [21, 10**6, 2**31 - 1, -1, -3, -(10**9)])
def test_an_age_outside_of_the_table_is_refused(age: int, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(adamw, "library", lambda: None)
    mine = entries(100, 3)
    mine["age"][7] = age
    before = [column.clone() for column in columns(mine)]
    with pytest.raises(ValueError, match=f"ages from 0 to 20, not .*{age}"):
        RULE.update_(torch.ones(100), torch.tensor(1.0), YES, **mine)
    assert all(map(torch.equal, columns(mine), before))
    mine["age"][7] = 20  # the oldest
    assert RULE.update_(torch.ones(100), torch.tensor(1.0), YES, **mine).isfinite().all()
