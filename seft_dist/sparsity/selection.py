"""Exact top-k on the bits of fp32 scores, as counting: the local half of the distributed selection.

A score becomes a key, an int32 in the order of the scores; keys are read digit by digit, most significant first. After
all digits the k-th largest key is known exactly, with how many of its ties are wanted. Nothing here is random or
approximate.
"""

import torch
from torch import Tensor

from seft_dist.sparsity.hashes import pieces

DIGITS = ((21, 11), (10, 11), (0, 10))
"""(shift, bits) of each pass over the 32 bits of a key."""
BINS = 1 << 11
INELIGIBLE = -(1 << 31)
"""Key of a position that does not compete; below every key of a number."""


def keys(scores: Tensor, largest: bool, eligible: Tensor | None = None) -> Tensor:
    """Compute integer keys in the order of the scores: the largest key is selected first.

    Args:
        scores: fp32 [n], finite; -0.0 and 0.0 are equal.
        largest: True if large scores are selected, False if small ones.
        eligible: bool [n], True for positions that compete; None for all.

    Returns:
        int32 [n].
    """
    assert scores.dtype == torch.float32
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ordered = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)
    if not largest:
        ordered.bitwise_not_()
    return ordered if eligible is None else ordered.masked_fill_(~eligible, INELIGIBLE)


def values_of(key: Tensor) -> Tensor:
    """Return the numbers that keys stand for: scores, or minus the scores where small ones are selected.

    Args:
        key: int32 of any shape.

    Returns:
        fp32, in the order of the keys; NaN for the ineligible.
    """
    return (key >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(key).view(torch.float32)


def first_histogram(key: Tensor) -> Tensor:
    """Count the first digit of all competing keys.

    Args:
        key: int32 [n].

    Returns:
        int64 [BINS].
    """
    shift = DIGITS[0][0]
    counts = torch.zeros(BINS, dtype=torch.int64, device=key.device)
    for piece in pieces(key):
        counts += torch.bincount((piece >> shift).add_(BINS // 2), minlength=BINS)
    counts[0] = 0  # of finite scores none comes here: these are the ineligible
    return counts


def survivors(key: Tensor, first: int) -> Tensor:
    """Return the indices of the keys that can still be selected once the first digit of the last selected one is known.

    Args:
        key: int32 [n].
        first: That digit.

    Returns:
        int64, increasing; few, so that what follows costs little.
    """
    return (key >= first_threshold(first)).nonzero().view(-1)


def first_threshold(first: int) -> int:
    """Return the smallest eligible key whose first digit is at least ``first``."""
    return max((first - BINS // 2) << DIGITS[0][0], INELIGIBLE + 1)


def histogram(key: Tensor, digit: int, prefix: int) -> Tensor:
    """Count the values of a later digit among the keys whose more significant digits are ``prefix``.

    Args:
        key: int32 [n], keys of the survivors.
        digit: Index in ``DIGITS``, not that of the first.
        prefix: The digits before it, as one number.

    Returns:
        int64 [BINS].
    """
    shift, bits = DIGITS[digit]
    above = shift + bits
    same = key[(key >> above) == prefix - (1 << (31 - above))]
    return torch.bincount((same >> shift) & ((1 << bits) - 1), minlength=BINS)


def descend(counts: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Find the digit in which the wanted-th largest key lies.

    Args:
        counts: int64 [problems, BINS], summed over ranks.
        wanted: int64 [problems], 0 <= wanted <= number counted.

    Returns:
        The digit, and how many of the keys with that digit are still wanted: both int64 [problems].
    """
    from_top = counts.flip(1).cumsum(1)
    bin_from_top = (from_top < wanted.unsqueeze(1)).sum(1).clamp(max=BINS - 1)
    above = torch.where(
        bin_from_top > 0, from_top.gather(1, (bin_from_top - 1).clamp(min=0).unsqueeze(1)).squeeze(1), 0
    )
    return BINS - 1 - bin_from_top, wanted - above


def threshold_key(prefix: int) -> int:
    """Return the key that all digits together make."""
    return prefix - (1 << 31)


def take(key: Tensor, threshold: int, ties: int) -> Tensor:
    """Return the indices of the keys above the threshold and of the first ``ties`` keys equal to it.

    Args:
        key: int32 [n].
        threshold: Key of the last selected entry over all ranks.
        ties: Number of entries equal to it that this rank may take.

    Returns:
        int64, increasing.
    """
    above = key > threshold
    equal = (key == threshold).nonzero().squeeze(1)[:ties]
    above[equal] = True
    return above.nonzero().squeeze(1)
