"""Adapters inside the linear: each pass computes its weight from the frozen one and two small trained matrices.

    masked_lora    W + mask * (B A) alpha / r            A [r, in], B [out, r]
    spp            W + W * (A' c) alpha / r              A [r, in], each row for out / r rows of W; c [out]

Where W is 0, both are 0. The computed weight and its gradient live only as long as one linear's pass; backward computes
the weight again, just as the engines gather the frozen weight again.

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
from seft_dist.baselines.baseline import Baseline, FinalizeInputs
from seft_dist.baselines.trained import keep_active_
from seft_dist.sparsity.casts import cast_weight


class AdaptedLinears(Baseline):
    """A method whose linears use the weight ``combined(W, product(A, B))``."""

    supported_kinds = ("Linear",)
    config_fields = ("rank", "alpha", "seed")

    @property
    def scale(self) -> float:
        """Scale alpha / rank of the added matrix."""
        return self.config.baseline.alpha / self.config.baseline.rank

    @abstractmethod
    def adapter_shapes(self, rows: int, columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B for a weight [rows, columns]. A is initialised as LoRA's A, B with zeros."""

    @abstractmethod
    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Multiply A and B, and by ``scale``, to fp32 [out, in]. Differentiable."""

    @staticmethod
    @abstractmethod
    def combined(weight: Tensor, product: Tensor) -> Tensor:
        """Apply the product to the frozen weight, both fp32 of one shape. Differentiable; may change the product."""

    def install(self) -> dict[str, nn.Parameter]:
        parameters: dict[str, nn.Parameter] = {}
        for name, target in self.targets.items():
            rows, columns = whole_shape(target.weight)
            shapes = self.adapter_shapes(rows, columns)
            a = nn.init.kaiming_uniform_(torch.empty(shapes[0]), a=5**0.5)
            pair = [nn.Parameter(values.to(self.backend.device)) for values in (a, torch.zeros(shapes[1]))]
            parameters |= {f"{name}.A": pair[0], f"{name}.B": pair[1]}
            target.module.forward = _forward(target.module, pair[0], pair[1], self)
        return parameters

    def finalize(self, inputs: FinalizeInputs) -> dict[str, Any]:
        values = {part.name: part.values.view(part.parameter.shape) for part in self.trained.parts}
        with self.backend.writing():
            for name, target in self.targets.items():
                held, start = stored_part(target.weight)
                product = self.product(values[f"{name}.A"], values[f"{name}.B"])
                merged = self.combined(held.float(), product.view(-1)[start : start + held.numel()])
                keep_active_(merged, held != 0, held.dtype)
                merged.masked_fill_(held == 0, 0.0)  # not -0.0
                held.copy_(cast_weight(merged, held.dtype)[0])
                target.unbind_forward()
        return {}


class MaskedLora(AdaptedLinears):
    """SparsePEFT of SQFT: low-rank matrices under the mask."""

    def adapter_shapes(self, rows: int, columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        rank = self.config.baseline.rank
        return (rank, columns), (rows, rank)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return (b * self.scale) @ a

    @staticmethod
    def combined(weight: Tensor, product: Tensor) -> Tensor:
        # In place, and by a product: a bool mask with a random pattern costs a CPU many times as much. Where the
        # product is not finite zeros become NaN; then the gradients are not finite either, and the step is refused.
        return product.mul_(torch.ne(weight, 0, out=torch.empty_like(weight))).add_(weight)


class Spp(AdaptedLinears):
    """SPP: each active weight times 1 + a column's scaling times a row's."""

    def adapter_shapes(self, rows: int, columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        rank = self.config.baseline.rank
        if rank > rows:
            raise ValueError(f"baseline.rank={rank} with a target of {rows} rows: needs at most as many for spp")
        return (rank, columns), (rows, 1)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        row_of_a = torch.arange(len(b), device=b.device) * len(a) // len(b)  # for each row of the weight
        return a[row_of_a] * b * self.scale

    @staticmethod
    def combined(weight: Tensor, product: Tensor) -> Tensor:
        return weight + weight * product


def _forward(target: nn.Linear, a: nn.Parameter, b: nn.Parameter, method: AdaptedLinears) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        output: Tensor = _AdaptedLinear.apply(x, target.weight, target.bias, a, b, method)
        return output

    return forward


def _effective(weight: Tensor, a: Tensor, b: Tensor, method: AdaptedLinears) -> Tensor:
    return method.combined(weight.detach().float(), method.product(a, b)).to(weight.dtype)


class _AdaptedLinear(torch.autograd.Function):
    """y = x effective(W, A, B)^T + bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, method: AdaptedLinears
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
        weight_grad = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        grads = torch.autograd.grad(effective, trained, weight_grad)
        return input_grad, None, None, *grads, None
