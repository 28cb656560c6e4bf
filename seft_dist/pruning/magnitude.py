"""Scores by size alone, and the choice of what to prune that every score shares."""

import math
from typing import Literal

import torch
from torch import Tensor

Group = Literal["row", "layer"]


def magnitude_scores(weight: Tensor) -> Tensor:
    """|weight| in fp32. Local.

    Args:
        weight: [out, in], any float type.

    Returns:
        [out, in], fp32, not negative.
    """
    return weight.detach().float().abs()


def num_pruned(sparsity: float, numel: int) -> int:
    """Weights to prune in a group of ``numel``: sparsity * numel, rounded to the nearest. Local."""
    return math.floor(sparsity * numel + 0.5)


@torch.no_grad()
def prune_weight(weight: Tensor, scores: Tensor, sparsity: float, group: Group) -> None:
    """Set the weights of the smallest scores to 0, in place. Local.

    Each group (a row, or the whole weight) gets exactly ``num_pruned`` zeros, or keeps those it has if they are more.
    Weights that are 0 already count first, so that a dead input (score 0 in its whole column) cannot push a group over
    its number; among equal scores the smaller position goes first.

    Args:
        weight: [out, in], changed.
        scores: [out, in], fp32, not negative, finite.
        sparsity: Share of each group that becomes 0.
        group: "row" or "layer".
    """
    assert weight.shape == scores.shape
    ranked = scores.masked_fill(weight == 0, -1.0)
    ranked = ranked if group == "row" else ranked.view(1, -1)
    count = num_pruned(sparsity, ranked.shape[1])
    chosen = torch.sort(ranked, dim=1, stable=True).indices[:, :count]
    pruned = torch.zeros_like(ranked, dtype=torch.bool).scatter_(1, chosen, True)
    weight.masked_fill_(pruned.view_as(weight), 0.0)
