"""Masks as bits and the passes of a selection: C++ and torch give the same bits, with any number of threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seft_dist.kernels import bits, build, fingerprint, packing, ranking
from seft_dist.sparsity import bitmask, hashes, selection
from tests.ranks import run_ranks

MASKS = st.tuples(st.integers(0, 2**32), st.integers(0, 300), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
SCORES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, 3e38, -3e38, 1e-45, -1e-45, 0.1, 7.0])


@pytest.fixture(params=["C++", "torch"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        for module in (bits, fingerprint, ranking, packing):
            monkeypatch.setattr(module, "library", lambda: None)
    else:
        assert build.library() is not None


def draw(seed: int, numel: int, share: float) -> Tensor:
    return torch.rand(numel, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.usefixtures("either")
def test_bits() -> None:
    @settings(deadline=None)
    @given(MASKS, st.integers(0, 1 << 40))
    def check(drawn: tuple[int, int, float], start: int) -> None:
        mask = draw(*drawn)
        packed = bits.pack(mask)
        assert torch.equal(packed, bitmask.pack(mask))
        assert torch.equal(bits.unpack(packed, mask.numel()), mask)
        assert bits.popcount(packed) == int(mask.sum())
        positions = mask.nonzero().view(-1)
        assert torch.equal(bits.hash_of_bits(packed, mask.numel(), start), hashes.hash_of_set(positions + start))
        assert torch.equal(bits.holds(packed, torch.arange(mask.numel())), mask)

    check()


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_fingerprint_of_weights(dtype: torch.dtype) -> None:
    """Whatever the dtype and the division, it is the sum that the docstring describes, in Python's integers."""

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    @settings(deadline=None, max_examples=30)
    @given(
        st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.5, 2.0**-14, -7.0, 0.25]), max_size=70), st.integers(0, 1 << 40)
    )
    def check(values: list[float], start: int) -> None:
        weight = torch.tensor(values, dtype=dtype)
        in_fp32 = weight.float().view(torch.int32).tolist()
        wanted = sum(mix(start + i) * (in_fp32[i] | 1 << 32) for i, value in enumerate(values) if value)
        found = fingerprint.fingerprint(weight, start)
        assert found.dtype == torch.int64 and int(found) % 2**64 == wanted % 2**64
        cut = len(values) // 3
        parts = fingerprint.fingerprint(weight[:cut], start) + fingerprint.fingerprint(weight[cut:], start + cut)
        assert torch.equal(parts, found)

    check()
    many = torch.randn(100_001, generator=torch.Generator().manual_seed(0)).to(dtype)  # on several threads
    many[::3] = 0
    assert torch.equal(fingerprint.fingerprint(many, 5), hashes.fingerprint(many, 5))
    assert torch.equal(fingerprint.fingerprint(many[::2], 5), hashes.fingerprint(many[::2].clone(), 5))
    assert torch.equal(fingerprint.hash_of_weight(many, 5), hashes.hash_of_weight(many, 5))


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_hash_of_the_bits_of_weights(dtype: torch.dtype) -> None:
    weight = torch.tensor([0.0, -0.0, 1.5, -2.0, 0.0, 3.25], dtype=dtype)
    assert torch.equal(fingerprint.hash_of_weight(weight, 9), hashes.hash_of_weight(weight, 9))
    positive = torch.tensor([0.0, 0.0, 1.5, -2.0, 0.0, 3.25], dtype=dtype)
    assert fingerprint.hash_of_weight(weight, 9) != fingerprint.hash_of_weight(positive, 9)  # -0.0 has a bit


@pytest.mark.usefixtures("either")
def test_some_bits_changed_in_a_copy() -> None:
    @settings(deadline=None)
    @given(MASKS, st.lists(st.integers(0, 299)), st.booleans())
    def check(drawn: tuple[int, int, float], offsets: list[int], value: bool) -> None:
        mask = draw(*drawn)
        packed, where = bits.pack(mask), torch.tensor([o for o in offsets if o < mask.numel()], dtype=torch.int64)
        before = packed.clone()
        changed = bits.with_bits(packed, mask.numel(), where, value)
        assert torch.equal(packed, before)
        mask[where] = value
        assert torch.equal(changed, bitmask.pack(mask))

    check()


