"""Published pruning algorithms in plain dense torch, written from the papers' pseudo-code; knows nothing of the package."""

import torch
from torch import Tensor, nn


def magnitude_mask(scores: Tensor, count: int) -> Tensor:
    """True at the ``count`` smallest scores of each row, smaller positions first among equal ones."""
    order = scores.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, True)


def pattern_mask(scores: Tensor, kept: int, width: int) -> Tensor:
    """True at the smallest ``width - kept`` of every ``width`` scores of a row."""
    parts = [magnitude_mask(part, width - kept) for part in scores.split(width, dim=1)]
    return torch.cat(parts, dim=1)


def hessian_of(inputs: list[Tensor]) -> Tensor:
    """2/n sum X X^T over n sequences, each [tokens, in]; fp32."""
    total = torch.zeros(inputs[0].shape[1], inputs[0].shape[1])
    for sequence in inputs:
        total += sequence.T @ sequence
    return 2 / len(inputs) * total


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    counts: list[int],
    pattern: tuple[int, int] | None = None,
    *,
    per_row: bool = False,
    block: int = 128,
    dampening: float = 0.01,
) -> Tensor:
    """Algorithm 1 of the SparseGPT paper, in fp32.

    ``counts[i]`` weights of block i go (of each row of it if ``per_row``), or ``pattern`` decides.
    """
    weight, hessian = weight.clone(), hessian.clone()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian += dampening * hessian.diagonal().mean() * torch.eye(len(hessian))
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    columns = weight.shape[1]
    for number, i in enumerate(range(0, columns, block)):
        end = min(i + block, columns)
        errors = torch.zeros(len(weight), end - i)
        scores = weight[:, i:end] ** 2 / inverse.diagonal()[i:end] ** 2
        if pattern is None:
            flat = scores if per_row else scores.reshape(1, -1)
            gone = magnitude_mask(flat, counts[number]).view_as(scores)
        else:
            gone = torch.zeros_like(scores, dtype=torch.bool)
        for j in range(i, end):
            if pattern is not None and (j - i) % pattern[1] == 0:
                span = slice(j, j + pattern[1])
                now = weight[:, span] ** 2 / inverse.diagonal()[span] ** 2
                gone[:, j - i : j - i + pattern[1]] = pattern_mask(now, *pattern)
            errors[:, j - i] = torch.where(gone[:, j - i], weight[:, j] / inverse[j, j], 0.0)
            weight[:, j:end] -= torch.outer(errors[:, j - i], inverse[j, j:end])
            weight[gone[:, j - i], j] = 0.0
        weight[:, end:] -= errors @ inverse[i:end, end:]
    return weight


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
