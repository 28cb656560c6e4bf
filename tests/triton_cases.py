"""The Triton kernels on CPU tensors: run by test_kernels_triton.py in a process with TRITON_INTERPRET=1."""

from typing import Any

import pytest
import torch

from seft_dist import SeftOptimizer
from seft_dist.kernels import build, sampled, triton_kernels
from seft_dist.kernels.build import lacks_triton
from seft_dist.optim.delta import Support
from seft_dist.sparsity.bitmask import pack
from tests.models import batch, moving, prune_, tiny_llama

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("dtype", "launch"), [*((dtype, (16, 128, 4)) for dtype in DTYPES), (torch.float32, (2, 32, 1))]
)
@pytest.mark.parametrize(("tokens", "rows", "cols", "share"), [(1, 3, 5, 1.0), (70, 20, 33, 0.1), (64, 9, 7, 0.5)])
def test_sampled_gradient(
    tokens: int, rows: int, cols: int, share: float, launch: tuple[int, int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(tokens, cols).to(dtype), torch.randn(tokens, 2 * rows).to(dtype)[:, ::2]
    chosen = torch.rand(rows, cols) < share
    chosen[1] = False  # a row without any
    chosen[2] = True  # and one with many more than the others
    support = Support((rows, cols), [chosen.view(-1).nonzero().view(-1).int()])
    before = torch.arange(len(support), dtype=torch.float32)
    out = before.clone()
    triton_kernels.sampled_grad_(out, support.shape, support.crow, support.col, x, grad, launch)
    expected = (grad.double().T @ x.double()).reshape(-1)[support.positions()]
    torch.testing.assert_close(out.double(), before + expected, rtol=1e-5, atol=1e-4)
    if tokens == 1:  # the interpreter is slow
        wide = before.clone()
        triton_kernels.sampled_grad_(wide, support.shape, support.crow.long(), support.col, x, grad, launch)
        assert torch.equal(wide, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("numel", "share"), [(1, 1.0), (1024, 0.0), (1025, 1.0), (3001, 0.4)])
def test_packing(numel: int, share: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    mask, dense = torch.rand(numel) < share, torch.randn(numel).to(dtype)
    values = triton_kernels.encode(dense, pack(mask))
    assert torch.equal(values, dense[mask])
    around = torch.full((numel + 2,), 7, dtype=dtype)
    triton_kernels.decode(pack(mask), values, around[1:-1])
    assert torch.equal(around[1:-1], torch.where(mask, dense, 0)) and around[0] == around[-1] == 7


def test_too_few_values_are_not_read_beyond() -> None:
    mask = torch.ones(1500, dtype=torch.bool)
    values = torch.arange(1, 1501, dtype=torch.float32)
    out = triton_kernels.decode(pack(mask), values[:1100], torch.full((1500,), 7.0))
    assert torch.equal(out, torch.where(torch.arange(1500) < 1100, values, 0))


def test_the_optimizer_takes_its_gradients_from_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    ran, losses = [], []
    run = sampled.FORMS["triton"]

    def recorded(*args: Any) -> None:
        ran.append(args[1])
        run(*args)

    monkeypatch.setitem(sampled.FORMS, "triton", recorded)
    for form in ("dense", "triton"):
        monkeypatch.setattr(sampled, "choose", lambda *_, form=form: form)
        model = prune_(tiny_llama(num_hidden_layers=1))
        seft = SeftOptimizer(model, moving(density=0.05, interval=3, window=1, steps=6), lr=1e-2)
        for t in range(5):  # the first support, ordinary steps and an evolution
            loss = model(**batch(t)).loss
            loss.backward()
            seft.step()
            seft.zero_grad()
            losses.append(loss.item())
    assert losses[5:] == pytest.approx(losses[:5], rel=1e-4)
    assert len(ran) == 7 * 3  # the linears of a layer, in steps without a dense gradient


def test_a_trial_launch() -> None:
    assert lacks_triton(torch.device("cpu")) is None and build.triton_kernels() is triton_kernels
