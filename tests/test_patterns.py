"""N:M patterns: ranking inside groups, groups that ranks cut, what is refused, and that no evolution breaks one."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from seft_dist import SeftConfig, SeftOptimizer
from seft_dist.backends.group import Group
from seft_dist.config import TrainConfig
from seft_dist.config.pattern import pattern_sizes
from seft_dist.optim.nm_groups import GroupRanking, NMGroups
from seft_dist.session.cli import parse
from seft_dist.sparsity import nm_pattern
from seft_dist.sparsity.bitmask import pack, unpack
from seft_dist.sparsity.partition import Interval, Partition
from seft_dist.sparsity.selection import INELIGIBLE, keys
from tests.models import moving
from tests.ranks import run_ranks
from tests.reference import DenseSeft

STEPS = 9
BASE = moving(density=0.1, interval=2, steps=STEPS, drop_fraction=0.5, pattern="2:4")
ADAM: dict[str, Any] = {"lr": 0.25, "eps": 1e-2}


class Sums(nn.Module):
    """Linears whose weight gradients are given: whole numbers, so sums and means over ranks are exact on any layout.

    Few different numbers, so scores tie everywhere.
    """

    def __init__(self, shapes: list[tuple[int, int]], pattern: str, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        most, size = pattern_sizes(pattern)
        self.linears = [nn.Linear(inputs, out, bias=False, dtype=dtype) for out, inputs in shapes]
        self.registered = nn.ModuleList(self.linears)
        with torch.no_grad():
            for linear in self.linears:
                order = torch.rand(linear.weight.numel() // size, size, generator=self.generator).argsort(1)
                # every second group is full, the others have any number of active positions, also none
                allowed = torch.randint(0, most + 1, (len(order), 1), generator=self.generator)
                allowed[::2] = most
                values = self._draw(linear.weight.shape, 1, 4) * (order < allowed).view_as(linear.weight)
                linear.weight.copy_(values)

    def _draw(self, shape: tuple[int, ...], low: int, high: int) -> Tensor:
        sign = torch.randint(0, 2, shape, generator=self.generator) * 2 - 1
        return (torch.randint(low, high, shape, generator=self.generator) * sign).float()

    def forward(self) -> Tensor:
        total = torch.zeros(())
        for linear in self.linears:
            gradient = self._draw((linear.out_features, linear.in_features), 0, 4)
            out = linear(torch.eye(linear.in_features, dtype=linear.weight.dtype))
            total = total + (out.float() * gradient.T).sum()
        return total


def step(model: nn.Module, optimizer: SeftOptimizer | DenseSeft) -> None:
    model().backward()
    optimizer.step()


def masks_of(seft: SeftOptimizer) -> list[list[Tensor]]:
    """This rank's parts: mask, positions of the deltas, weight, of each target."""
    return [
        [unpack(layer.mask, len(layer.interval)), layer.columns.indices.clone(), seft.backend.own(i).float().clone()]
        for i, layer in enumerate(seft.deltas())
    ]


