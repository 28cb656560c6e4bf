"""Packed weights: a bitmask and the values at its set bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seft_dist.kernels import packing
from seft_dist.kernels.packing import decode, encode
from seft_dist.sparsity.bitmask import pack

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 700), st.floats(0, 1), DTYPES, st.integers(0, 9))
def test_decode_inverts_encode_and_writes_nothing_beside(
    seed: int, numel: int, share: float, dtype: torch.dtype, offset: int
) -> None:
    check_packing(seed, numel, share, dtype, offset)


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 700), st.floats(0, 1), DTYPES, st.integers(0, 9))
def test_the_same_in_torch(seed: int, numel: int, share: float, dtype: torch.dtype, offset: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "library", lambda: None)
        check_packing(seed, numel, share, dtype, offset)


def test_a_wrong_number_of_values_is_refused() -> None:
    mask = torch.tensor([True, False, True])
    with pytest.raises(ValueError, match="3 packed values for another number of bits"):
        decode(pack(mask), torch.ones(3), torch.empty(3))
    with pytest.raises(ValueError, match="no bit behind the last position"):
        decode(torch.tensor([0b1101], dtype=torch.uint8), torch.ones(3), torch.empty(3))
    with pytest.raises(ValueError, match="bits of 9 positions, not 1 bytes"):
        encode(torch.ones(9), pack(mask))


def check_packing(seed: int, numel: int, share: float, dtype: torch.dtype, offset: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(numel, generator=generator) < share
    dense = torch.randn(numel, generator=generator).to(dtype)
    dense[::5] = 0  # a zero that is active is a value like any other
    values = encode(dense, pack(mask))
    assert torch.equal(values, dense[mask])
    around = torch.full((numel + 20,), 7, dtype=dtype)
    out = around[offset : offset + numel]
    assert decode(pack(mask), values, out) is out
    assert torch.equal(out, torch.where(mask, dense, 0))
    assert (around[:offset] == 7).all() and (around[offset + numel :] == 7).all()
