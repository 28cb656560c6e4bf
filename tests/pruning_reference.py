"""Published pruning algorithms in plain dense torch, written from the papers' pseudo-code, without the package.

The reference does not select weights itself, because two scores may be equal up to rounding: then either selection is
right, and SparseGPT's later weights and layers depend on it. So it is given the selection, reports by how much that
misses the smallest scores, and computes everything else in fp64.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

CLOSE = 1e-5
"""Slack of a choice that fp32 can make: far above its rounding, far below the distance of two scores."""


def slack(scores: Tensor, gone: Tensor, count: int, typical: Tensor | None = None) -> float:
    """Amount by which a selection misses the ``count`` smallest scores of each row, relative to ``typical``.

    It is 0 for a right selection, as small as rounding errors for another choice among ties, infinite for a wrong
    count.
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


def dampened(hessian: Tensor, dampening: float) -> Tensor:
    """The Hessian with a share of its mean diagonal added to the diagonal, fp64."""
    return hessian + dampening * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def excess(new: Tensor, weight: Tensor, hessian: Tensor, gone: Tensor, dampening: float) -> float:
    """How far a weight's loss is above the least possible one, as a share of what plain pruning adds to it."""
    best = least_squares(weight, hessian, gone, dampening)
    loss = [
        float(((values.double() - weight) @ dampened(hessian, dampening) * (values.double() - weight)).sum())
        for values in (new, best, weight.masked_fill(gone, 0.0))
    ]
    return (loss[0] - loss[1]) / max(loss[2] - loss[1], 1e-30)


def least_squares(weight: Tensor, hessian: Tensor, gone: Tensor, dampening: float = 0.01) -> Tensor:
    """For each row the weights that stay, such that (v - w) (H + damping) (v - w) is smallest; zeros of w stay.

    Args:
        weight: [out, in] before pruning.
        hessian: fp64 [in, in].
        gone: True where a weight is pruned, bool [out, in].
        dampening: Share of the mean diagonal that is added.

    Returns:
        fp64 [out, in], from the normal equations of each row.
    """
    curved = dampened(hessian, dampening)
    solved = torch.zeros_like(weight, dtype=torch.float64)
    for row, old, out in zip(solved, weight.double(), gone | (weight == 0), strict=True):
        stay = ~out
        row[stay] = old[stay] + torch.linalg.solve(curved[stay][:, stay], curved[stay][:, out] @ old[out])
    return solved


def prune_in_rounds(
    weight: Tensor,
    hessian: Tensor,
    numel: int,
    count: int,
    rounds: int,
    outputs: Tensor | None = None,
    dampening: float = 0.01,
) -> Tensor:
    """In each round the smallest of the changed weights are pruned, and the rest solved for again.

    Args:
        weight: [out, in] before pruning.
        hessian: fp64 [in, in].
        numel: Number of consecutive weights among which they are compared: of a row, of a group, or all.
        count: How many of these are pruned in the end.
        rounds: Number of rounds; the share of what stays falls with its third power.
        outputs: Norm of each output's gradient; None: they are alike.
        dampening: Share of the mean diagonal that is added.

    Returns:
        fp64 [out, in].
    """
    new = weight.double()
    for number in range(1, rounds + 1):
        wanted = int(count * (1 - (1 - number / rounds) ** 3) + 0.5)
        scores = new.abs() * hessian.diagonal().sqrt()
        if outputs is not None:
            scores *= outputs[:, None]
        order = scores.masked_fill(new == 0, -1.0).view(-1, numel).argsort(dim=1, stable=True)
        gone = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :wanted], True).view(weight.shape)
        new = least_squares(weight, hessian, gone, dampening)
    return new


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
        counts: Number of weights to prune in each block (in each of its rows if ``per_row``), unless ``pattern`` is
            set.
        pattern: N and M.
        per_row: Weights are selected in each row of a block, not in the whole block.
        block: Columns.
        dampening: Dampening as a share of the mean diagonal.

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
    """Inputs of each linear of a decoder layer, for each sequence, in a run of the whole model."""
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


def curvature_norms(model: nn.Module, sequences: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Norms of each linear's inputs and of its outputs' gradients, over all tokens, of the summed loss; fp64."""
    sums: dict[str, list[Tensor]] = {}

    def forward(name: str) -> Callable[..., None]:
        def count(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            sums[name][0] += args[0][0].detach().double().square().sum(0)

        return count

    def backward(name: str) -> Callable[..., None]:
        def count(_: nn.Module, into: tuple[Tensor, ...], of: tuple[Tensor, ...]) -> None:
            sums[name][1] += of[0][0].double().square().sum(0)

        return count

    handles = []
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and "lm_head" not in name:
            sums[name] = [torch.zeros(size, dtype=torch.float64) for size in linear.weight.T.shape]
            handles.append(linear.register_forward_pre_hook(forward(name)))
            handles.append(linear.register_full_backward_hook(backward(name)))
    for sequence in sequences:
        (model(input_ids=sequence[None], labels=sequence[None]).loss * (len(sequence) - 1)).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return {name: (inputs.sqrt(), outputs.sqrt()) for name, (inputs, outputs) in sums.items()}


def owl_sparsities(outlier_percent: list[float], sparsity: float, spread: float) -> list[float]:
    """Sparsities of layers of equal size, computed as in the OWL paper's code."""
    ratios = torch.tensor(outlier_percent, dtype=torch.float64)
    ratios = (ratios - ratios.min()) * (1 / (ratios.max() - ratios.min()) * spread * 2)
    return (1 - (ratios - ratios.mean() + (1 - sparsity))).tolist()
