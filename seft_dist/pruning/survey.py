"""The zeros that a model on disk already has."""

import io

import torch
from rich.console import Console
from torch import Tensor

from seft_dist.backends.group import Group
from seft_dist.io.tables import sparsity_table
from seft_dist.pruning.stream import StreamedModel
from seft_dist.sparsity.zeros import ZeroCount, all_finite, num_zeros, total_sparsity

# A dense model has a few zeros by chance; more than this share was pruned on purpose.
_DENSE = 0.05
_WIDTHS = (4, 8)
_WORDS = {4: torch.int32, 8: torch.int64}
"""Integers with as many bytes as a group has weights."""
_LOOK = 1 << 20
"""Weights that are looked at in one go."""


def count_stored_zeros(
    stream: StreamedModel, shapes: dict[str, tuple[int, int]], ranks: Group
) -> tuple[list[ZeroCount], str | None]:
    """Count the zeros of each target, each rank reading some of them. Collective.

    Args:
        stream: The model.
        shapes: Targets and the shapes of their weights.
        ranks: Who shares the work.

    Returns:
        The counts, and the narrowest pattern ("2:4") that all targets have, if any.

    Raises:
        ValueError: A weight has values that are not finite; on every rank.
    """
    found = torch.zeros(len(shapes), 2 + len(_WIDTHS), dtype=torch.int64)
    for number, name in enumerate(shapes):
        if number % ranks.size == ranks.rank:
            weight = stream.read_rows(name)
            found[number, 0] = num_zeros(weight)
            found[number, 1] = not all_finite(weight)
            found[number, 2:] = torch.tensor([_most_kept(weight, width) for width in _WIDTHS])
    ranks.sum(found)
    names = list(shapes)
    if found[:, 1].any():
        name = names[int(found[:, 1].nonzero()[0])]
        raise ValueError(
            f"{stream.source.folder}: {name}.weight has values that are not finite; needs a sound checkpoint"
        )
    counts = [
        ZeroCount(name, rows * columns, int(zeros))
        for (name, (rows, columns)), zeros in zip(shapes.items(), found[:, 0], strict=True)
    ]
    most = found[:, 2:].max(dim=0).values.tolist()
    patterns = [f"{kept}:{width}" for kept, width in zip(most, _WIDTHS, strict=True) if kept < width]
    return counts, patterns[0] if patterns else None


def _most_kept(weight: Tensor, width: int) -> int:
    """Most weights that are not 0 among ``width`` that follow each other; ``width`` where columns do not divide."""
    if weight.shape[1] % width:
        return width
    most = 0
    step = max(1, _LOOK // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        held = weight[start : start + step].reshape(-1) != 0
        # The bytes of a group, each 0 or 1, are one integer; times 0x01...01 its highest byte is their sum.
        words = held.view(_WORDS[width]) * (0x0101010101010101 % (1 << 8 * width)) >> 8 * (width - 1)
        most = max(most, int(words.max()))
        if most == width:  # as in the first rows of every weight that has no pattern
            break
    return most


def is_pruned(counts: list[ZeroCount]) -> bool:
    """Whether a model with so many zeros was pruned on purpose."""
    return total_sparsity(counts) > _DENSE


def describe(counts: list[ZeroCount], pattern: str | None) -> str:
    """One sentence: pruned or dense, and how."""
    share = f"{100 * total_sparsity(counts):.1f} % of the target weights are 0"
    if not is_pruned(counts):
        return f"{share}: a dense model"
    return f"{share}, it was pruned already" + (f", to the pattern {pattern}" if pattern else ", to no N:M pattern")


def refuse_pruned(stream: StreamedModel, counts: list[ZeroCount], pattern: str | None) -> None:
    """Raise a ValueError with the table of zeros if a model was pruned already."""
    if is_pruned(counts):
        text = io.StringIO()
        Console(file=text, width=80).print(sparsity_table({"": counts}, str(stream.source.folder.name)))
        raise ValueError(
            f"{stream.source.folder}: {describe(counts, pattern)}: needs the dense model; a pruned one can be trained as "
            f"it is (launch/train.py --model.path)\n{text.getvalue().rstrip()}"
        )
