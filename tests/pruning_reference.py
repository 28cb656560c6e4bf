"""Published pruning algorithms in plain dense torch, written from the papers' pseudo-code; knows nothing of the package.

Which weights go is not computed a second time but judged: where two scores are equal to rounding, either choice is right,
and SparseGPT's later weights and layers follow from it. So the reference takes over the choices, says by how much any of them
missed the smallest scores, and computes everything else, in fp64.
"""

import torch
from torch import Tensor, nn

CLOSE = 1e-5
"""Slack of a choice that fp32 can make: far above its rounding, far below the distance of two scores."""


def slack(scores: Tensor, gone: Tensor, count: int, typical: Tensor | None = None) -> float:
    """By how much a choice misses the ``count`` smallest scores of each row, as a share of what is typical (of the row).

    0 if it is right; of the size of rounding errors if it takes the other one of a tie; infinite if the number is wrong.
    """
    if not bool((gone.sum(1) == count).all()):
        return torch.inf
    largest_gone = scores.masked_fill(~gone, -torch.inf).amax(1)
    smallest_kept = scores.masked_fill(gone, torch.inf).amin(1)
    typical = scores.square().mean(1).sqrt() if typical is None else typical
    return float(((largest_gone - smallest_kept).clamp(min=0) / typical.clamp(min=1e-30)).max())


def pattern_slack(scores: Tensor, gone: Tensor, kept: int, width: int) -> float:
    """``slack`` of every ``width`` scores of a row, of which ``kept`` stay; typical is what is typical of the row."""
    parts = zip(scores.split(width, dim=1), gone.split(width, dim=1), strict=True)
    typical = scores.square().mean(1).sqrt()
    return max(slack(*part, width - kept, typical) for part in parts)


def hessian_of(inputs: list[Tensor]) -> Tensor:
    """2/n sum X X^T over n sequences, each [tokens, in]; fp64."""
    total = torch.zeros(inputs[0].shape[1], inputs[0].shape[1], dtype=torch.float64)
    for sequence in inputs:
        total += sequence.double().T @ sequence.double()
    return 2 / len(inputs) * total


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    gone: Tensor,
    counts: list[int],
    pattern: tuple[int, int] | None = None,
    *,
    per_row: bool = False,
    block: int = 128,
    dampening: float = 0.01,
) -> tuple[Tensor, float]:
    """Algorithm 1 of the SparseGPT paper, with choices that are given.

    Args:
        weight: [out, in].
        hessian: [in, in].
        gone: bool [out, in], the weights that are pruned.
        counts: How many weights of each block should be (of each row of it if ``per_row``), unless ``pattern`` decides.
        pattern: N and M.
        per_row: What a block's choice ranks.
        block: Columns.
        dampening: As a share of the mean diagonal.

    Returns:
        The pruned weight, fp64, and the largest slack of a choice, on the roots of the paper's scores.
    """
    weight, hessian = weight.double().clone(), hessian.double().clone()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian += dampening * hessian.diagonal().mean() * torch.eye(len(hessian))
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    columns, missed = weight.shape[1], 0.0
    for number, i in enumerate(range(0, columns, block)):
        end = min(i + block, columns)
        errors = torch.zeros(len(weight), end - i, dtype=torch.float64)
        if pattern is None:
            scores, here = (weight[:, i:end] / inverse.diagonal()[i:end]).abs(), gone[:, i:end]
            shape = (-1, end - i) if per_row else (1, -1)
            missed = max(missed, slack(scores.reshape(shape), here.reshape(shape), counts[number]))
        for j in range(i, end):
            if pattern is not None and (j - i) % pattern[1] == 0:
                span = slice(j, j + pattern[1])
                now = (weight[:, span] / inverse.diagonal()[span]).abs()
                missed = max(missed, pattern_slack(now, gone[:, span], *pattern))
            errors[:, j - i] = torch.where(gone[:, j], weight[:, j] / inverse[j, j], 0.0)
            weight[:, j:end] -= torch.outer(errors[:, j - i], inverse[j, j:end])
            weight[gone[:, j], j] = 0.0
        weight[:, end:] -= errors @ inverse[i:end, end:]
    return weight, missed


@torch.no_grad()
def layer_inputs(model: nn.Module, sequences: list[Tensor], layer: int) -> dict[str, list[Tensor]]:
    """What each linear of a decoder layer is given, sequence by sequence, in a run of the whole model."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and f"layers.{layer}." in n}
    seen: dict[str, list[Tensor]] = {name: [] for name in linears}
    handles = [
        linear.register_forward_pre_hook(lambda _, args, inputs=seen[name]: inputs.append(args[0][0].float()))
        for name, linear in linears.items()
    ]
    for sequence in sequences:
        model(sequence[None])
    for handle in handles:
        handle.remove()
    return seen


def owl_sparsities(outlier_percent: list[float], sparsity: float, spread: float) -> list[float]:
    """As the OWL paper's code has it, for layers of one size."""
    ratios = torch.tensor(outlier_percent, dtype=torch.float64)
    ratios = (ratios - ratios.min()) * (1 / (ratios.max() - ratios.min()) * spread * 2)
    return (1 - (ratios - ratios.mean() + (1 - sparsity))).tolist()
