"""Distributed top-k: both forms, on any division of the candidates, equal one stable sort on one process."""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seft_dist.backends.group import Group
from seft_dist.config import Selection
from seft_dist.kernels.ranking import top_k
from seft_dist.optim.collectives import select
from seft_dist.sparsity.selection import INELIGIBLE, keys
from tests.ranks import run_ranks

# Values where an order on bits could go wrong: both zeros, the smallest and largest numbers, neighbours, signs.
SPECIAL = [0.0, -0.0, 1.0, -1.0, 1.0 + 2**-23, 1e-45, -1e-45, 1.1754943508222875e-38, 3.4028234663852886e38, -3.4e38]
FORMS: tuple[Selection, ...] = ("gather", "radix", "auto")
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
few_values = st.sampled_from(SPECIAL)


@dataclass(frozen=True)
class Case:
    """Candidates of some layers, who owns them, and what is wanted of them."""

    scores: list[list[float]]
    eligible: list[list[bool]]
    cuts: list[list[int]]
    """Positions at which each layer is divided between ranks, increasing, and not only evenly."""
    largest: bool
    problems: list[int]
    wanted: list[int]

    def keys(self, layer: int, first: int, stop: int) -> Tensor:
        scores = torch.tensor(self.scores[layer][first:stop], dtype=torch.float32)
        return keys(scores, self.largest, torch.tensor(self.eligible[layer][first:stop], dtype=torch.bool))

    def expected(self) -> list[list[int]]:
        """Python's stable sort of all candidates of a problem, in order of layer and position."""
        chosen: list[list[int]] = [[] for _ in self.scores]
        for problem, count in enumerate(self.wanted):
            candidates = [
                (score, layer, position)
                for layer, scores in enumerate(self.scores)
                for position, score in enumerate(scores)
                if self.problems[layer] == problem and self.eligible[layer][position]
            ]
            for _, layer, position in sorted(candidates, key=lambda c: -c[0] if self.largest else c[0])[:count]:
                chosen[layer].append(position)
        return [sorted(positions) for positions in chosen]


@st.composite
def cases(draw: st.DrawFn, world_size: int) -> Case:
    values = draw(st.sampled_from([finite, few_values, st.sampled_from([0.5, 0.25]), st.just(0.0)]))
    scores = draw(st.lists(st.lists(values, max_size=20), min_size=1, max_size=4))
    share = draw(st.sampled_from([st.booleans(), st.just(True), st.just(False)]))
    eligible = [draw(st.lists(share, min_size=len(layer), max_size=len(layer))) for layer in scores]
    cuts = []
    for layer in scores:
        inner = st.lists(st.integers(0, len(layer)), min_size=world_size - 1, max_size=world_size - 1)
        cuts.append([0, *sorted(draw(inner)), len(layer)])
    count = draw(st.sampled_from([1, 2, len(scores)]))
    problems = list(range(len(scores))) if count == len(scores) else [i % count for i in range(len(scores))]
    number = max(problems) + 1
    most = sum(map(len, scores)) + 3  # also more than compete
    wanted = draw(st.lists(st.integers(0, most), min_size=number, max_size=number))
    return Case(scores, eligible, cuts, draw(st.booleans()), problems, wanted)


def select_here(group: Group, case: Case, form: Selection) -> list[list[int]]:
    """The positions this rank selects, in the whole layer."""
    bounds = [(cuts[group.rank], cuts[group.rank + 1]) for cuts in case.cuts]
    chosen = select(group, lambda layer: case.keys(layer, *bounds[layer]), case.problems, case.wanted, form)
    return [(indices + first).tolist() for indices, (first, _) in zip(chosen, bounds, strict=True)]


