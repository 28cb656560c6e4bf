"""Zeros that a model on disk already has: how many there are, and whether it was pruned on purpose."""

import io

import torch
from rich.console import Console
from torch import Tensor

from seft_dist.backends.group import Group
from seft_dist.io.tables import sparsity_table
from seft_dist.pruning.stream import StreamedModel
from seft_dist.sparsity.zeros import ZeroCount, all_finite, num_zeros, total_sparsity

_MOST_BY_CHANCE = 0.05
"""Largest share of zeros that a dense model is expected to have. A model with more was pruned on purpose."""
_WIDTHS = (4, 8)
"""Group sizes M of the N:M patterns that are recognized."""
_WORDS = {4: torch.int32, 8: torch.int64}
"""Integer types with as many bytes as a group has weights."""
_WEIGHTS_AT_ONCE = 1 << 20
"""Number of weights that are compared with 0 at a time."""


def count_stored_zeros(
    stream: StreamedModel, shapes: dict[str, tuple[int, int]], ranks: Group
) -> tuple[list[ZeroCount], str | None]:
    """Count the zeros of each target; the ranks divide the targets among themselves. Collective.

    Args:
        stream: The model.
        shapes: Shape [out, in] of each target's weight, by its name.
        ranks: Ranks that share the work.

    Returns:
        The counts, and the pattern with the smallest groups ("2:4") that all targets have, or None.

    Raises:
        ValueError: A weight has values that are not finite; raised on every rank.
    """
    # A weight is read only once, for three statistics: its zeros, whether it is not finite, and the fullest group of
    # each width. Ranks leave the rows of other ranks 0, so a sum distributes them.
    statistics = torch.zeros(len(shapes), 2 + len(_WIDTHS), dtype=torch.int64)
    for number, name in enumerate(shapes):
        if number % ranks.size == ranks.rank:
            weight = stream.read_rows(name)
            statistics[number, 0] = num_zeros(weight)
            statistics[number, 1] = not all_finite(weight)
            statistics[number, 2:] = torch.tensor([_most_kept(weight, width) for width in _WIDTHS])
    ranks.sum(statistics)
    names = list(shapes)
    if statistics[:, 1].any():
        name = names[int(statistics[:, 1].nonzero()[0])]
        raise ValueError(
            f"{stream.source.folder}: {name}.weight has values that are not finite; needs a sound checkpoint"
        )
    counts = [
        ZeroCount(name, rows * columns, int(zeros))
        for (name, (rows, columns)), zeros in zip(shapes.items(), statistics[:, 0], strict=True)
    ]
    most = statistics[:, 2:].max(dim=0).values.tolist()
    patterns = [f"{kept}:{width}" for kept, width in zip(most, _WIDTHS, strict=True) if kept < width]
    return counts, patterns[0] if patterns else None


def _most_kept(weight: Tensor, width: int) -> int:
    """Largest number of weights that are not 0 in a group of consecutive weights.

    Args:
        weight: [out, in].
        width: Number of weights in a group, 4 or 8.

    Returns:
        The number; ``width`` if it does not divide the number of columns, which means that there is no such pattern.
    """
    if weight.shape[1] % width:
        return width
    most = 0
    step = max(1, _WEIGHTS_AT_ONCE // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        held = weight[start : start + step].reshape(-1) != 0
        # The bytes of a group, each 0 or 1, are read as one integer. Multiplied by 0x01...01, its highest byte is their
        # sum. This takes one pass over the weight, where a sum over the groups of a reshaped tensor takes several.
        words = held.view(_WORDS[width]) * (0x0101010101010101 % (1 << 8 * width)) >> 8 * (width - 1)
        most = max(most, int(words.max()))
        if most == width:  # there is no pattern; in most weights the first rows show it
            break
    return most


def is_pruned(counts: list[ZeroCount]) -> bool:
    """Return whether a model with these counts was pruned on purpose."""
    return total_sparsity(counts) > _MOST_BY_CHANCE


def describe_zeros(counts: list[ZeroCount], pattern: str | None) -> str:
    """Describe in one sentence whether a model is dense or pruned, and to which pattern."""
    share = f"{100 * total_sparsity(counts):.1f} % of the target weights are 0"
    if not is_pruned(counts):
        return f"{share}: a dense model"
    return f"{share}, it was pruned already" + (f", to the pattern {pattern}" if pattern else ", to no N:M pattern")


def check_not_pruned(stream: StreamedModel, counts: list[ZeroCount], pattern: str | None) -> None:
    """Raise a ValueError, with a table of the zeros, if a model was pruned already."""
    if is_pruned(counts):
        text = io.StringIO()
        Console(file=text, width=80).print(sparsity_table({"": counts}, str(stream.source.folder.name)))
        raise ValueError(
            f"{stream.source.folder}: {describe_zeros(counts, pattern)}: needs the dense model; a pruned one can be "
            f"trained as it is (seft train --model.path)\n{text.getvalue().rstrip()}"
        )