@pytest.mark.usefixtures("either")
def test_values_outside_the_mask() -> None:
    @settings(deadline=None)
    @given(MASKS, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    def check(drawn: tuple[int, int, float], dtype: torch.dtype) -> None:
        mask = draw(*drawn)
        some = torch.tensor([0.0, -0.0, 1.0, torch.nan, -torch.inf, 1e-7, 1e-40])
        dense = some[torch.randint(7, mask.shape, generator=torch.Generator().manual_seed(drawn[0]))].to(dtype)
        assert bits.count_outside(bits.pack(mask), dense) == int((dense[~mask] != 0).sum())
        assert bits.count_outside(bits.pack(mask), dense.masked_fill(~mask, -0.0)) == 0

    check()


@pytest.mark.usefixtures("either")
def test_keys_histogram_survivors() -> None:
    @settings(deadline=None)
    @given(
        st.lists(st.tuples(SCORES | st.floats(width=32, allow_nan=False, allow_infinity=False), SCORES, st.booleans())),
        st.booleans(),
        st.sampled_from(["plain", "absolute", "product"]),
        st.booleans(),
    )
    def check(drawn: list[tuple[float, float, bool]], largest: bool, kind: str, everyone: bool) -> None:
        columns = [list(column) for column in zip(*drawn, strict=True)] or [[], [], []]
        scores, times = (torch.tensor(column, dtype=torch.float32) for column in columns[:2])
        times = times.clamp(-1, 1)  # products stay finite
        eligible = torch.tensor(columns[2], dtype=torch.bool)
        score = {"plain": scores, "absolute": scores.abs(), "product": (scores * times).abs()}[kind]
        expected = selection.keys(score, largest, None if everyone else eligible)
        key = ranking.ranking_keys(
            scores,
            largest,
            None if everyone else bitmask.pack(eligible),
            times=times if kind == "product" else None,
            absolute=kind == "absolute",
        )
        assert torch.equal(key, expected)
        counts = ranking.first_histogram(key)
        assert torch.equal(counts, selection.first_histogram(key))
        for first in {0, *counts.nonzero().view(-1).tolist(), selection.BINS - 1}:
            indices, kept = ranking.survivors(key, first)
            assert torch.equal(indices, selection.survivors(key, first)) and torch.equal(kept, key[indices])

    check()


def on_one_and_three_threads(
    rank: int, world_size: int, scores: Tensor, times: Tensor, mask: Tensor
) -> list[list[Tensor]]:
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        packed = bits.pack(mask)
        key = ranking.ranking_keys(scores, False, packed, times=times)
        counts = ranking.first_histogram(key)
        values = packing.encode(scores, packed)
        restored = packing.decode(packed, values, torch.full_like(scores, 7))
        numbers = [bits.count_outside(packed, scores), int(bits.hash_of_bits(packed, mask.numel(), 5))]
        unpacked = bits.unpack(packed, mask.numel())
        results.append([packed, unpacked, key, counts, *ranking.survivors(key, 900), values, restored])
        results[-1].append(torch.tensor(numbers))
    return results


def test_the_same_on_several_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, times = torch.randn(2, 200_003, generator=generator)
    mask = torch.rand(200_003, generator=generator) < 0.4
    # This process must not start a pool of threads, and a fork of one that has cannot use several.
    one, three = run_ranks(on_one_and_three_threads, 1, scores, times, mask, start="spawn")[0]
    assert all(torch.equal(first, second) for first, second in zip(one, three, strict=True))
    assert torch.equal(one[1], mask) and torch.equal(one[7], torch.where(mask, scores, 0))
    assert torch.equal(one[2], selection.keys((scores * times).abs(), False, mask))
    assert torch.equal(one[6], scores[mask])


def test_arguments_that_would_reach_outside_are_refused() -> None:
    assert build.library() is not None
    mask = torch.rand(20) < 0.5
    packed, scores = bitmask.pack(mask), torch.rand(20)
    wrong = [
        lambda: bits.unpack(packed, 25),
        lambda: bits.unpack(packed.int(), 20),
        lambda: bits.with_bits(packed, 20, torch.tensor([20]), True),
        lambda: bits.with_bits(packed, 20, torch.tensor([-1]), True),
        lambda: bits.with_bits(packed, 20, torch.tensor([3], dtype=torch.int32), True),
        lambda: bits.hash_of_bits(packed, 80, 0),
        lambda: bits.count_outside(packed, torch.zeros(99)),
        lambda: ranking.ranking_keys(scores, True, packed[:2]),
        lambda: ranking.ranking_keys(scores, True, times=scores[:7]),
        lambda: ranking.ranking_keys(scores.double(), True),
        lambda: ranking.first_histogram(scores),
        lambda: ranking.survivors(torch.zeros(40, dtype=torch.int32)[::2], 3),
        lambda: packing.encode(scores, packed[:2]),
        lambda: packing.decode(packed, scores.double(), torch.empty(20)),
        lambda: packing.decode(packed, torch.ones(int(mask.sum()) + 1), torch.empty(20)),
        lambda: packing.decode(packed, torch.ones(int(mask.sum()) - 1), torch.empty(20)),
    ]
    for number, call in enumerate(wrong):
        with pytest.raises(ValueError, match=r"a kernel was given|packed values for another number"):
            call()
            pytest.fail(f"number {number} was taken")
