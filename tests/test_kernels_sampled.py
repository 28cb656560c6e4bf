"""Sampled gradients: every form against a dense product in fp64, on any shape, type and number of threads."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seft_dist.kernels import choice, sampled
from seft_dist.kernels.build import library
from seft_dist.kernels.choice import Form, choose
from seft_dist.kernels.sampled import FORMS, sampled_grad_
from seft_dist.optim.delta import Support
from tests.ranks import run_ranks
from tests.waits import Waits

CPU = torch.device("cpu")
ON_CPU: list[Form] = ["c++", "sampled_addmm", "dense"]
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SIZES = st.integers(1, 70)


def draw(seed: int, tokens: int, rows: int, cols: int, share: float) -> tuple[Tensor, Tensor, Support]:
    """Input, output gradient, positions; the latter in two parts, as of two owners."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(tokens, size, generator=generator) for size in (cols, rows))
    positions = (torch.rand(rows * cols, generator=generator) < share).nonzero().view(-1).int()
    return x, grad, Support((rows, cols), [positions[:3], positions[3:]])


def reference(support: Support, x: Tensor, grad: Tensor) -> Tensor:
    return (grad.double().T @ x.double()).reshape(-1)[support.positions()]


@pytest.mark.parametrize("form", ON_CPU)
@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    tokens=st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 130]),
    rows=SIZES,
    cols=SIZES,
    share=st.sampled_from([0.01, 0.1, 0.5, 1.0]),
    dtype=DTYPES,
    strided=st.booleans(),
    accumulate=st.booleans(),
)
def test_every_form_is_the_dense_product_at_the_positions(
    form: Form,
    seed: int,
    tokens: int,
    rows: int,
    cols: int,
    share: float,
    dtype: torch.dtype,
    strided: bool,
    accumulate: bool,
) -> None:
    x, grad, support = draw(seed, tokens, rows, cols, share)
    x, grad = x.to(dtype), grad.to(dtype)
    if strided:
        x, grad = x.T.contiguous().T, torch.cat([grad, grad], 1)[:, :rows]
    if not len(support):
        return
    before = torch.arange(len(support), dtype=torch.float32)
    out = before.clone() if accumulate else torch.full_like(before, torch.nan)
    FORMS[form](out, support.shape, support.crow, support.col, x, grad, accumulate)
    # Products of bf16 and fp16 numbers are exact in fp32: what remains is the rounding of the sums.
    torch.testing.assert_close(
        out.double(), accumulate * before + reference(support, x, grad), rtol=1e-5, atol=1e-5 * tokens**0.5
    )
    if form != "sampled_addmm":
        wide = before.clone()
        FORMS[form](wide, support.shape, support.crow.long(), support.col, x, grad, accumulate)
        assert torch.equal(wide, out)


def test_nothing_to_do_changes_nothing() -> None:
    x, grad, support = draw(0, 5, 3, 4, 0.0)
    out = torch.zeros(0)
    sampled_grad_(out, support.shape, support.crow, support.col, x, grad)
    x, grad, support = draw(0, 5, 3, 4, 1.0)
    out = torch.ones(12)
    sampled_grad_(out, support.shape, support.crow, support.col, x[:0], grad[:0])
    assert torch.equal(out, torch.ones(12))
    sampled_grad_(out, support.shape, support.crow, support.col, x[:0], grad[:0], accumulate=False)
    assert torch.equal(out, torch.zeros(12))


def test_empty_rows_and_full_ones() -> None:
    x, grad, _ = draw(1, 40, 50, 33, 0.0)
    rows = torch.tensor([3, 3, 20, 49])
    positions = torch.cat([rows[:1] * 33 + torch.arange(33), rows[2:] * 33 + 32]).int()
    support = Support((50, 33), [positions])
    for form in ON_CPU:
        out = torch.zeros(len(support))
        FORMS[form](out, support.shape, support.crow, support.col, x, grad, True)
        torch.testing.assert_close(out.double(), reference(support, x, grad), rtol=1e-5, atol=1e-4)


def test_blocks_of_experts() -> None:
    x, grad, support = draw(2, 30, 12, 17, 0.3)
    for number, block in enumerate(support.blocks(3)):
        out, part = torch.zeros(len(block)), grad[:, number * 4 : number * 4 + 4]
        sampled_grad_(out, block.shape, block.crow, block.col, x[5:], part[5:])
        torch.testing.assert_close(out.double(), reference(block, x[5:], part[5:]), rtol=1e-5, atol=1e-4)


