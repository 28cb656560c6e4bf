"""Curvature: a weight is scored by how much the loss rises without it, in a second-order estimate.

Without weight w_ij the loss of a trained model rises by about h_ij w_ij^2 / 2. The diagonal h of the Hessian is
estimated by that of the Fisher matrix in Kronecker factors: h_ij = (sum over tokens of the squared gradient of output
i) x (sum over tokens of the squared input j). So the score is Wanda's, times the norm of the output's gradient, and can
be compared between outputs and between layers.

Sources: LeCun, Denker, Solla, "Optimal Brain Damage", 1989; Martens, Grosse, "Optimizing Neural Networks with
Kronecker-factored Approximate Curvature", arXiv 1503.05671.
"""

import torch
from torch import Tensor

from seft_dist.backends.group import Group
from seft_dist.modules.kinds import Target
from seft_dist.pruning.watch import watch_calls


class OutputGradientNorm:
    """Measures the L2 norm of the gradient of each output feature of one target, over all tokens on all ranks.

    The outputs of forward passes are observed until ``close``; their gradients come with the backward passes. Each of
    several fused experts has its own norms.
    """

    def __init__(self, target: Target) -> None:
        self._rows, self._experts = target.matrix_shape[0], target.num_experts
        self._terms: list[Tensor] = []
        self._empty = torch.zeros(0, dtype=torch.float64, device=target.weight.device)
        self._end = watch_calls(target, self._follow)

    def _follow(self, inputs: Tensor, outputs: Tensor, ends: list[int]) -> None:
        sizes = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]

        def count(grad: Tensor) -> None:
            parts = grad.reshape(-1, grad.shape[-1]).split(sizes)
            self._terms.append(torch.cat([part.float().square().sum(0, dtype=torch.float64) for part in parts]))

        outputs.register_hook(count)

    def close(self, name: str, ranks: Group) -> Tensor:
        """Stop observing, and combine the tokens of all ranks, in the order of the batches. Collective.

        Args:
            name: Name of the target, for messages.
            ranks: Ranks that ran calibration text.

        Returns:
            The norms, fp32 [out], with the same bits on every rank; fused experts: [experts * out]. An expert that got
            no token has the mean norm of the others, as its inputs do.

        Raises:
            ValueError: A gradient is not finite, or all are 0; raised on every rank.
        """
        self._end()
        terms = torch.cat(ranks.gather(torch.cat([self._empty, *self._terms]))).view(-1, self._rows)
        norm = terms.sum(dim=0).sqrt().float()
        if not norm.isfinite().all() or not norm.any():
            kind = "all 0" if norm.isfinite().all() else "not finite"
            raise ValueError(
                f"gradients behind {name} are {kind}: try --model.dtype float32, check the model, or use "
                "--method wanda, which needs no gradient"
            )
        by_expert = norm.view(self._experts, -1)
        unused = ~by_expert.any(1)
        by_expert[unused] = by_expert[~unused].mean(0)
        return norm
