"""Counting zeros, patterns and broken values: against the plain expressions that are slower."""

import pytest
import torch
from torch import Tensor

import tests.preload  # noqa: F401
from seft_dist.pruning import stored_zeros
from seft_dist.sparsity.casts import unsigned_zeros
from seft_dist.sparsity.zeros import all_finite, num_zeros

TYPES = (torch.float16, torch.bfloat16, torch.float32)


def values(dtype: torch.dtype, seed: int, shape: tuple[int, ...] = (24, 40)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(shape, generator=generator).to(dtype)
    found[torch.rand(shape, generator=generator) < 0.4] = 0.0
    found[torch.rand(shape, generator=generator) < 0.1] = -0.0
    return found


@pytest.mark.parametrize("dtype", TYPES)
def test_zeros_with_and_without_a_sign_are_counted(dtype: torch.dtype) -> None:
    weight = values(dtype, 1)
    for one in (weight, weight.T, weight[::2, 1::3], weight[:0], torch.full((3,), float("nan"), dtype=dtype)):
        assert num_zeros(one) == int((one == 0).sum())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("broken", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_found_anywhere(dtype: torch.dtype, broken: float) -> None:
    weight = values(dtype, 2)
    assert all_finite(weight) and all_finite(weight[:0])
    assert all_finite(torch.full((4,), torch.finfo(dtype).max, dtype=dtype))
    for place in (0, 517, weight.numel() - 1):
        one = weight.clone()
        one.view(-1)[place] = broken
        assert not all_finite(one)


@pytest.mark.parametrize("dtype", TYPES)
def test_only_the_sign_of_zeros_is_taken(dtype: torch.dtype) -> None:
    weight = values(dtype, 3)
    weight[0, :3] = torch.tensor([float("nan"), -float("inf"), -torch.finfo(dtype).tiny], dtype=dtype)
    weight[0, 0] = -weight[0, 0]
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    found = unsigned_zeros(weight)
    zeros = weight == 0
    assert found.view(bits)[zeros].eq(0).all() and torch.equal(found.view(bits)[~zeros], weight.view(bits)[~zeros])
    assert unsigned_zeros(found) is found  # nothing to take: no copy
    assert unsigned_zeros(weight[:0]).numel() == 0


@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("at_once", [40, 1 << 20])
def test_most_weights_of_a_group(width: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_zeros, "_WEIGHTS_AT_ONCE", at_once)
    for most in range(width + 1):
        weight = torch.zeros(24, 40 // width, width)
        weight[..., : max(0, most - 1)] = -1.5
        weight[23, -1] = 0.0
        weight[23, -1, width - most :] = 2.0  # one group of the last row alone has the most
        assert stored_zeros._most_kept(weight.reshape(24, 40).bfloat16(), width) == most
    assert stored_zeros._most_kept(torch.zeros(24, 42), width) == width  # columns that do not divide have no pattern