def joined(parts: list[list[list[Tensor]]]) -> list[list[Tensor]]:
    """Whole masks, supports and weights from all ranks' parts."""
    return [[torch.cat([part[i][kind] for part in parts]) for kind in range(3)] for i in range(len(parts[0]))]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and a method."""

    shapes: list[tuple[int, int]]
    config: SeftConfig
    seed: int

    def model(self, dtype: torch.dtype = torch.float32) -> Sums:
        assert self.config.pattern
        return Sums(self.shapes, self.config.pattern, self.seed, dtype)

    @property
    def size(self) -> int:
        assert self.config.pattern
        return pattern_sizes(self.config.pattern)[1]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    pattern = draw(st.sampled_from(["2:4", "4:8", "1:4", "1:2", "2:3", "3:7"]))
    most, size = pattern_sizes(pattern)
    shape = st.tuples(st.integers(1, 7), st.integers(1, 4).map(lambda n: n * size))
    choices: dict[str, list[Any]] = {
        "reactivation": [0.0, 0.3, 1.0],
        "adapt": ["sensitivity", "magnitude"],
        "grow": ["gradient", "random", "momentum"],
        "drop": ["magnitude", "random"],
        "on_drop": ["commit_reactivated", "keep"],
        "init": ["gradient", "random"],
        "moments": ["zero", "seeded"],
        "density": [0.02, 0.1, 0.4 * most / size],
        "selection": ["auto", "gather", "radix"],
    }
    options = {key: draw(st.sampled_from(values)) for key, values in choices.items()}
    shapes = [(40, size), *draw(st.lists(shape, min_size=1, max_size=3))]  # the first has room for one delta at least
    config = dataclasses.replace(BASE, pattern=pattern, window=draw(st.integers(1, 2)), **options)
    return Case(shapes, config, draw(st.integers(0, 1 << 30)))


def assert_kept(case: Case, first: list[list[Tensor]], before: list[list[Tensor]], after: list[list[Tensor]]) -> int:
    """No group broken, nothing lost; the number of positions that moved."""
    moved = 0
    for (mask0, _, _), (mask1, _, _), (mask, support, weight) in zip(first, before, after, strict=True):
        assert torch.equal(nm_pattern.counts(mask, case.size), nm_pattern.counts(mask0, case.size)), (
            "a group lost its number"
        )
        assert mask[support.long()].all()
        assert not weight[~mask].any()
        moved += int((mask & ~mask1).sum())
    return moved


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cases(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_no_step_breaks_a_group(case: Case, dtype: torch.dtype) -> None:
    model = case.model(dtype)
    seft = SeftOptimizer(model, case.config, **ADAM)
    seft.attach()
    first = before = masks_of(seft)
    for _ in range(STEPS):
        step(model, seft)
        after = masks_of(seft)
        moved = assert_kept(case, first, before, after)
        assert seft.evolution is not None or moved == 0, "the mask moved off schedule"
        if case.config.reactivation == 0:
            assert moved == 0
        before = after


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cases())
def test_first_support_is_that_of_the_description(case: Case) -> None:
    """Scores are exact here and tie everywhere: the dense reference must come to the same positions."""
    case = dataclasses.replace(case, config=dataclasses.replace(case.config, init="gradient"))
    model, twin = case.model(), case.model()
    seft, dense = SeftOptimizer(model, case.config, **ADAM), DenseSeft(twin, case.config, **ADAM)
    step(model, seft)
    step(twin, dense)
    for (mask, support, weight), layer in zip(masks_of(seft), dense.layers.values(), strict=True):
        assert torch.equal(mask, layer.mask.flatten())
        assert torch.equal(support.long(), layer.support.flatten().nonzero().view(-1))
        torch.testing.assert_close(weight, layer.module.weight.detach().flatten(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "world_size", [pytest.param(2, marks=pytest.mark.long), 3, pytest.param(4, marks=pytest.mark.long)]
)
def test_ranks_choose_what_one_process_chooses(world_size: int) -> None:
    """Bit for bit, through all evolutions: intervals cut groups, some are shorter than a group or empty."""

    def on_rank(rank: int, world: int, drawn: list[Case]) -> list[list[list[list[Tensor]]]]:
        return [train(case) for case in drawn]

    def train(case: Case) -> list[list[list[Tensor]]]:
        model = case.model()
        seft = SeftOptimizer(model, case.config, **ADAM)
        seft.attach()
        seen = []
        for _ in range(STEPS):
            step(model, seft)
            if seft.evolution:
                seen.append(masks_of(seft))
        return seen

    moved = 0

    @settings(max_examples=2, deadline=None, derandomize=True, database=None)
    @given(st.lists(cases(), min_size=8, max_size=8))
    def check(drawn: list[Case]) -> None:
        nonlocal moved
        ranks = run_ranks(on_rank, world_size, drawn)
        for number, case in enumerate(drawn):
            expected = train(case)
            for at, alone in enumerate(expected):
                together = joined([rank[number][at] for rank in ranks])
                for layer, other in zip(alone, together, strict=True):
                    assert all(torch.equal(a, b) for a, b in zip(layer, other, strict=True)), (case, at)
                moved += assert_kept(case, expected[0], expected[max(at - 1, 0)], together)

    check()
    assert moved > 0


def fake_backend(partitions: list[Partition], group: Group) -> Any:
    """Make a stand-in with what NMGroups asks of a backend, for any division."""

    class Fake:
        owners = group
        names = [f"layer {i}" for i in range(len(partitions))]
        shapes = [(1, partition.numel) for partition in partitions]

        def __init__(self) -> None:
            self.partitions = partitions

        def interval(self, i: int) -> Interval:
            return self.partitions[i].interval(group.rank)

    return Fake()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("pattern", ["1:2", "2:4", "2:5", "4:8"])
def test_cut_groups_are_completed(pattern: str, world_size: int) -> None:
    size = pattern_sizes(pattern)[1]
    numels = [size * count for count in (1, 2, 3, 5, 7, 16, 33)]

    def on_rank(rank: int, world: int) -> int:
        group = Group(dist.group.WORLD)
        partitions = [Partition.even(numel, world) for numel in numels]
        partitions += [Partition(24 * size, chunk, world) for chunk in (24 * size, 24 * size - 1) if world > 1]
        backend = fake_backend(partitions, group)
        values = [torch.arange(partition.numel, dtype=torch.int32) * 3 + i for i, partition in enumerate(partitions)]
        mine = [values[i][backend.interval(i).start : backend.interval(i).stop] for i in range(len(values))]
        whole_groups = NMGroups(backend, pattern)
        edges = whole_groups.exchange(lambda i: mine[i])
        for i, own in enumerate(mine):
            touched = nm_pattern.extent(backend.interval(i), size)
            whole = whole_groups.whole(i, own, edges)
            assert torch.equal(whole, values[i][touched.start : touched.stop]), (i, rank)
            assert torch.equal(whole_groups.own(i, whole), own)
        assert group.bytes_sent <= (world - 1) * (2 * (size - 1) * 4 * len(whole_groups.cut) + 8)
        return len(whole_groups.cut)

    found = run_ranks(on_rank, world_size)
    assert len(set(found)) == 1 and (found[0] > 0) == (world_size > 1)


scores_with_ties = st.lists(st.sampled_from([0.0, -0.0, 1.0, 1.0 + 2**-23, 2.0, 3.0]), min_size=24, max_size=24)


@settings(max_examples=60, deadline=None)
@given(scores_with_ties, st.lists(st.booleans(), min_size=24, max_size=24), st.sampled_from([2, 3, 4, 8]), st.data())
def test_best_of_groups(scores: list[float], eligible: list[bool], size: int, data: st.DataObject) -> None:
    count = 24 // size
    limits = data.draw(st.lists(st.integers(0, size), min_size=count, max_size=count))
    largest = data.draw(st.booleans())
    key = keys(torch.tensor(scores), largest, torch.tensor(eligible))
    found = nm_pattern.best(key, torch.tensor(limits), size)
    wanted = []
    for group, limit in enumerate(limits):
        inside = [p for p in range(group * size, (group + 1) * size) if eligible[p]]
        wanted += sorted(inside, key=lambda p: -scores[p] if largest else scores[p])[:limit]
    assert found.nonzero().view(-1).tolist() == sorted(wanted)


def test_near_ties_are_counted() -> None:
    near, far = 1.0 + 2**-20, 1.5
    scores = torch.tensor([near, 1.0, 0.0, 0.5, far, 1.0, 0.0, 0.5, near, 1.0, near, 0.5])
    key = keys(scores, largest=True)
    limits = torch.tensor([1, 1, 2])
    backend = fake_backend([Partition.even(12, 1)], Group(None))
    ranking = GroupRanking(NMGroups(backend, "2:4"), lambda _: key.clone(), lambda _: limits)
    chosen = (ranking(0) != INELIGIBLE).nonzero().view(-1)
    assert chosen.tolist() == [0, 4, 8, 10]
    error = torch.full((12,), 2.0**-20)
    # 0 and 1; 8, 10 (its equal) and 9; none of the middle group
    assert ranking.near_ties([chosen], lambda _: error) == [5]
    assert ranking.near_ties([torch.tensor([4, 8])], lambda _: error) == [3]  # nothing of the first group was taken
    assert ranking.near_ties([chosen], lambda _: error / 4) == [0]
    # one that is far from the border, but uncertain, may cross it
    assert ranking.near_ties([chosen], lambda _: (error / 4).index_fill(0, torch.tensor([7]), 0.8)) == [1]
    key[1] = INELIGIBLE
    assert ranking.near_ties([chosen], lambda _: error) == [3]


def linear(weight: Tensor) -> nn.Module:
    only = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    only.weight = nn.Parameter(weight)
    return nn.Sequential(only)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_model_without_the_pattern_is_refused(world_size: int) -> None:
    def on_rank(rank: int, world: int) -> str:
        weight = torch.tensor([1.0, 0, 2, 0]).repeat(5, 3)
        weight[3, 4:8] = torch.tensor([1.0, 0, 1, 1])
        with pytest.raises(ValueError) as error:
            SeftOptimizer(linear(weight), BASE).attach()
        return str(error.value)

    for message in run_ranks(on_rank, world_size):
        assert message.startswith("0: row 3, inputs 4 to 7 hold 3 non-zero weights, pattern 2:4 allows 2")


def test_rows_that_are_no_multiple_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0: 6 inputs are no multiple of 4.*targets"):
        SeftOptimizer(linear(torch.eye(6)), BASE).attach()


def test_transposed_weights_are_refused() -> None:
    """A group of inputs would run down the columns of what is stored."""
    from transformers.pytorch_utils import Conv1D

    with pytest.raises(ValueError, match=r"pattern=2:4 is not supported for a Conv1D .0.: .*targets"):
        SeftOptimizer(nn.Sequential(Conv1D(8, 8)), dataclasses.replace(BASE, allow_dense=True)).attach()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scope": "global"}, "scope=global with pattern=2:4"),
        ({"adapt": "none"}, "adapt=none with pattern=2:4"),
        *[
            ({"pattern": text}, "N:M")
            for text in ("", "2", "2:", "4:2", "4:4", "0:4", "a:b", "2:4:8", "-2:4", "2:65", "²:4")
        ],
    ],
)
def test_what_cannot_keep_a_pattern_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(BASE, **options)


def test_a_fixed_mask_keeps_any_pattern() -> None:
    dataclasses.replace(BASE, adapt="none", reactivation=0.0)


def test_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    needed = ["--model.path", "m", "--data.path", "d", "--output", "o"]
    assert parse(TrainConfig, [*needed, "--seft.pattern", "2:4"], description="").seft.pattern == "2:4"
    file = tmp_path / "run.yaml"
    file.write_text('seft:\n  pattern: "2:4"\n')
    assert parse(TrainConfig, [*needed, "--config", str(file)], description="").seft.pattern == "2:4"
    file.write_text("seft:\n  pattern: 2:4\n")  # YAML 1.1 reads a number in base 60
    with pytest.raises(SystemExit):
        parse(TrainConfig, [*needed, "--config", str(file)], description="")
    assert "seft.pattern" in capsys.readouterr().err


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    ("off", "on", "message"),
    [
        (0, 5, "row 0, inputs 4 to 7 hold 3 active positions, needs at most 2"),
        (0, 9, "another number of active positions"),
    ],
)
def test_a_broken_pattern_stops_the_run(off: int, on: int, message: str, world_size: int) -> None:
    """The mask's size is right, so that only the groups tell. Position 9 joins a group with 1 active position."""

    def on_rank(rank: int, world: int) -> str:
        weight = torch.tensor([1.0, 0, 2, 0, 3, 0, 4, 0, 5, 0, 0, 0]).repeat(3, 1)
        seft = SeftOptimizer(linear(weight), dataclasses.replace(BASE, init="random"))
        seft.attach()
        state, interval = seft.sparse_state, seft.backend.interval(0)
        state.verify(seft.backend, seft.config)
        mask = unpack(state.masks[0], len(interval))
        for position, value in ((off, False), (on, True)):
            if interval.start <= position < interval.stop:
                mask[position - interval.start] = value
        state.masks[0] = pack(mask)
        with pytest.raises(RuntimeError) as error:
            state.verify(seft.backend, seft.config)
        return str(error.value)

    for text in run_ranks(on_rank, world_size):
        assert text.startswith("0: ") and message in text