def check_on_ranks(drawn: list[Case], world_size: int) -> None:
    def on_rank(rank: int, _: int) -> list[dict[str, list[list[int]]]]:
        group = Group(dist.group.WORLD)
        return [{form: select_here(group, case, form) for form in FORMS} for case in drawn]

    ranks = run_ranks(on_rank, world_size)
    for number, case in enumerate(drawn):
        for form in FORMS:
            parts = [rank[number][form] for rank in ranks]
            found = [[at for part in parts for at in part[layer]] for layer in range(len(case.scores))]
            assert found == case.expected(), f"{form} on {world_size} ranks"


@settings(max_examples=100, deadline=None)
@given(cases(1))
def test_one_process_equals_stable_sort(case: Case) -> None:
    for form in FORMS:
        assert select_here(Group(None), case, form) == case.expected()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_equal_stable_sort(world_size: int) -> None:
    @settings(max_examples=4, deadline=None)
    @given(st.lists(cases(world_size), min_size=10, max_size=10))
    def check(drawn: list[Case]) -> None:
        check_on_ranks(drawn, world_size)

    check()


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_with_many_candidates(world_size: int) -> None:
    generator = torch.Generator().manual_seed(world_size)

    def layer(kind: str, n: int) -> list[float]:
        x = torch.randn(n, generator=generator)
        if kind == "bf16":  # as gradients of a bf16 model: many ties
            x = x.bfloat16().float()
        elif kind == "tiny":
            x = x * 1e-42
        elif kind == "skewed":
            x = x.exp().pow(8)
        return x.abs().tolist() if kind != "signed" else x.tolist()

    drawn = []
    for largest in (True, False):
        sizes = (3001, 4096, 700, 2000)
        scores = [layer(kind, n) for kind, n in zip(("bf16", "tiny", "skewed", "signed"), sizes, strict=True)]
        eligible = [(torch.rand(n, generator=generator) < 0.9).tolist() for n in sizes]
        cuts = [[min(n, -(-n // world_size) * rank) for rank in range(world_size + 1)] for n in sizes]
        drawn.append(Case(scores, eligible, cuts, largest, [0, 1, 2, 3], [150, 4000, 1, 1000]))
        drawn.append(Case(scores, eligible, cuts, largest, [0, 0, 0, 0], [4321]))
    check_on_ranks(drawn, world_size)


@pytest.mark.parametrize("count", [10, 3000, 10000, 60000])
def test_auto_moves_the_fewest_bytes(count: int) -> None:
    size = 40000

    def on_rank(rank: int, world_size: int) -> dict[str, int]:
        key = keys(torch.randn(size, generator=torch.Generator().manual_seed(rank)), largest=True)
        sent: dict[str, int] = {}
        for form in FORMS:
            group = Group(dist.group.WORLD)
            select(group, lambda _: key, [0], [count], form)
            sent[form] = group.bytes_sent
        return sent

    for sent in run_ranks(on_rank, 4):
        assert sent["auto"] <= 1.1 * min(sent["gather"], sent["radix"]), sent


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(finite, few_values), min_size=1, max_size=30), st.booleans())
def test_keys_are_ordered_as_the_scores(scores: list[float], largest: bool) -> None:
    rounded = torch.tensor(scores, dtype=torch.float32)
    key, scores = keys(rounded, largest).tolist(), rounded.tolist()
    for a, key_a in zip(scores, key, strict=True):
        assert key_a != INELIGIBLE
        for b, key_b in zip(scores, key, strict=True):
            assert (a == b) == (key_a == key_b)
            assert (a > b if largest else a < b) == (key_a > key_b)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(few_values, st.booleans()), max_size=30), st.integers(0, 33))
def test_top_k(candidates: list[tuple[float, bool]], k: int) -> None:
    scores = torch.tensor([score for score, _ in candidates], dtype=torch.float32)
    eligible = torch.tensor([is_eligible for _, is_eligible in candidates], dtype=torch.bool)
    found = top_k(keys(scores, True, eligible), k)
    competing = [i for i, (_, is_eligible) in enumerate(candidates) if is_eligible]
    assert found.dtype == torch.int64
    assert found.tolist() == sorted(sorted(competing, key=lambda i: -candidates[i][0])[:k])
