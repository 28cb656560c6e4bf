"""SparseGPT: column by column, a weight that goes is made up for by those that follow it in its row.

Source: Frantar, Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", arXiv 2301.00774.
Rows do not know of each other once the Hessian is there, so each rank prunes its own.
"""

import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from seft_dist.backends.group import Group
from seft_dist.modules.kinds import ExpertWeight, Target
from seft_dist.pruning.masks import TILE, Ranking, choose, num_pruned
from seft_dist.pruning.wanda import no_tokens, not_finite, unused_experts
from seft_dist.pruning.watch import watch_inputs

log = logging.getLogger(__name__)

BLOCK = 128
"""Columns whose updates of later columns are collected and applied at once."""
_STRIP = 1024
_RAISES = 2


class Hessians:
    """2/n X X^T of the inputs of linears over all n sequences that pass, on any rank, while it listens.

    Linears that are given one and the same tensor (q, k and v) share a Hessian. Sums are kept in fp64, so that how the
    sequences are spread over ranks is lost in the rounding to fp32.
    """

    def __init__(self, linears: dict[str, Target]) -> None:
        """Args:
        linears: Names and linears of one decoder layer, the same on every rank.
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
        def listen(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            leader, seen = self._last
            shared = args[0] is seen
            if self._leader[name] == -1:
                self._leader[name] = leader if shared else number
            if shared != (self._leader[name] != number):
                raise ValueError(f"{name} shares its input with another linear at times only: use --method wanda")
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
        for start in range(0, columns, _STRIP):  # the upper triangle, in strips: no second matrix of this size
            self._sums[number][start : start + _STRIP, start:] += (
                inputs[:, start : start + _STRIP].T @ inputs[:, start:]
            )

    def close(self, ranks: Group) -> Iterator[tuple[list[str], Tensor]]:
        """Stop listening and put all ranks' sequences together, one Hessian at a time. Collective.

        Args:
            ranks: Who ran calibration text.

        Yields:
            Names of linears, and their Hessian: [in, in], fp64, symmetric.

        Raises:
            ValueError: No token came by, or an input was not finite; on every rank.
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
                    for start in range(0, len(total), rows):  # strips again, added in the order of the ranks
                        total[start : start + rows] = ranks.stack(total[start : start + rows]).sum(dim=0)
                total.triu_().mul_(2 / counts[number])
                total += total.triu(1).T
                if not total.isfinite().all():
                    raise ValueError(not_finite(name))
                yield [other for other, leader in zip(names, leaders.tolist(), strict=True) if leader == number], total


class ExpertHessians:
    """The same for each expert of one fused weight, over the tokens that chose it, while it listens."""

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
        """Stop listening and put all ranks' tokens together, one expert at a time. Collective.

        Args:
            name: Of the weight, for messages.
            ranks: Who ran calibration text.

        Yields:
            The Hessian of each expert, fp64 [in, in]; scaled by its number of tokens, which nothing depends on. One that no
            token chose gets the mean of the others', with a warning.

        Raises:
            ValueError: No token came by, or an input was not finite; on every rank.
        """
        self._end()
        tokens = ranks.sum(self._tokens)
        if int(tokens.sum()) == 0:
            raise ValueError(no_tokens(name))
        if ranks.size > 1:
            for expert, own in enumerate(self._sums):
                self._sums[expert] = ranks.stack(own).sum(dim=0)  # in the order of the ranks
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
    """The upper Cholesky factor of the inverse of a dampened Hessian.

    Args:
        hessian: [in, in], fp64; changed.
        dampening: Share of the mean diagonal to add; where that is not enough, 10 and 100 times as much is tried.
        name: Of the linear, for messages.

    Returns:
        The factor, fp32 [in, in], and bool [in], True for inputs that were always 0.

    Raises:
        ValueError: It cannot be inverted.
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    if bool(dead.all()):
        raise ValueError(
            f"every input of {name} was 0 in all of the calibration text: leave it out with --targets, or use "
            "--method magnitude"
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
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if int(failed):
        return None
    factor = torch.cholesky_inverse(factor)
    upper, failed = torch.linalg.cholesky_ex(factor, upper=True)
    factor = upper.float()
    return None if int(failed) or not factor.isfinite().all() or not (factor.diagonal() > 0).all() else factor


def sparsegpt(weight: Tensor, factor: Tensor, dead: Tensor, ranking: Ranking, ranks: Group, before: int = 0) -> Tensor:
    """Prune a rank's rows of one weight. Collective for kind "layer", else local.

    Args:
        weight: [own rows, in], fp32.
        factor: From ``inverse_factor``, fp32 [in, in].
        dead: bool [in]; weights of such inputs become 0.
        ranking: How weights are ranked, inside each block of columns. A pattern's M also ends the blocks.
        ranks: Who owns the other rows.
        before: Weights of the same whole that were pruned before (other experts); they decide how counts are rounded.

    Returns:
        [own rows, in], fp32: zeros and changed weights.
    """
    weight = weight.masked_fill(dead, 0.0)
    rows, columns = weight.shape
    total_rows = int(ranks.sum(torch.tensor([rows])))
    width = ranking.kept_of[1] if ranking.kept_of is not None else 1
    block = max(BLOCK // width * width, width)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        count = None
        if width == 1:  # rounded so that the blocks together have exactly the number of the whole
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
    """One block of columns: its pruned weights, and the errors that later blocks make up for."""
    diagonal = factor.diagonal()
    pruned, errors = torch.zeros_like(weight), torch.zeros_like(weight)
    width = ranking.kept_of[1] if ranking.kept_of is not None else 0
    if not width:
        gone = choose((weight / diagonal).square(), weight, ranking, ranks, count)
    for column in range(weight.shape[1]):
        if width and column % width == 0:
            part = slice(column, column + width)
            chosen = choose((weight[:, part] / diagonal[part]).square(), weight[:, part], ranking, ranks)
        here = chosen[:, column % width] if width else gone[:, column]
        old = weight[:, column]
        pruned[:, column] = old.masked_fill(here, 0.0)
        errors[:, column] = (old - pruned[:, column]) / diagonal[column]
        weight[:, column:] -= errors[:, column, None] * factor[column, column:]
    return pruned, errors
