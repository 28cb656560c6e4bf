"""AdamW for entries of different ages: each one's bias is corrected by its own number of updates.

On a CPU a compiled loop reads and writes every column once; elsewhere, or without a compiler, torch does the same in
about ten passes and nothing waits for the device. Results agree to rounding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seft_dist.kernels.arguments import expect
from seft_dist.kernels.build import library


@dataclass(frozen=True)
class AdamW:
    """The rule of one step: rates, and what decays.

    Source: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decay_weight: bool
    """True if decay shrinks base + value (AdamW on the weight), False if only the value."""
    oldest: int
    """Largest age that an entry may have before the step."""

    @classmethod
    def of_group(cls, group: Mapping[str, Any], decay_weight: bool, oldest: int) -> "AdamW":
        """Make the rule of a param group of a torch optimizer, whose learning rate may be a tensor."""
        rates = {key: group[key] for key in ("betas", "eps", "weight_decay")}
        return cls(lr=float(group["lr"]), decay_weight=decay_weight, oldest=oldest, **rates)

    def update_(
        self,
        grad: Tensor,
        scale: Tensor,
        is_finite: Tensor,
        base: Tensor,
        values: Tensor,
        moments: list[Tensor],
        age: Tensor,
    ) -> Tensor:
        """Update values, moments and ages in place.

        Args:
            grad: fp32 [k].
            scale: fp32 [], the gradient is multiplied with it (clipping).
            is_finite: bool [], on the device; False leaves every bit as it is.
            base: fp32 [k], what the values are added to.
            values: fp32 [k].
            moments: First and second moments, each fp32 [k].
            age: int32 [k], number of updates so far.

        Returns:
            fp32 [k], base + values after the step.

        Raises:
            ValueError: An age is below 0 or above ``oldest``; checked on a CPU only. Nothing was changed.
        """
        if age.is_cpu and age.numel():  # it indexes a table
            low, high = int(age.numpy().min()), int(age.numpy().max())  # no wait: on a CPU only
            expect(low >= 0 and high <= self.oldest, f"ages from 0 to {self.oldest}, not {low} to {high}")
        functions = library() if values.is_cpu else None
        if functions is None:
            self._torch(torch.where(is_finite, grad * scale, 0.0), is_finite, base, values, moments, age)
            return base + values
        if not bool(is_finite):
            return base + values
        columns = [grad.contiguous(), base, values, *moments, age]
        expect(all(each.is_contiguous() and each.shape == values.shape for each in columns), "columns of one length")
        expect(all(each.is_cpu for each in columns), "columns on the CPU")
        expect(
            all(each.dtype == torch.float32 for each in columns[:-1]) and age.dtype == torch.int32, "fp32, int32 ages"
        )
        weight, (step_size, correction) = torch.empty_like(values), self._rates_by_age(values.device)
        beta1, beta2 = self.betas
        functions.adamw(
            *(len(values), float(scale), *[column.data_ptr() for column in columns]),
            *(step_size.data_ptr(), correction.data_ptr(), 1 - beta1, beta2, 1 - beta2, self.eps),
            *(self.lr * self.weight_decay, self.decay_weight, weight.data_ptr(), torch.get_num_threads()),
        )
        return weight

    def _rates_by_age(self, device: torch.device) -> tuple[Tensor, Tensor]:
        # Ages take few values: the powers are tabulated in fp64 and looked up.
        ages = torch.arange(self.oldest + 2, dtype=torch.float64, device=device)
        beta1, beta2 = self.betas
        return (self.lr / (1 - beta1**ages)).float(), (1 - beta2**ages).sqrt().float()

    def _torch(
        self, grad: Tensor, is_finite: Tensor, base: Tensor, values: Tensor, moments: list[Tensor], age: Tensor
    ) -> None:
        # Without is_finite the gradient is 0, and the rates below keep what was there.
        (mean, square), (beta1, beta2) = moments, self.betas
        age += is_finite
        if self.weight_decay:
            shrunk = base + values if self.decay_weight else values
            values.sub_(shrunk * torch.where(is_finite, self.lr * self.weight_decay, 0.0))
        mean.lerp_(grad, torch.where(is_finite, 1 - beta1, 0.0))
        square.mul_(torch.where(is_finite, beta2, 1.0)).addcmul_(grad, grad, value=1 - beta2)
        step_size, correction = self._rates_by_age(grad.device)
        step_size, correction = (
            torch.where(is_finite, step_size, 0.0)[age],
            torch.where(is_finite, correction, 1.0)[age],
        )
        values.sub_(mean.mul(step_size).div_(square.sqrt().div_(correction).add_(self.eps)))
