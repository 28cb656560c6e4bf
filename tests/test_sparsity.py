"""Masks in bits, who owns what, when evolutions happen, and the scores: pure functions."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seft_dist.sparsity import scores
from seft_dist.sparsity.bitmask import pack, popcount, unpack
from seft_dist.sparsity.partition import Partition
from seft_dist.sparsity.schedule import drop_fraction, fraction_of, in_window, is_evolution
from tests.models import moving

sizes = st.integers(0, 500)
worlds = st.integers(1, 9)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.booleans(), max_size=70))
def test_bitmask_round_trip(bits: list[bool]) -> None:
    mask = torch.tensor(bits, dtype=torch.bool)
    packed = pack(mask)
    assert packed.dtype == torch.uint8 and packed.numel() == math.ceil(len(bits) / 8)
    assert torch.equal(unpack(packed, len(bits)), mask)
    assert popcount(packed) == sum(bits)
    # bit j of byte i is position 8 i + j, unused bits are 0
    number = sum(bit << position for position, bit in enumerate(bits))
    assert bytes(packed.tolist()) == number.to_bytes(packed.numel(), "little")


def test_popcount_of_many_bits() -> None:
    mask = torch.rand(1_000_003, generator=torch.Generator().manual_seed(0)) < 0.4
    assert popcount(pack(mask)) == int(mask.sum())


@settings(max_examples=100, deadline=None)
@given(sizes, worlds)
def test_even_partition_covers_once(numel: int, world_size: int) -> None:
    partition = Partition.even(numel, world_size)
    owned = [
        i for rank in range(world_size) for i in range(partition.interval(rank).start, partition.interval(rank).stop)
    ]
    assert owned == list(range(numel))
    assert partition.sizes() == [len(partition.interval(rank)) for rank in range(world_size)]
    # ZeRO-3: chunks of ceil(N / W), padding at the end only
    assert partition.chunk == math.ceil(numel / world_size)
    assert max(partition.sizes()) <= partition.chunk and partition.sizes() == sorted(partition.sizes(), reverse=True)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), worlds)
def test_row_partition_is_torch_chunk(rows: int, columns: int, world_size: int) -> None:
    partition = Partition.rows((rows, columns), world_size)
    weight = torch.arange(rows * columns).view(rows, columns)
    chunks = list(weight.chunk(world_size, dim=0))
    chunks += [weight[:0]] * (world_size - len(chunks))
    for rank, chunk in enumerate(chunks):
        interval = partition.interval(rank)
        assert weight.view(-1)[interval.start : interval.stop].equal(chunk.reshape(-1))


@pytest.mark.parametrize(("rows", "world_size"), [(3, 8), (1, 4), (8, 3), (7, 5)])
def test_ranks_may_own_nothing(rows: int, world_size: int) -> None:
    owned = Partition.rows((rows, 5), world_size).sizes()
    assert sum(owned) == rows * 5 and len(owned) == world_size


configs: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "interval": st.integers(1, 7),
        "begin": st.integers(1, 15),
        "end": st.one_of(st.none(), st.integers(1, 39)),
        "steps": st.one_of(st.none(), st.integers(41, 80)),
        "static": st.booleans(),
        "drop_fraction": st.just(0.0) | st.floats(1e-30, 1),
        "drop_schedule": st.sampled_from(["cosine", "linear", "constant"]),
    }
)


@settings(max_examples=100, deadline=None)
@given(configs, st.data())
def test_schedule(drawn: dict[str, Any], data: st.DataObject) -> None:
    config = moving(window=data.draw(st.integers(1, drawn["interval"])), **drawn)
    end = config.end
    if end is None:
        end = math.floor(0.8 * config.steps) if config.steps is not None else 10**9
    wanted = [t for t in range(1, 81) if config.begin <= t <= end and t % config.interval == 0 and not config.static]
    assert [t for t in range(1, 81) if is_evolution(config, t)] == wanted
    # the `window` steps that end with the evolution step
    seen = {t for evolution in wanted for t in range(evolution - config.window + 1, evolution + 1)}
    assert [t for t in range(1, 74) if in_window(config, t)] == sorted(t for t in seen if t < 74)
    for t in (1, 5, 40):
        f0, total = config.drop_fraction, config.steps
        expected = f0
        if total is not None and config.drop_schedule == "cosine":
            expected = f0 / 2 * (1 + math.cos(math.pi * t / total))
        elif total is not None and config.drop_schedule == "linear":
            expected = f0 * (1 - t / total)
        assert drop_fraction(config, t) == pytest.approx(expected) and 0 <= drop_fraction(config, t) <= 1
    if config.last_evolution is not None and wanted:
        assert config.last_evolution == wanted[-1]


def test_drop_fraction_ends_at_0() -> None:
    for schedule, half in (("cosine", 0.1), ("linear", 0.1)):
        config = moving(steps=100, drop_fraction=0.2, drop_schedule=schedule)
        assert drop_fraction(config, 50) == pytest.approx(half)
        assert drop_fraction(config, 100) == pytest.approx(0)


@pytest.mark.parametrize(
    ("fraction", "count", "wanted"),
    [(0.5, 5, 3), (0.5, 4, 2), (0.1, 4, 0), (0.1, 5, 1), (1.0, 7, 7), (0.0, 7, 0), (0.01, 0, 0), (0.25, 10, 3)],
)
def test_share_rounds_half_up(fraction: float, count: int, wanted: int) -> None:
    assert fraction_of(fraction, count) == wanted


def splitmix(x: int) -> int:
    """SplitMix64's next output for state x, on Python's integers."""
    mask = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


# Outputs of the published generator from seed 1234567, as any implementation gives them.
PUBLISHED = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]


def test_mix_is_splitmix64() -> None:
    gamma = 0x9E3779B97F4A7C15
    states = [(1234567 + i * gamma) % (1 << 64) for i in range(len(PUBLISHED))]
    signed = [state - (1 << 64) if state >> 63 else state for state in states]
    assert [splitmix(state) for state in states] == PUBLISHED
    assert [value % (1 << 64) for value in scores.mix(torch.tensor(signed)).tolist()] == PUBLISHED


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**63), min_size=1, max_size=4), st.integers(0, 2**31 - 100), st.integers(0, 90))
def test_uniform_depends_on_no_layout(key: list[int], first: int, cut: int) -> None:
    positions = torch.arange(first, first + 90)
    whole = scores.uniform(positions, *key)
    parts = torch.cat([scores.uniform(positions[:cut], *key), scores.uniform(positions[cut:], *key)])
    assert torch.equal(whole, parts)
    shuffled = torch.randperm(90, generator=torch.Generator().manual_seed(cut))
    assert torch.equal(whole[shuffled], scores.uniform(positions[shuffled], *key))
    assert whole.dtype == torch.float32 and (whole >= 0).all() and (whole < 1).all()
    state = 0
    for part in key:
        state = splitmix((state + part) % (1 << 64))
    wanted = [(splitmix((state + position) % (1 << 64)) >> 40) / (1 << 24) for position in positions.tolist()]
    assert whole.tolist() == wanted


def test_uniform_is_uniform_and_streams_differ() -> None:
    positions = torch.arange(100_000)
    streams = [
        scores.uniform(positions, *key)
        for key in ((0, 0, 1, 1), (0, 0, 1, 2), (0, 1, 1, 1), (1, 0, 1, 1), (0, 0, 2, 1))
    ]
    for i, stream in enumerate(streams):
        counts = torch.histc(stream, bins=100, min=0, max=1)
        assert ((counts - 1000).square() / 1000).sum() < 160  # chi square, 99 degrees of freedom: p < 1e-4
        for other in streams[:i]:
            assert abs(float(torch.corrcoef(torch.stack([stream, other]))[0, 1])) < 0.02


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 8), st.data())
def test_scores_of_an_interval_are_a_part_of_the_whole(
    experts: int, height: int, columns: int, data: st.DataObject
) -> None:
    rows = experts * height
    numel = rows * columns
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    generator = torch.Generator().manual_seed(numel)
    weight, grad = torch.randn(2, rows, columns, generator=generator)
    row, column = (torch.rand(n, generator=generator) for n in (rows, columns))
    norms = torch.rand(experts, columns, generator=generator)
    of_row = norms.repeat_interleave(height, 0)
    whole = {
        "activation": weight.abs() * of_row,
        "curvature": row.unsqueeze(1) * of_row * weight * weight / 2,
        "factored": row.sqrt().unsqueeze(1) * of_row.sqrt(),
        "momentum": torch.minimum(row.unsqueeze(1), column),
        "sensitivity": (weight * grad).abs(),
        "movement": -weight * grad,
        "gradient": grad.abs(),
        "magnitude": weight.abs(),
    }
    w, g = weight.view(-1)[start:stop], grad.reshape(-1)[start:stop]
    parts = {
        "activation": scores.activation(w, norms, start, rows),
        "curvature": scores.curvature(w, row, norms, start),
        "factored": scores.factored(row, norms, start, stop - start),
        "momentum": scores.momentum(row, column, start, stop - start),
        "sensitivity": scores.sensitivity(w, g),
        "movement": scores.drop_movement(w, g),
        "gradient": scores.grow_gradient(g),
        "magnitude": scores.drop_magnitude(w),
    }
    if experts == 1:
        parts["one expert"] = scores.curvature(w, row, norms[0], start)
        whole["one expert"] = whole["curvature"]
    for name, part in parts.items():
        assert torch.equal(part, whole[name].reshape(-1)[start:stop]), name
