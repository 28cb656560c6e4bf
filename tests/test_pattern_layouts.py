"""N:M patterns on every layout: the masks of one process, even if intervals cut groups and after resuming."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seft_dist import SeftConfig
from seft_dist.backends.group import Group
from seft_dist.io import checkpoint
from seft_dist.optim.nm_groups import NMGroups
from seft_dist.sparsity.nm_pattern import counts
from tests.layouts import LAYOUTS, build, snapshot, train_on
from tests.models import batch, moving, prune_groups_, tiny_llama
from tests.ranks import run_ranks

STEPS, GLOBAL = 18, 12
SIZES: dict[str, dict[str, Any]] = {  # hidden size, rows of the MLP: on 2, 3 and 4 ranks some flat chunk cuts a group
    "2:4": {"hidden_size": 20, "intermediate_size": 33, "num_attention_heads": 2, "num_key_value_heads": 1},
    "1:4": {"hidden_size": 20, "intermediate_size": 33, "num_attention_heads": 2, "num_key_value_heads": 1},
    "4:8": {"hidden_size": 40, "intermediate_size": 33, "num_attention_heads": 4, "num_key_value_heads": 2},
}
TARGETS = "[qkvo]_proj|gate_proj|up_proj"
"""Without down_proj, whose 33 inputs are no groups."""


def config(pattern: str, **options: Any) -> SeftConfig:
    return moving(
        **({"density": 0.1, "interval": 5, "window": 2, "steps": STEPS, "end": 15} | options),
        pattern=pattern,
        targets=TARGETS,
    )


def model(pattern: str) -> nn.Module:
    return prune_groups_(tiny_llama(**SIZES[pattern]), pattern, TARGETS)


_oracle: dict[SeftConfig, dict[str, Any]] = {}


def oracle(seft: SeftConfig) -> dict[str, Any]:
    """The single-process run, made once."""
    assert seft.pattern
    if seft not in _oracle:
        _oracle[seft] = train_on("single", 1, seft, STEPS, model=model(seft.pattern))
    return _oracle[seft]


def assert_same(state: dict[str, Any], wanted: dict[str, Any], pattern: str) -> None:
    """Same masks and supports; every group as full as at the start; as many zeros, also in bf16."""
    most, size = map(int, pattern.split(":"))
    for name, layer in wanted.items():
        assert torch.equal(state[name]["mask"], layer["mask"]), name
        assert torch.equal(state[name]["support"], layer["support"]), name
        assert torch.allclose(state[name]["weight"], layer["weight"], rtol=1e-4, atol=2e-6), name
        assert (counts(state[name]["mask"], size) == most).all(), name
        for weight in (state[name]["weight"], state[name]["weight"].bfloat16()):
            assert torch.equal(weight != 0, layer["mask"]), name


def cut_layers(layout: str, world_size: int, pattern: str) -> list[str]:
    """Targets in which an interval of this layout ends inside a group."""

    def on_rank(rank: int, world: int) -> list[str]:
        called, seft, *_ = build(layout, config(pattern), model(pattern))
        called(**batch(0, size=1))
        seft.attach()
        return [seft.target_names[i] for i in NMGroups(seft.backend, pattern).cut]

    return run_ranks(on_rank, world_size)[0]


def cases() -> list[Any]:
    """All backends at 2:4, both others where intervals are flat; a few in the quick tier, half in the long one."""
    quick = [("ddp", 3, "2:4"), ("fsdp", 2, "2:4")]
    every = [(layout, world, "2:4") for layout in LAYOUTS if layout != "single" for world in (2, 3)]
    every += [(layout, world, pattern) for layout in ("ddp", "zero3") for world in (2, 3) for pattern in ("1:4", "4:8")]
    marks = {case: [pytest.mark.slow, pytest.mark.long][i % 2] for i, case in enumerate(every)}
    return [pytest.param(*case, marks=[] if case in quick else [marks[case]]) for case in every]


@pytest.mark.parametrize(("layout", "world_size", "pattern"), cases())
def test_every_layout_follows_one_process(layout: str, world_size: int, pattern: str) -> None:
    seft = config(pattern)
    alone, run = oracle(seft), train_on(layout, world_size, seft, STEPS, model=model(pattern))
    assert len(run["digests"]) == 4 and run["digests"] == alone["digests"]
    assert_same(run["state"], alone["state"], pattern)
    start = {name: dict(model(pattern).named_parameters())[f"{name}.weight"] for name in run["state"]}
    assert any(not torch.equal(start[name].view(-1) != 0, layer["mask"]) for name, layer in run["state"].items())


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_these_layouts_do_cut_groups(world_size: int) -> None:
    for pattern in SIZES:
        assert cut_layers("ddp", world_size, pattern), pattern
    assert not cut_layers("fsdp", world_size, "2:4"), "whole rows hold whole groups"


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_zero3_cuts_the_same_groups(world_size: int) -> None:
    assert cut_layers("zero3", world_size, "2:4") == cut_layers("ddp", world_size, "2:4")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"reactivation": 0.3},
        {"adapt": "activation", "moments": "seeded"},
        pytest.param({"grow": "random", "init": "random", "adapt": "magnitude"}, marks=pytest.mark.long),
        pytest.param({"density": 0.4, "selection": "gather"}, marks=pytest.mark.long),
        pytest.param({"density": 0.4, "selection": "radix"}, marks=pytest.mark.long),
        {"reactivate": "trial", "adapt": "magnitude"},
    ],
)
def test_every_option_follows_one_process(options: dict[str, Any]) -> None:
    seft = config("2:4", **options)
    run = train_on("zero3", 3, seft, STEPS, model=model("2:4"))
    assert run["digests"] == oracle(seft)["digests"]
    assert_same(run["state"], oracle(seft)["state"], "2:4")


def test_hsdp_follows_one_process() -> None:
    seft = config("2:4")
    run = train_on("hsdp", 4, seft, STEPS, model=model("2:4"))
    assert run["digests"] == oracle(seft)["digests"]
    assert_same(run["state"], oracle(seft)["state"], "2:4")


def part(layout: str, world_size: int, first: int, last: int, folder: Path) -> dict[str, Any]:
    """Steps first .. last - 1, from and to checkpoints."""

    def on_rank(rank: int, world: int) -> dict[str, Any]:
        whole = model("2:4")
        called, seft, backward, step = build(layout, config("2:4"), whole)
        if first:
            newest = checkpoint.latest(folder)
            assert newest is not None
            checkpoint.load(seft, newest)
        size = GLOBAL // world
        for t in range(first, last):
            own = {key: value[rank * size : (rank + 1) * size] for key, value in batch(t, size=GLOBAL).items()}
            backward(called(**own).loss)
            step()
        checkpoint.save(seft, folder, {})
        return snapshot(whole, seft)

    return run_ranks(on_rank, world_size, timeout=120)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"), [(("zero3", 3), ("fsdp", 2)), (("ddp", 4), ("zero3", 3)), (("single", 1), ("ddp", 3))]
)
def test_resume_on_another_layout(first: tuple[str, int], then: tuple[str, int], tmp_path: Path) -> None:
    """After step 9 a window has begun, two evolutions were, two follow."""
    part(*first, 0, 9, tmp_path)
    assert_same(part(*then, 9, STEPS, tmp_path), oracle(config("2:4"))["state"], "2:4")


def test_another_pattern_is_not_resumed(tmp_path: Path) -> None:
    part("single", 1, 0, 2, tmp_path)
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    _, seft, *_ = build("single", config("3:4"), model("2:4"))
    with pytest.raises(ValueError, match="pattern='2:4' there, '3:4' here"):
        checkpoint.load(seft, newest)


def test_bytes_of_cut_groups_do_not_grow_with_the_weights() -> None:
    def on_rank(rank: int, world: int, rows: int) -> int:
        weight = nn.Linear(4, rows, bias=False)
        seft = build("ddp", moving(pattern="2:4"), prune_groups_(nn.Sequential(weight), "2:4"))[1]
        seft.attach()
        group = seft.backend.owners
        assert isinstance(group, Group)
        before = group.bytes_sent
        marks: Tensor = torch.ones(len(seft.backend.interval(0)), dtype=torch.bool)
        NMGroups(seft.backend, "2:4").exchange(lambda _: marks.int())
        return group.bytes_sent - before

    few, many = (run_ranks(on_rank, 3, rows) for rows in (101, 10001))
    assert few == many and 0 < max(many) <= 2 * (2 * 3 * 4 + 8)
