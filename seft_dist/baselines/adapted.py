"""Linears that compute with a weight made anew in each pass, from the frozen one and a few trained values.

    masked_lora    W + mask * (B A) alpha / r            A [r, in], B [out, r]
    spp            W + W * (A' c) alpha / r              A [r, in], each row for out / r rows of W; c [out]

Zeros of W are zeros of both. Neither the weight that is computed with nor its gradient outlives a linear's pass;
backward makes it again, as engines gather the frozen weight again.

Sources: Munoz, Yuan, Jain, "SQFT: Low-cost Model Adaptation in Low-precision Sparse Foundation Models", arXiv
    2410.03750 (SparsePEFT); Lu, Zhou, Xu, Zhang, Gao, Li, "SPP: Sparsity-Preserved Parameter-Efficient Fine-Tuning
    for Large Language Models", arXiv 2405.16057.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from seft_dist.backends.shards import stored_part, whole_shape
from seft_dist.baselines.baseline import Baseline, Ending
from seft_dist.baselines.values import keep_active_
from seft_dist.sparsity.casts import cast_weight


class Adapted(Baseline):
    """A method whose linears compute with ``combined(W, factor(A, B))``."""

    takes = ("Linear",)
    settings = ("rank", "alpha", "seed")

    @property
    def scale(self) -> float:
        """Scale alpha / rank of the added matrix."""
        return self.config.baseline.alpha / self.config.baseline.rank

    @abstractmethod
    def shapes(self, rows: int, columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A, which begins as in LoRA, and B, which begins as 0, for a weight [rows, columns]."""

    @abstractmethod
    def factor(self, a: Tensor, b: Tensor) -> Tensor:
        """Compute the factor, fp32 [out, in], from A and B. Differentiable."""

    @staticmethod
    @abstractmethod
    def combined(weight: Tensor, factor: Tensor) -> Tensor:
        """Combine the frozen fp32 weight and the factor, of equal shape, into the weight to use. Differentiable."""

    def install(self) -> dict[str, nn.Parameter]:
        parameters: dict[str, nn.Parameter] = {}
        for name, target in self.targets.items():
            rows, columns = whole_shape(target.weight)
            shapes = self.shapes(rows, columns)
            a = nn.init.kaiming_uniform_(torch.empty(shapes[0]), a=5**0.5)
            pair = [nn.Parameter(values.to(self.backend.device)) for values in (a, torch.zeros(shapes[1]))]
            parameters |= {f"{name}.A": pair[0], f"{name}.B": pair[1]}
            target.module.forward = _forward(target.module, pair[0], pair[1], self)
        return parameters

    def finalize(self, ending: Ending) -> dict[str, Any]:
        values = {part.name: part.values.view(part.parameter.shape) for part in self.values.parts}
        with self.backend.writing():
            for name, target in self.targets.items():
                held, start = stored_part(target.weight)
                factor = self.factor(values[f"{name}.A"], values[f"{name}.B"])
                merged = self.combined(held.float(), factor.view(-1)[start : start + held.numel()])
                keep_active_(merged, held != 0, held.dtype)
                merged.masked_fill_(held == 0, 0.0)  # no -0.0
                held.copy_(cast_weight(merged, held.dtype)[0])
                target.unbind_forward()
        return {}


class MaskedLora(Adapted):
    """SparsePEFT of SQFT: low-rank matrices under the mask."""

    def shapes(self, rows: int, columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        rank = self.config.baseline.rank
        return (rank, columns), (rows, rank)

    def factor(self, a: Tensor, b: Tensor) -> Tensor:
        return (b @ a) * self.scale

    @staticmethod
    def combined(weight: Tensor, factor: Tensor) -> Tensor:
        return weight + factor.masked_fill(weight == 0, 0.0)


class Spp(Adapted):
    """SPP: each active weight times 1 + a column's scaling times a row's."""

    def shapes(self, rows: int, columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        rank = self.config.baseline.rank
        if rank > rows:
            raise ValueError(f"baseline.rank={rank} with a target of {rows} rows: needs at most as many for spp")
        return (rank, columns), (rows, 1)

    def factor(self, a: Tensor, b: Tensor) -> Tensor:
        each = torch.arange(len(b), device=b.device) * len(a) // len(b)  # row of A for each row of the weight
        return a[each] * b * self.scale

    @staticmethod
    def combined(weight: Tensor, factor: Tensor) -> Tensor:
        return weight + weight * factor


def _forward(target: nn.Linear, a: nn.Parameter, b: nn.Parameter, method: Adapted) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        output: Tensor = _AdaptedLinear.apply(x, target.weight, target.bias, a, b, method)
        return output

    return forward


def _effective(weight: Tensor, a: Tensor, b: Tensor, method: Adapted) -> Tensor:
    return method.combined(weight.detach().float(), method.factor(a, b)).to(weight.dtype)


class _AdaptedLinear(torch.autograd.Function):
    """y = x effective(W, A, B)^T + bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, method: Adapted
    ) -> Tensor:
        ctx.method = method
        ctx.save_for_backward(x, weight, a, b)
        return linear(x, _effective(weight, a, b, method), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        with torch.enable_grad():
            trained = a.detach().requires_grad_(), b.detach().requires_grad_()
            effective = _effective(weight, *trained, ctx.method)
        input_grad = grad @ effective.detach() if ctx.needs_input_grad[0] else None
        of_weight = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        grads = torch.autograd.grad(effective, trained, of_weight)
        return input_grad, None, None, *grads, None