def on_several_threads(rank: int, world_size: int) -> list[Tensor]:
    x, grad, support = draw(3, 200, 60, 45, 0.2)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(torch.zeros(len(support)))
            FORMS["c++"](results[-1], support.shape, support.crow, support.col, x.to(dtype), grad.to(dtype), True)
    return results


def test_cpp_gives_the_same_bits_on_any_number_of_threads() -> None:
    x, grad, support = draw(3, 200, 60, 45, 0.2)
    # This process must not start a pool of threads, and a fork of one that has cannot use several.
    (results,) = run_ranks(on_several_threads, 1, start="spawn")
    for start in (0, 4):
        assert all(torch.equal(results[start], other) for other in results[start + 1 : start + 4])
    torch.testing.assert_close(results[0].double(), reference(support, x, grad), rtol=1e-5, atol=1e-4)


def test_infinities_and_nan_stay_what_they_are() -> None:
    x, grad, support = draw(4, 20, 8, 9, 1.0)
    x[3, 2], grad[7, 5] = torch.inf, torch.nan
    out = torch.zeros(len(support))
    sampled_grad_(out, support.shape, support.crow, support.col, x, grad)
    assert torch.equal(out.isfinite(), reference(support, x, grad).isfinite())


def test_choice_by_density(monkeypatch: pytest.MonkeyPatch) -> None:
    assert library() is not None
    assert choose((1000, 1000), 10_000, CPU) == "c++"
    assert choose((1000, 1000), 500_000, CPU) == "dense"
    monkeypatch.setattr(choice, "library", lambda: None)
    most = 2**31 - 1
    assert [choose((1 << 20, 1 << 20), entries, CPU) for entries in (most, most + 1)] == ["sampled_addmm", "dense"]


