"""The deltas a rank owns, as columns, and where all ranks' deltas are.

layer        0            1                  layers lie one after another in every column;
indices   3 7 20 41    0 5 6                 inside a layer, entries are sorted by position
values    . .  .  .    . . .
"""

import itertools
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from seft_dist.backends.group import Group
from seft_dist.kernels.adamw import AdamW
from seft_dist.kernels.sampled import row_bounds


@dataclass
class Columns:
    """Entries of the support in this rank's intervals, [k] each, k over all layers."""

    indices: Tensor
    """int32, flat positions in the whole weight."""
    base: Tensor
    """fp32, the frozen weight below the delta."""
    values: Tensor
    """fp32, the delta."""
    exp_avg: Tensor
    """fp32, first Adam moment."""
    exp_avg_sq: Tensor
    """fp32, second Adam moment."""
    age: Tensor
    """int32, updates since the entry was grown (for the bias correction)."""

    @classmethod
    def empty(cls, device: torch.device) -> "Columns":
        """No entries. Local."""
        kinds = {"indices": torch.int32, "age": torch.int32}
        return cls(
            **{f.name: torch.empty(0, dtype=kinds.get(f.name, torch.float32), device=device) for f in fields(cls)}
        )

    @classmethod
    def grown(cls, indices: Tensor, base: Tensor) -> "Columns":
        """New entries: delta, moments and age 0. Local.

        Args:
            indices: int64 [k], flat positions.
            base: fp32 [k].
        """
        age = torch.zeros_like(indices, dtype=torch.int32)
        values, exp_avg, exp_avg_sq = (torch.zeros_like(base) for _ in range(3))
        return cls(indices.to(torch.int32), base, values, exp_avg, exp_avg_sq, age)

    def __len__(self) -> int:
        return self.indices.numel()

    def take(self, which: Tensor | slice) -> "Columns":
        """The entries that an index, a mask or a slice names. Local."""
        return Columns(**{f.name: getattr(self, f.name)[which] for f in fields(self)})

    @staticmethod
    def cat(parts: list["Columns"]) -> "Columns":
        """Entries of several, in their order. Local."""
        return Columns(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Columns)})

    def sorted(self) -> "Columns":
        """The entries by position. Local."""
        return self.take(self.indices.argsort())

    def weight(self) -> Tensor:
        """base + delta, fp32 [k]. Local."""
        return self.base + self.values

    def update_(self, grad: Tensor, scale: Tensor, ok: Tensor, rule: AdamW) -> Tensor:
        """One step of AdamW (``AdamW.update_``). Local.

        Returns:
            fp32 [k], ``weight()`` after it.
        """
        moments = [self.exp_avg, self.exp_avg_sq]
        return rule.update_(grad, scale, ok, self.base, self.values, moments, self.age)


class Support:
    """Positions of all ranks' deltas in one weight, as the rows and columns that a sampled gradient needs."""

    def __init__(self, shape: tuple[int, int], parts: list[Tensor]) -> None:
        """Args:
        shape: [out, in] of the weight.
        parts: Each owner's positions, int32, sorted, in rank order.
        """
        self.shape = shape
        self.sizes = [part.numel() for part in parts]
        """Entries of each owner."""
        positions = torch.cat(parts)
        rows = torch.bincount(positions // shape[1], minlength=shape[0])
        self.crow = torch.nn.functional.pad(rows.cumsum(0), (1, 0)).to(torch.int32)
        """int32 [out + 1], where each row's entries begin."""
        self.col = (positions % shape[1]).to(torch.int32)
        """int32 [len], input feature of each entry."""
        self.bounds = row_bounds(shape, self.crow)
        """Where blocks of rows begin, on the host: so that no step has to wait for the device to say so."""
        self._blocks: list[Support] = []

    def __len__(self) -> int:
        return self.col.numel()

    def blocks(self, count: int) -> list["Support"]:
        """The entries of each of ``count`` equal blocks of rows, numbered from the block's first row on (views). Local."""
        if len(self._blocks) != count:  # the first of an evolution's steps waits for the device
            rows, crow = self.shape[0] // count, self.crow.cpu()
            bounds = crow[::rows].tolist()
            self._blocks = []
            for block, (begin, end) in enumerate(itertools.pairwise(bounds)):
                part = Support.__new__(Support)
                part.shape, part.sizes = (rows, self.shape[1]), [end - begin]
                inside = slice(block * rows, (block + 1) * rows + 1)
                part.crow, part.col = self.crow[inside] - begin, self.col[begin:end]
                part.bounds, part._blocks = row_bounds(part.shape, crow[inside] - begin), []
                self._blocks.append(part)
        return self._blocks

    def positions(self) -> Tensor:
        """Flat positions, int64 [len], increasing. Local."""
        rows = torch.arange(self.shape[0], device=self.col.device)
        return rows.repeat_interleave(self.crow.diff()) * self.shape[1] + self.col


def gather_supports(group: Group, indices: Tensor, lengths: list[int], shapes: list[tuple[int, int]]) -> list[Support]:
    """Tell every rank all positions of all layers. **Collective**.

    Args:
        group: The owners.
        indices: int32, this rank's positions, sorted in each layer, layers one after another.
        lengths: How many of them each layer has.
        shapes: [out, in] of each layer.

    Returns:
        Each layer's positions.
    """
    table = group.stack(torch.tensor(lengths)).tolist()
    parts = [positions.split(table[rank]) for rank, positions in enumerate(group.gather(indices))]
    return [Support(shape, [part[layer] for part in parts]) for layer, shape in enumerate(shapes)]
