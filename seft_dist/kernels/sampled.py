"""The gradient of a weight [out, in] at k of its positions.

    grad[k] = or += sum over tokens of g[t, row of k] x[t, column of k]

Four forms, one result (to rounding; sums are made in fp32): C++, torch.sparse.sampled_addmm, a dense product of one
block of rows after another from which the positions are taken, and on CUDA a Triton kernel. ``choose`` picks
(benchmarks/kernels.py measures them on a CPU, benchmarks/gpu.py on a GPU).
"""

import functools
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from seft_dist.kernels.arguments import expect
from seft_dist.kernels.build import lacks_triton, library, triton_kernels
from seft_dist.kernels.choice import Form, choose, measured_launch

_BLOCK = 64
"""Tokens that the C++ form transposes at a time: of common shapes they fit into a core's second cache."""
_DENSE_NUMBERS = 1 << 24
"""Largest number of values of a dense product that exist at a time."""

Bounds = Sequence[int] | None
"""Result of ``row_bounds``; None: not known on the host."""


def block_rows(columns: int) -> int:
    """Return the number of rows of a weight whose dense product the dense form makes at a time."""
    return max(1, _DENSE_NUMBERS // columns)


def row_bounds(shape: tuple[int, int], crow: Tensor) -> list[int]:
    """Return the index at which each block of rows begins among the positions, and their number. Waits for the device.

    Args:
        shape: [out, in] of the weight.
        crow: int [out + 1], index at which each row's positions begin.
    """
    return [*crow[: -1 : block_rows(shape[1])].tolist(), int(crow[-1])]


def sampled_grad_(
    out: Tensor,
    shape: tuple[int, int],
    crow: Tensor,
    col: Tensor,
    x: Tensor,
    grad: Tensor,
    accumulate: bool = True,
    bounds: Bounds = None,
) -> None:
    """Compute the weight gradient at some positions into ``out``, accumulated in fp32.

    Args:
        out: fp32 [k], contiguous.
        shape: [out, in] of the weight.
        crow: int32 or int64 [out + 1], contiguous, index at which each row's positions begin.
        col: int32 [k], contiguous, column of each position; inside a row they increase.
        x: [T, in], the linear's input; fp32, bf16 or fp16, like ``grad``.
        grad: [T, out], gradient of its output.
        accumulate: True to add to ``out``, False to replace it.
        bounds: ``row_bounds`` of the positions; without them the dense form waits for the device.
    """
    entries, tokens = out.shape[0], x.shape[0]
    if entries and tokens:
        form = FORMS[choose(shape, entries, x.device, tokens, x.dtype)]
        form(out, shape, crow, col, x, grad, accumulate, bounds)
    elif not accumulate:
        out.zero_()


def dense_grad(x: Tensor, grad: Tensor) -> Tensor:
    """Compute the whole weight gradient, fp32 [out, in].

    Products of 16-bit numbers are exact in fp32, so tensor cores may make them on CUDA; sums are always in fp32.

    Args:
        x: [T, in], the linear's input.
        grad: [T, out], gradient of its output.
    """
    if x.is_cuda and x.dtype == grad.dtype and x.dtype.itemsize == 2 and _has_fp32_output(x.dtype, x.device):
        return torch.mm(grad.T, x, out_dtype=torch.float32)
    with torch.autocast(x.device.type, enabled=False):  # backward may run inside of it
        return grad.float().T @ x.float()


@functools.cache
def _has_fp32_output(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether torch multiplies 16-bit matrices into an fp32 one on this device."""
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        return torch.mm(ones, ones, out_dtype=torch.float32).dtype == torch.float32
    except (TypeError, RuntimeError):  # an older torch, or a card without it
        return False


def _triton(
    out: Tensor, shape: tuple[int, int], crow: Tensor, col: Tensor, x: Tensor, grad: Tensor, bounds: Bounds = None
) -> None:
    kernels = triton_kernels(x.device)
    assert kernels is not None, lacks_triton(x.device)
    kernels.sampled_grad_(out, shape, crow, col, x, grad, measured_launch(x.device))


def _cpp(
    out: Tensor,
    shape: tuple[int, int],
    crow: Tensor,
    col: Tensor,
    x: Tensor,
    grad: Tensor,
    accumulate: bool,
    bounds: Bounds = None,
) -> None:
    """Sample with the C++ kernel, after checking everything that it would read or write outside of."""
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
    expect(crow.dtype in (torch.int32, torch.int64), "begins of rows as int32 or int64")
    expect(col.dtype == torch.int32 and out.dtype == torch.float32, "int32 columns, fp32 sums")
    expect(all(each.is_contiguous() and each.is_cpu for each in (crow, col, out)), "contiguous vectors on the CPU")
    expect(out.shape == (entries,) and crow.shape == (rows + 1,), "a sum for each entry, a begin for each row")
    expect(grad.shape[0] == tokens and tuple(shape) == (rows, columns), "operands of the weight's shape")
    block = 16
    while block < min(_BLOCK, tokens):
        block *= 2
    failed = function(
        *(x.data_ptr(), x.stride(0), grad.data_ptr(), grad.stride(0), tokens, rows, columns),
        *(crow.data_ptr(), crow.dtype == torch.int64, col.data_ptr(), entries),
        *(out.data_ptr(), accumulate, block, torch.get_num_threads()),
    )
    if failed:
        raise MemoryError(f"no memory for {block} tokens of {sum(shape)} numbers")


def _sampled_addmm(
    out: Tensor, shape: tuple[int, int], crow: Tensor, col: Tensor, x: Tensor, grad: Tensor, bounds: Bounds = None
) -> None:
    expect(crow.dtype == col.dtype, "begins of rows of the columns' type")
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Sparse (CSR tensor support is in beta|invariant checks are implicitly)"
        )
        pattern = torch.sparse_csr_tensor(crow, col, out, size=shape, check_invariants=False)
    out.copy_(torch.sparse.sampled_addmm(pattern, grad.float().T, x.float()).values())


def _dense(
    out: Tensor, shape: tuple[int, int], crow: Tensor, col: Tensor, x: Tensor, grad: Tensor, bounds: Bounds = None
) -> None:
    rows, columns = shape
    block = block_rows(columns)
    bounds = row_bounds(shape, crow) if bounds is None else bounds
    for number, first in enumerate(range(0, rows, block)):
        begin, end = bounds[number], bounds[number + 1]
        if begin == end:
            continue
        counts = crow[first : first + block + 1].diff()
        row = torch.arange(len(counts), device=col.device)
        row = row.repeat_interleave(counts, output_size=end - begin)  # else it would wait for the device
        product = dense_grad(x, grad[:, first : first + block])
        out[begin:end] += product.view(-1)[row * columns + col[begin:end]]


def _from_zero(adding: Callable[..., None]) -> Callable[..., None]:
    """Make a form that can also replace from one that can only add."""

    def form(
        out: Tensor,
        shape: tuple[int, int],
        crow: Tensor,
        col: Tensor,
        x: Tensor,
        grad: Tensor,
        accumulate: bool,
        bounds: Bounds = None,
    ) -> None:
        if not accumulate:
            out.zero_()
        adding(out, shape, crow, col, x, grad, bounds)

    return form


FORMS: dict[Form, Callable[..., None]] = {
    "c++": _cpp,
    "sampled_addmm": _from_zero(_sampled_addmm),
    "dense": _from_zero(_dense),
    "triton": _from_zero(_triton),
}
"""The forms by name. They take the arguments of ``sampled_grad_``, with at least one token and one position."""