CUDA = torch.device("cuda")
LAYER = (4096, 4096)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Writes the table of measured times of a card without name."""

    def forget() -> None:
        choice.measured_times.cache_clear()
        choice._choose_on_cuda.cache_clear()

    def write(text: str) -> None:
        (tmp_path / "times.json").write_text(text)
        forget()

    monkeypatch.setattr(choice, "TABLE", tmp_path / "times.json")
    monkeypatch.setattr(choice, "triton_kernels", lambda device: choice)  # also where Triton is not installed
    monkeypatch.setattr(choice, "card_name", lambda device: "a card")
    forget()
    yield write
    forget()


def test_without_a_table_operations_and_bytes_are_counted(table: Callable[[str], None]) -> None:
    numel = LAYER[0] * LAYER[1]
    assert choose(LAYER, numel // 1000, CUDA) == "triton"
    assert choose(LAYER, numel // 20, CUDA) == "dense"
    assert choose(LAYER, numel // 50, CUDA, dtype=torch.float32) == "triton"  # no tensor cores: it pays longer
    assert choose(LAYER, numel // 50, CUDA) == "dense"
    times = choice.estimate(LAYER, numel // 100, 2048, 2)
    assert times["triton"] == pytest.approx(2 * 2048 * ((numel // 100 + 4096) / 5e12 + 2 * 8192 / 3e12))
    assert times["dense"] == pytest.approx(2 * 2048 * numel / 500e12 + 8 * numel / 3e12)


def test_the_nearest_measured_times_choose(table: Callable[[str], None]) -> None:
    def row(tokens: int, density: float, dtype: str = "bfloat16", **seconds: float) -> dict[str, object]:
        return {"dtype": dtype, "tokens": tokens, "rows": 4096, "columns": 4096, "density": density, "seconds": seconds}

    rows = [
        row(2048, 0.01, dense=1.0, triton=2.0),
        row(2048, 0.001, dense=2.0, triton=1.0),
        row(8192, 0.01, dense=3.0, triton=1.0),
        row(2048, 0.01, "float32", dense=3.0, triton=2.0, sampled_addmm=1.0),
    ]
    table(json.dumps({"a card": {"launch": [32, 64, 8], "rows": rows}, "another": {}}))
    numel = LAYER[0] * LAYER[1]
    assert choose(LAYER, numel // 100, CUDA) == "dense"
    assert choose(LAYER, numel // 800, CUDA) == "triton"
    assert choose(LAYER, numel // 100, CUDA, tokens=9000) == "triton"
    assert choose(LAYER, numel // 100, CUDA, dtype=torch.float32) == "sampled_addmm"
    assert choose((1 << 20, 1 << 18), 1 << 31, CUDA, dtype=torch.float32) == "triton"  # begins of rows are int64
    assert choice.measured_launch(CUDA) == (32, 64, 8)
    assert choice.measured_launch(CPU) == choice.DEFAULT_LAUNCH


def test_a_table_elsewhere_is_used_when_it_is_named(table: Callable[[str], None], tmp_path: Path) -> None:
    numel = LAYER[0] * LAYER[1]
    assert choose(LAYER, numel // 1000, CUDA) == "triton" and choice.describe_choice(CUDA).startswith("counting")
    row = {"dtype": "bfloat16", "tokens": 2048, "rows": 4096, "columns": 4096, "density": 0.01}
    times = {"dense": 1.0, "triton": 2.0}
    (tmp_path / "elsewhere.json").write_text(
        json.dumps({"a card": {"about": "", "launch": [32, 64, 8], "rows": [row | {"seconds": times}]}})
    )
    choice.use_table(tmp_path / "elsewhere.json")
    assert choose(LAYER, numel // 1000, CUDA) == "dense" and choice.measured_launch(CUDA) == (32, 64, 8)
    assert choice.describe_choice(CUDA) == f"the times in {tmp_path / 'elsewhere.json'}"
    assert "CPU" in choice.describe_choice(CPU)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        '{"a card": []}',
        '{"a card": {"launch": [3, 64, 8], "rows": []}}',
        '{"a card": {"launch": [16, 64, 8], "rows": [{"dtype": "bfloat16"}]}}',
        '{"a card": {"launch": [16, 64, 8], "rows": [{"dtype": "bfloat16", "tokens": 1, "rows": 1, "columns": 1, '
        '"density": 0, "seconds": {"dense": 1}}]}}',
    ],
)
def test_a_damaged_table_is_named_and_left_alone(content: str, table: Callable[[str], None]) -> None:
    table(content)
    with pytest.warns(UserWarning, match="times.json cannot be used .* make it again with benchmarks/gpu.py"):
        assert choose(LAYER, LAYER[0] * LAYER[1] // 1000, CUDA) == "triton"


def test_the_dense_form_does_not_ask_the_device_where_rows_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled, "_DENSE_NUMBERS", 7 * 13)  # blocks of 7 rows
    x, grad, support = draw(6, 20, 40, 13, 0.2)
    assert support.bounds == [int(support.crow[row]) for row in range(0, 40, 7)] + [len(support)]
    known, asked = torch.zeros(len(support)), torch.zeros(len(support))
    with Waits() as waits:
        FORMS["dense"](known, support.shape, support.crow, support.col, x, grad, False, support.bounds)
    assert waits.found == []
    with Waits() as waits:
        FORMS["dense"](asked, support.shape, support.crow, support.col, x, grad, False)
    assert "aten._local_scalar_dense.default" in waits.found
    assert torch.equal(known, asked)
    torch.testing.assert_close(known.double(), reference(support, x, grad), rtol=1e-5, atol=1e-4)
    blocks = support.blocks(4)
    with Waits() as waits:  # experts: their blocks are made once an evolution
        assert support.blocks(4) is blocks
        for number, block in enumerate(blocks):
            begin, end = block.bounds[0], block.bounds[-1]
            assert (begin, end) == (0, len(block))
            rows = grad[:, 10 * number : 10 * number + 10]
            FORMS["dense"](known[:end], block.shape, block.crow, block.col, x, rows, False, block.bounds)
    assert waits.found == []


def test_what_is_added_is_the_whole_sum_over_the_tokens() -> None:
    """A second micro-batch here, or on another rank and then summed: the same bits."""
    x, grad, support = draw(5, 300, 30, 20, 0.3)
    there, here = torch.zeros(len(support)), torch.zeros(len(support))
    sampled_grad_(here, support.shape, support.crow, support.col, x[:150], grad[:150])
    sampled_grad_(there, support.shape, support.crow, support.col, x[150:], grad[150:])
    both = here + there
    sampled_grad_(here, support.shape, support.crow, support.col, x[150:], grad[150:])
    assert torch.equal(here, both)
