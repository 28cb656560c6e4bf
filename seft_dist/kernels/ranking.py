"""The passes of a selection over all positions, as in ``sparsity.selection``, in C++ if there is a compiler."""

import ctypes

import torch
from torch import Tensor

from seft_dist.kernels.arguments import expect
from seft_dist.kernels.build import library
from seft_dist.sparsity import bitmask, selection
from seft_dist.sparsity.hashes import pieces
from seft_dist.sparsity.scores import grow_gradient, sensitivity
from seft_dist.sparsity.selection import BINS, DIGITS, descend, first_threshold, histogram, take, threshold_key


def ranking_keys(
    scores: Tensor,
    largest: bool,
    eligible: Tensor | None = None,
    *,
    times: Tensor | None = None,
    absolute: bool = False,
) -> Tensor:
    """Compute the keys of scores, or of |scores x times|, or of |scores|; see ``selection.keys``.

    Args:
        scores: fp32 [n], finite.
        largest: True if large scores are selected, False if small ones.
        eligible: uint8 [ceil(n / 8)], bits of who competes; None for all.
        times: fp32 [n]; makes the score the absolute value of the product.
        absolute: Makes the score the absolute value.

    Returns:
        int32 [n].
    """
    functions = library() if scores.is_cpu else None
    if functions is None:
        return _keys_in_torch(scores, largest, eligible, times, absolute)
    expect(scores.dtype == torch.float32 and scores.dim() == 1, "scores as fp32, one-dimensional")
    expect(
        times is None or (times.dtype, times.shape, times.is_cpu) == (torch.float32, scores.shape, True), "two factors"
    )
    if eligible is not None:
        expect(eligible.dtype == torch.uint8 and eligible.is_cpu, "bits as uint8 on the CPU")
        expect(eligible.numel() == -(-scores.numel() // 8), f"bits of {scores.numel()} positions")
    # contiguous() keeps what is contiguous; the names keep the rest alive during the call
    given = [each.contiguous() if each is not None else None for each in (scores, times, eligible)]
    a, b, bits = (each.data_ptr() if each is not None else None for each in given)
    key = torch.empty(scores.numel(), dtype=torch.int32)
    kind = 2 if times is not None else int(absolute)
    functions.rank_keys(a, b, bits, key.numel(), kind, largest, key.data_ptr(), torch.get_num_threads())
    return key


def _keys_in_torch(
    scores: Tensor, largest: bool, eligible: Tensor | None, times: Tensor | None, absolute: bool
) -> Tensor:
    key, begin = torch.empty(scores.shape, dtype=torch.int32, device=scores.device), 0
    for out in pieces(key):  # what is made on the way takes several times the room of the keys
        end = begin + out.numel()
        some = scores[begin:end]
        if times is not None or absolute:
            some = grow_gradient(some) if times is None else sensitivity(some, times[begin:end])
        mask = None if eligible is None else bitmask.unpack(eligible[begin // 8 : -(-end // 8)], out.numel())
        out.copy_(selection.keys(some, largest, mask))
        begin = end
    return key


def first_histogram(key: Tensor) -> Tensor:
    """Count the first digit of all competing keys, int64 [BINS]; see ``selection.first_histogram``."""
    functions = library() if key.is_cpu else None
    if functions is None:
        return selection.first_histogram(key)
    expect(key.dtype == torch.int32 and key.is_contiguous(), "keys as contiguous int32")
    counts = torch.zeros(BINS, dtype=torch.int64)
    functions.count_keys(key.data_ptr(), key.numel(), counts.data_ptr(), torch.get_num_threads())
    counts[0] = 0  # the ineligible
    return counts


def survivors(key: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Find the keys that can still be selected once the first digit of the last selected one is known.

    Args:
        key: int32 [n].
        first: That digit.

    Returns:
        Indices of these keys, int64, increasing, and the keys.
    """
    functions = library() if key.is_cpu else None
    if functions is None:
        indices = selection.survivors(key, first)
        return indices, key[indices]
    expect(key.dtype == torch.int32 and key.is_contiguous(), "keys as contiguous int32")
    lowest, threads, count = first_threshold(first), torch.get_num_threads(), ctypes.c_int64()
    what = (key.data_ptr(), key.numel(), lowest, ctypes.byref(count))
    functions.keys_from(*what, None, None, threads)
    indices = torch.empty(count.value, dtype=torch.int64)
    kept = torch.empty(count.value, dtype=torch.int32)
    if functions.keys_from(*what, indices.data_ptr(), kept.data_ptr(), threads):
        raise AssertionError("keys changed while they were read")
    return indices, kept


def top_k(key: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest keys, smaller indices first among ties. Waits for the device.

    Args:
        key: int32 [n]; ineligible ones are never selected.
        k: Largest number of keys; fewer are returned if fewer compete.

    Returns:
        int64, increasing.
    """
    counts = first_histogram(key).cpu().unsqueeze(0)
    digits, wanted = descend(counts, torch.tensor([k]).minimum(counts.sum(1)))
    left, key = survivors(key, int(digits))
    prefix = int(digits)
    for digit, (_, bits) in list(enumerate(DIGITS))[1:]:
        digits, wanted = descend(histogram(key, digit, prefix).cpu().unsqueeze(0), wanted)
        prefix = prefix << bits | int(digits)
    return left[take(key, threshold_key(prefix), int(wanted))]
