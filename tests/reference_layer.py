"""One target of tests/reference.py: every position of its weight has a slot in every tensor."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seft_dist.config import SeftConfig
from tests.reference_window import Window


@dataclass
class Layer:
    """One target linear; all tensors have its weight's shape."""

    module: nn.Linear
    budget: int
    base: Tensor
    mask: Tensor
    support: Tensor
    delta: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    age: Tensor
    target: int
    first_mask: Tensor
    window: Window
    inputs: Tensor
    outputs: Tensor
    grown: Tensor
    dropped: Tensor
    removed: Tensor
    trial: Tensor
    returned: Tensor

    @classmethod
    def of(cls, module: nn.Linear, config: SeftConfig) -> "Layer":
        base = module.weight.detach().clone()
        mask = base != 0
        none = torch.zeros_like(mask)
        zero = torch.zeros(base.shape)
        return cls(
            module=module,
            budget=min(math.floor(config.density * base.numel() + 0.5), int(mask.sum())),
            base=base,
            mask=mask,
            support=none,
            delta=zero,
            exp_avg=zero,
            exp_avg_sq=zero,
            age=torch.zeros(base.shape, dtype=torch.int64),
            target=int(mask.sum()),
            first_mask=mask,
            window=Window.empty(base, config.window_store),
            inputs=torch.zeros(base.shape[1]),
            outputs=torch.zeros(base.shape[0]),
            grown=none,
            dropped=none,
            removed=none,
            trial=none,
            returned=none,
        )

    @property
    def value(self) -> Tensor:
        """The weight before any cast."""
        return torch.where(self.support, self.base.float() + self.delta, self.base.float())

    @property
    def positions(self) -> Tensor:
        return torch.arange(self.base.numel()).view(self.base.shape)

    def prune(self, which: Tensor) -> None:
        """Take positions out of the mask, and with it out of the support."""
        self.removed, self.mask = which, self.mask & ~which
        self.base = torch.where(which, 0.0, self.base)
        self.leave(which)

    def leave(self, which: Tensor) -> None:
        """Entries leave the support and forget everything."""
        self.support = self.support & ~which
        for name in ("delta", "exp_avg", "exp_avg_sq"):
            setattr(self, name, torch.where(which, 0.0, getattr(self, name)))
        self.age = torch.where(which, 0, self.age)

    def write(self) -> None:
        assert not self.value[~self.mask].any()
        with torch.no_grad():
            self.module.weight.copy_(self.value)
