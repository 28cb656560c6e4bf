"""SparseGPT: columns are pruned one after the other, and later weights of a row compensate for the error.

Once the Hessian is known, rows are independent of each other, so each rank prunes its own rows.

Source: Frantar, Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", arXiv 2301.00774.
"""

import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from seft_dist.backends.group import Group
from seft_dist.modules.kinds import ExpertWeight, Target
from seft_dist.pruning.masks import TILE, Ranking, num_pruned, select_pruned
from seft_dist.pruning.wanda import no_tokens, not_finite, unused_experts
from seft_dist.pruning.watch import watch_inputs

log = logging.getLogger(__name__)

BLOCK = 128
"""Number of columns in a block. The updates that a block causes in later columns are applied at once."""
_STRIP = 1024
"""Number of rows of a Hessian that are updated at a time."""
_RAISES = 2
"""Number of times that the dampening is multiplied by 10 before the inversion is given up."""


class Hessians:
    """Accumulates the Hessians 2/n X X^T of the inputs X of linears, over all n sequences on all ranks.

    Forward hooks add the inputs until ``close``. Linears that get the same tensor (q, k and v) share a Hessian. Sums
    are in fp64, so the differences that depend on how sequences are divided among ranks vanish when they are rounded to
    fp32.
    """

    def __init__(self, linears: dict[str, Target]) -> None:
        """Args:
        linears: Linears of one decoder layer by name, the same on every rank.
        """
        self._linears = linears
        self._leader = dict.fromkeys(linears, -1)
        self._sums: dict[int, Tensor] = {}
        self._sequences = dict.fromkeys(range(len(linears)), 0)
        self._last: tuple[int, Tensor | None] = (-1, None)
        self._handles: list[RemovableHandle] = [
            linear.module.register_forward_pre_hook(self._listener(number, name))
            for number, (name, linear) in enumerate(linears.items())
        ]

    def _listener(self, number: int, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        # The hooks of q, k and v run one after the other with the very same tensor. The first of them (the leader)
        # accumulates for all. Each layer is checked to behave the same way for every batch.
        def listen(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            leader, last_inputs = self._last
            shared = args[0] is last_inputs
            if self._leader[name] == -1:
                self._leader[name] = leader if shared else number
            if shared != (self._leader[name] != number):
                raise ValueError(
                    f"{name} shares its input with another linear at times only: use --method wanda without "
                    "--compensate"
                )
            if not shared:
                self._last = (number, args[0])
                self._add(number, args[0].detach())

        return listen

    def _add(self, number: int, inputs: Tensor) -> None:
        columns = inputs.shape[-1]
        if number not in self._sums:
            self._sums[number] = torch.zeros(columns, columns, dtype=torch.float64, device=inputs.device)
        self._sequences[number] += inputs.shape[0] if inputs.dim() > 2 else 1
        inputs = inputs.reshape(-1, columns).float()
        # Only the upper triangle is needed. It is updated in strips, because a product of full size would need as much
        # memory again as the Hessian.
        for start in range(0, columns, _STRIP):
            self._sums[number][start : start + _STRIP, start:] += (
                inputs[:, start : start + _STRIP].T @ inputs[:, start:]
            )

    def close(self, ranks: Group) -> Iterator[tuple[list[str], Tensor]]:
        """Remove the hooks, and sum the Hessians over ranks, one at a time. Collective.

        Args:
            ranks: Ranks that ran calibration text.

        Yields:
            Names of linears, and their common Hessian, symmetric, fp64 [in, in].

        Raises:
            ValueError: A linear got no token, or an input that is not finite; raised on every rank.
        """
        for handle in self._handles:
            handle.remove()
        self._last = (-1, None)
        names = list(self._linears)
        leaders = ranks.max(torch.tensor(list(self._leader.values())))
        counts = ranks.sum(torch.tensor(list(self._sequences.values()))).tolist()
        for number, name in enumerate(names):
            if leaders[number] == -1:
                raise ValueError(no_tokens(name))
        for number, name in enumerate(names):
            if leaders[number] == number:
                weight = self._linears[name].as_rows()
                total = self._sums.pop(number, None)
                if total is None:
                    total = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
                if ranks.size > 1:
                    rows = max(1, (1 << 22) // len(total))
                    for start in range(0, len(total), rows):  # in strips too; ranks are added in a fixed order
                        total[start : start + rows] = ranks.stack(total[start : start + rows]).sum(dim=0)
                total.triu_().mul_(2 / counts[number])
                total += total.triu(1).T
                if not total.isfinite().all():
                    raise ValueError(not_finite(name))
                yield [other for other, leader in zip(names, leaders.tolist(), strict=True) if leader == number], total


class ExpertHessians:
    """Accumulates the Hessian of each expert of one fused weight, over the tokens that are routed to it."""

    def __init__(self, target: ExpertWeight) -> None:
        experts, _, columns = target.weight.shape
        self._sums = torch.zeros(experts, columns, columns, dtype=torch.float64, device=target.weight.device)
        self._tokens = torch.zeros(experts, dtype=torch.int64)
        self._end = watch_inputs(target, self._add)

    def _add(self, inputs: Tensor, ends: list[int]) -> None:
        for expert, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
            part = inputs[begin:end].detach().float()
            self._sums[expert] += part.T @ part
            self._tokens[expert] += len(part)

    def close(self, name: str, ranks: Group) -> Iterator[Tensor]:
        """Remove the hooks, and sum the Hessians over ranks, one expert at a time. Collective.

        Args:
            name: Name of the weight, for messages.
            ranks: Ranks that ran calibration text.

        Yields:
            The Hessian of each expert, fp64 [in, in], divided by its number of tokens; the scale does not affect
            pruning. An expert that got no token has the mean of the others', with a warning.

        Raises:
            ValueError: No expert got a token, or an input is not finite; raised on every rank.
        """
        self._end()
        tokens = ranks.sum(self._tokens)
        if int(tokens.sum()) == 0:
            raise ValueError(no_tokens(name))
        if ranks.size > 1:
            for expert, own in enumerate(self._sums):
                self._sums[expert] = ranks.stack(own).sum(dim=0)  # added in the order of the ranks
        if not self._sums.isfinite().all():
            raise ValueError(not_finite(name))
        unused = tokens == 0
        if unused.any():
            log.warning(unused_experts(name, unused))
            self._sums[unused] = self._sums.sum(0) / tokens.sum()
            tokens = tokens.clamp_min(1)
        for own, count in zip(self._sums, tokens.tolist(), strict=True):
            yield own * (2 / count)


def inverse_factor(hessian: Tensor, dampening: float, name: str) -> tuple[Tensor, Tensor]:
    """Compute the upper Cholesky factor of the inverse of a dampened Hessian.

    Args:
        hessian: The Hessian, fp64 [in, in]; it is changed.
        dampening: Share of the mean diagonal that is added to the diagonal. If the Hessian cannot be inverted, 10 and
            100 times as much is tried.
        name: Name of the linear, for messages.

    Returns:
        The factor, fp32 [in, in]; and True for inputs that were always 0, bool [in].

    Raises:
        ValueError: All inputs were 0, or the Hessian cannot be inverted.
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    if bool(dead.all()):
        raise ValueError(
            f"every input of {name} was 0 in all of the calibration text: leave it out with --targets, or use "
            "--method magnitude without --compensate"
        )
    diagonal[dead] = 1
    mean, added = float(diagonal.mean()), 0.0
    for power in range(_RAISES + 1):
        share = dampening * 10**power
        diagonal += share * mean - added
        added = share * mean
        factor = _factor(hessian)
        if factor is not None:
            if power:
                log.warning(
                    "%s: its Hessian could be inverted only with dampening %g instead of %g", name, share, dampening
                )
            return factor, dead
    raise ValueError(
        f"the Hessian of {name} cannot be inverted, also with dampening {share:g}: use more calibration text "
        "(--sequences), a larger --dampening, or --method wanda"
    )


def _factor(hessian: Tensor) -> Tensor | None:
    """Factor the inverse of a matrix; None if it is not positive definite, or the factor is not finite in fp32."""
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if int(failed):
        return None
    factor = torch.cholesky_inverse(factor)
    upper, failed = torch.linalg.cholesky_ex(factor, upper=True)
    factor = upper.float()
    return None if int(failed) or not factor.isfinite().all() or not (factor.diagonal() > 0).all() else factor


def sparsegpt(weight: Tensor, factor: Tensor, dead: Tensor, ranking: Ranking, ranks: Group, before: int = 0) -> Tensor:
    """Prune a rank's rows of one weight. Collective for kind "layer", otherwise local.

    Columns are pruned in blocks. After each block the errors of its columns are propagated to all later columns at
    once, in tiles of rows that are never divided between ranks, so that the result does not depend on their number.

    Args:
        weight: [own rows, in], fp32.
        factor: The factor from ``inverse_factor``, fp32 [in, in].
        dead: True for inputs that are always 0, whose weights become 0, bool [in].
        ranking: Rule for the selection within each block of columns. The width of a block is a multiple of a pattern's
            M.
        ranks: Ranks that own the other rows.
        before: Number of weights of the same fused weight that were pruned before (earlier experts). Counts are rounded
            such that the total over all blocks and experts is exact.

    Returns:
        The pruned weights, with the remaining ones changed, fp32 [own rows, in].
    """
    weight = weight.masked_fill(dead, 0.0)
    rows, columns = weight.shape
    total_rows = int(ranks.sum(torch.tensor([rows])))
    width = ranking.kept_of[1] if ranking.kept_of is not None else 1
    block = max(BLOCK // width * width, width)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        count = None
        if width == 1:  # differences of rounded totals, so that the blocks together have exactly the total
            per, base = (total_rows, before) if ranking.kind == "layer" else (1, 0)
            upto = [num_pruned(ranking.sparsity, base + per * column) for column in (start, stop)]
            count = upto[1] - upto[0]
        pruned, errors = _block(weight[:, start:stop].clone(), factor[start:stop, start:stop], ranking, count, ranks)
        weight[:, start:stop] = pruned
        for first in range(0, rows, TILE):
            part = slice(first, first + TILE)
            weight[part, stop:] -= errors[part] @ factor[start:stop, stop:]
    return weight


def _block(weight: Tensor, factor: Tensor, ranking: Ranking, count: int | None, ranks: Group) -> tuple[Tensor, Tensor]:
    """Prune one block of columns.

    With a pattern, each group of M columns is selected when its first column is reached, since earlier columns of the
    block have changed its weights; otherwise the whole block is selected at once.

    Returns:
        The pruned weights, and the errors that later columns compensate for, both [own rows, columns].
    """
    diagonal = factor.diagonal()
    pruned, errors = torch.zeros_like(weight), torch.zeros_like(weight)
    width = ranking.kept_of[1] if ranking.kept_of is not None else 0
    if not width:
        selected = select_pruned((weight / diagonal).square(), weight, ranking, ranks, count)
    for column in range(weight.shape[1]):
        if width and column % width == 0:
            part = slice(column, column + width)
            chosen = select_pruned((weight[:, part] / diagonal[part]).square(), weight[:, part], ranking, ranks)
        here = chosen[:, column % width] if width else selected[:, column]
        old = weight[:, column]
        pruned[:, column] = old.masked_fill(here, 0.0)
        errors[:, column] = (old - pruned[:, column]) / diagonal[column]
        weight[:, column:] -= errors[:, column, None] * factor[column, column:]
    return pruned, errors
