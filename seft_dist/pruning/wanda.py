"""Wanda: a weight is scored by its absolute value times the norm of its input.

Source: Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695.
"""

import logging

import torch
from torch import Tensor

from seft_dist.backends.group import Group
from seft_dist.modules.kinds import Target
from seft_dist.pruning.watch import watch_inputs

log = logging.getLogger(__name__)


class InputNorm:
    """Measures the L2 norm of each input feature of one target, over all tokens on all ranks.

    Forward hooks observe the inputs until ``close``. Each of several fused experts has its own norms, over the tokens
    that are routed to it.
    """

    def __init__(self, target: Target) -> None:
        self._rows, self._columns = target.matrix_shape
        self._experts = target.num_experts
        self._terms: list[Tensor] = []
        self._tokens = torch.zeros(self._experts, dtype=torch.int64)
        self._empty = torch.zeros(0, dtype=torch.float64, device=target.weight.device)
        self._end = watch_inputs(target, self._count)

    def _count(self, inputs: Tensor, ends: list[int]) -> None:
        sizes = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
        self._tokens += torch.tensor(sizes)
        squares = [part.float().square().sum(dim=0, dtype=torch.float64) for part in inputs.detach().split(sizes)]
        self._terms.append(torch.cat(squares))

    def close(self, name: str, ranks: Group) -> Tensor:
        """Remove the hooks, and combine the tokens of all ranks. Collective.

        The sums of squares of the batches are added in the order of the batches, no matter which rank ran them, so the
        bits do not depend on the number of ranks.

        Args:
            name: Name of the target, for messages.
            ranks: Ranks that ran calibration text.

        Returns:
            The norms, fp32, with the same bits on every rank: [in], or with fused experts [experts * out, in], a row
            for each row of the weight. An expert that got no token has the mean norm of the others, with a warning.

        Raises:
            ValueError: The target got no token, or an input that is not finite; raised on every rank.
        """
        self._end()
        width = self._experts * self._columns
        terms = torch.cat(ranks.gather(torch.cat([self._empty, *self._terms]))).view(-1, width)
        tokens = ranks.sum(self._tokens)
        if int(tokens.sum()) == 0:
            raise ValueError(no_tokens(name))
        norm = terms.sum(dim=0).sqrt().float()
        if not norm.isfinite().all():
            raise ValueError(not_finite(name))
        if self._experts == 1:
            return norm
        norm, unused = norm.view(self._experts, self._columns), tokens == 0
        if unused.any():
            norm[unused] = norm[~unused].mean(0)
            log.warning(unused_experts(name, unused))
        return norm.repeat_interleave(self._rows // self._experts, dim=0)


def no_tokens(name: str) -> str:
    """Message for a linear that was never used."""
    return (
        f"no calibration token reached {name}: leave it out with --targets, or use --method magnitude without "
        "--compensate"
    )


def unused_experts(name: str, unused: Tensor) -> str:
    """Message for experts that got no token, marked as True in ``unused``, bool [experts]."""
    return (
        f"{name}: no calibration token chose experts {unused.nonzero().view(-1).tolist()}: they are pruned by the "
        "inputs of the others; use more calibration text (--sequences)"
    )


def not_finite(name: str) -> str:
    """Message for a linear with inputs that are inf or NaN."""
    return f"inputs of {name} are not finite: try --model.dtype float32, or check the model"


def wanda_scores(weight: Tensor, norm: Tensor) -> Tensor:
    """Score weights by their absolute values times the norms of their inputs.

    Args:
        weight: [out, in], of any floating-point dtype.
        norm: Norm of each input, fp32 [in], or of each input for each row, fp32 [out, in]. It is 0 for a dead input,
            whose weights are pruned first.

    Returns:
        [out, in], fp32, not negative.
    """
    return weight.detach().float().abs() * norm
