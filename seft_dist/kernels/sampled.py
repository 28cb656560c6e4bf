"""The gradient of a weight [out, in] at k of its positions: grad[k] = or += sum over tokens of g[t, row of k] x[t, column of k].

Four forms, one result (to rounding; sums are made in fp32): C++, torch.sparse.sampled_addmm, a dense product of one block of
rows after another from which the positions are taken, and on CUDA a Triton kernel. ``choose`` picks by density
(benchmarks/kernels.py measures it).
"""

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from seft_dist.kernels.arguments import expect
from seft_dist.kernels.build import library, triton_kernels

Form = Literal["c++", "sampled_addmm", "dense", "triton"]

_BLOCK = 64
"""Tokens that the C++ form transposes at a time: of common shapes they fit into a core's second cache."""
_DENSE_ABOVE = {"c++": 0.4, "sampled_addmm": 0.1, "triton": 0.05}
"""Density from which on a dense product is faster; for Triton a guess, it was never run on a GPU."""
_DENSE_NUMBERS = 1 << 24
"""Most numbers of a dense product that exist at a time."""


def choose(shape: tuple[int, int], entries: int, device: torch.device) -> Form:
    """The form that is fastest. Local.

    Args:
        shape: [out, in].
        entries: Positions to sample.
        device: Where the operands are.
    """
    density = entries / (shape[0] * shape[1])
    if device.type == "cuda":
        return "triton" if triton_kernels() is not None and density < _DENSE_ABOVE["triton"] else "dense"
    if device.type != "cpu":
        return "dense"
    if library() is not None:
        return "c++" if density < _DENSE_ABOVE["c++"] else "dense"
    return "sampled_addmm" if density < _DENSE_ABOVE["sampled_addmm"] and torch.backends.mkl.is_available() else "dense"


def sampled_grad_(
    out: Tensor, shape: tuple[int, int], crow: Tensor, col: Tensor, x: Tensor, grad: Tensor, accumulate: bool = True
) -> None:
    """The weight gradient at some positions into ``out``, accumulated in fp32. Local.

    Args:
        out: fp32 [k], contiguous.
        shape: [out, in] of the weight.
        crow: int32 [out + 1], contiguous, where each row's positions begin.
        col: int32 [k], contiguous, column of each position; inside a row they increase.
        x: [T, in], the linear's input; fp32, bf16 or fp16, like ``grad``.
        grad: [T, out], gradient of its output.
        accumulate: Whether to add to what ``out`` has.
    """
    entries, tokens = out.shape[0], x.shape[0]
    if entries and tokens:
        FORMS[choose(shape, entries, x.device)](out, shape, crow, col, x, grad, accumulate)
    elif not accumulate:
        out.zero_()


def _triton(out: Tensor, shape: tuple[int, int], crow: Tensor, col: Tensor, x: Tensor, grad: Tensor) -> None:
    kernels = triton_kernels()
    assert kernels is not None
    kernels.sampled_grad_(out, shape, crow, col, x, grad)


def _cpp(
    out: Tensor, shape: tuple[int, int], crow: Tensor, col: Tensor, x: Tensor, grad: Tensor, accumulate: bool
) -> None:
    functions = library()
    assert functions is not None
    function = functions.sampled_f32
    if x.dtype == grad.dtype == torch.bfloat16:
        function = functions.sampled_bf16
    else:
        x, grad = x.float(), grad.float()
    x, grad = (matrix if matrix.stride(1) == 1 else matrix.contiguous() for matrix in (x, grad))
    entries, (tokens, columns), (rows,) = col.shape[0], x.shape, grad.shape[1:]
    # That crow rises from 0 to the number of entries, and that columns are inside, is checked once, by Support.
    expect(crow.dtype == col.dtype == torch.int32 and out.dtype == torch.float32, "int32 positions, fp32 sums")
    expect(all(each.is_contiguous() and each.is_cpu for each in (crow, col, out)), "contiguous vectors on the CPU")
    expect(out.shape == (entries,) and crow.shape == (rows + 1,), "a sum for each entry, a begin for each row")
    expect(grad.shape[0] == tokens and tuple(shape) == (rows, columns), "operands of the weight's shape")
    block = 16
    while block < min(_BLOCK, tokens):
        block *= 2
    failed = function(
        *(x.data_ptr(), x.stride(0), grad.data_ptr(), grad.stride(0), tokens, rows, columns, crow.data_ptr()),
        *(col.data_ptr(), entries, out.data_ptr(), accumulate, block, torch.get_num_threads()),
    )
    if failed:
        raise MemoryError(f"no memory for {block} tokens of {sum(shape)} numbers")


def _sampled_addmm(out: Tensor, shape: tuple[int, int], crow: Tensor, col: Tensor, x: Tensor, grad: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        pattern = torch.sparse_csr_tensor(crow, col, out, size=shape, check_invariants=False)
    out.copy_(torch.sparse.sampled_addmm(pattern, grad.float().T, x.float()).values())


def _dense(out: Tensor, shape: tuple[int, int], crow: Tensor, col: Tensor, x: Tensor, grad: Tensor) -> None:
    rows, columns = shape
    block = max(1, _DENSE_NUMBERS // columns)
    bounds = crow[::block].tolist() + [len(col)]
    for number, first in enumerate(range(0, rows, block)):
        begin, end = bounds[number], bounds[number + 1]
        counts = crow[first : first + block + 1].diff()
        row = torch.arange(len(counts), device=col.device).repeat_interleave(counts)
        product = grad[:, first : first + block].float().T @ x.float()
        out[begin:end] += product.view(-1)[row * columns + col[begin:end]]


def _from_zero(adding: Callable[..., None]) -> Callable[..., None]:
    """A form that can only add, as one that can also begin."""

    def form(out: Tensor, *given: Any) -> None:
        *operands, accumulate = given
        if not accumulate:
            out.zero_()
        adding(out, *operands)

    return form


FORMS: dict[Form, Callable[..., None]] = {
    "c++": _cpp,
    "sampled_addmm": _from_zero(_sampled_addmm),
    "dense": _from_zero(_dense),
    "triton": _from_zero(_triton),
}
"""Arguments as of ``sampled_grad_``, at least one token and one position."""
