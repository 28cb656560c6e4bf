"""Writing into many tensors at once: the same as writing into one after another."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seft_dist.kernels import scatter

SIZES = st.lists(st.tuples(st.integers(0, 40_000), st.floats(0, 1), st.integers(0, 1000)), max_size=6)


@settings(deadline=None)  # the first example may compile
@given(
    sizes=SIZES,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    kinds=st.lists(st.sampled_from([torch.int32, torch.int64]), min_size=6, max_size=6),
    seed=st.integers(0, 99),
)
def test_it_is_an_index_put_of_each(
    sizes: list[tuple[int, float, int]], dtype: torch.dtype, kinds: list[torch.dtype], seed: int
) -> None:
    """Places of either type, those of int64 far beyond what int32 holds."""
    draw = torch.Generator().manual_seed(seed)
    outs = [torch.randn(n, generator=draw).to(dtype) for n, _, _ in sizes]
    offsets = [torch.randperm(n, generator=draw)[: int(share * n)] for n, share, _ in sizes]
    starts = [start + (1 << 40) * (kind == torch.int64) for (_, _, start), kind in zip(sizes, kinds, strict=False)]
    values = torch.randn(sum(map(len, offsets)), generator=draw).to(dtype)
    wanted = [out.clone() for out in outs]
    for out, offset, part in zip(wanted, offsets, values.split([len(each) for each in offsets]), strict=True):
        out[offset] = part
    indices = [(offset + start).to(kind) for offset, start, kind in zip(offsets, starts, kinds, strict=False)]
    scatter.scatter_(outs, starts, indices, values)
    assert all(map(torch.equal, outs, wanted))


def test_without_the_library_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    outs = [torch.zeros(2, 5), torch.zeros(2, 7)]
    indices = [torch.tensor([4, 1]), torch.tensor([13], dtype=torch.int32)]
    values = torch.tensor([1.0, 2.0, 3.0])
    scatter.scatter_([outs[0][0], outs[1][0]], [0, 10], indices, values)
    monkeypatch.setattr(scatter, "library", lambda: None)
    scatter.scatter_([outs[0][1], outs[1][1]], [0, 10], indices, values)
    assert torch.equal(outs[0][0], outs[0][1]) and torch.equal(outs[1][0], outs[1][1])
    assert outs[0][0].tolist() == [0, 2, 0, 0, 1] and outs[1][0, 3] == 3


@pytest.mark.parametrize("index", [-1, 9, 15, 2**31 - 1, -(2**31), 2**32 + 10, 2**63 - 1, -(2**63)])
def test_an_index_outside_its_tensor_is_refused_and_not_written(index: int) -> None:
    around = torch.zeros(20)
    outs = [around[2:7], around[8:18]]  # called 10 to 14 and 0 to 9
    kind = torch.int32 if abs(index + 0.5) < 2**31 else torch.int64
    indices = [torch.tensor([11, index], dtype=kind), torch.tensor([3], dtype=kind)]
    with pytest.raises(ValueError, match="indices inside their tensors"):
        scatter.scatter_(outs, [10, 0], indices, torch.tensor([1.0, 2.0, 3.0]))
    assert around.nonzero().view(-1).tolist() == [3, 11] and around[[3, 11]].tolist() == [1, 3]
