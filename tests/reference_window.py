"""Window statistics of tests/reference.py, written from the description of each ``window_store``."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Window:
    """Sums of a layer's gradients over the steps of a window, before clipping."""

    gradient: Tensor
    square: Tensor
    rows: Tensor
    columns: Tensor
    inputs: Tensor
    outputs: Tensor
    known: Tensor
    store: str
    steps: int = 0

    @classmethod
    def empty(cls, weight: Tensor, store: str) -> "Window":
        rows, columns = weight.shape
        return cls(
            torch.zeros(rows, columns),
            torch.zeros(rows, columns),
            torch.zeros(rows, 1),
            torch.zeros(1, columns),
            torch.zeros(columns),
            torch.zeros(rows),
            torch.ones(rows, columns, dtype=torch.bool),
            store,
        )

    @property
    def score(self) -> Tensor:
        """Statistic that is used in place of the gradient when positions are ranked."""
        return (self.outputs.view(-1, 1) * self.inputs).sqrt() if self.store == "factored" else self.gradient

    def _stored(self, value: Tensor) -> Tensor:
        return value.bfloat16().float() if self.store == "bf16" else value

    def add(self, gradient: Tensor, inputs: Tensor, outputs: Tensor) -> None:
        self.steps += 1
        gradient = self._stored(gradient)
        self.gradient = torch.where(self.known, self._stored(self.gradient + gradient), 0.0)
        self.square = self._stored(self.square + gradient**2)
        estimate = torch.minimum(self.rows, self.columns) + gradient**2  # SM3-II
        self.rows = estimate.amax(dim=1, keepdim=True)
        self.columns = estimate.amax(dim=0, keepdim=True)
        self.inputs, self.outputs = self.inputs + inputs, self.outputs + outputs


def cut(price: float) -> float:
    """A price without its last bit, fp32."""
    return float((torch.tensor(price).view(torch.int32) & ~1).view(torch.float32))
