"""The deltas that a rank owns, as columns, and the positions of all ranks' deltas.

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
from seft_dist.sparsity.partition import position_dtype


@dataclass
class Columns:
    """Entries of the support in this rank's intervals, [k] each, k over all layers."""

    indices: Tensor
    """``Backend.position_dtype``, flat positions in the whole weight."""
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
    def empty(cls, device: torch.device, positions: torch.dtype) -> "Columns":
        """Make columns without entries.

        Args:
            device: Device of the columns.
            positions: Dtype of ``indices``.
        """
        kinds = {"indices": positions, "age": torch.int32}
        return cls(
            **{f.name: torch.empty(0, dtype=kinds.get(f.name, torch.float32), device=device) for f in fields(cls)}
        )

    @classmethod
    def grown(cls, indices: Tensor, base: Tensor) -> "Columns":
        """Make new entries, with delta, moments and age 0.

        Args:
            indices: ``Backend.position_dtype`` [k], flat positions.
            base: fp32 [k].
        """
        age = torch.zeros_like(indices, dtype=torch.int32)
        values, exp_avg, exp_avg_sq = (torch.zeros_like(base) for _ in range(3))
        return cls(indices, base, values, exp_avg, exp_avg_sq, age)

    def __len__(self) -> int:
        return self.indices.numel()

    def take(self, which: Tensor | slice) -> "Columns":
        """Select entries by an index, a mask or a slice."""
        return Columns(**{f.name: getattr(self, f.name)[which] for f in fields(self)})

    @staticmethod
    def cat(parts: list["Columns"]) -> "Columns":
        """Concatenate the entries of several columns."""
        return Columns(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Columns)})

    def sorted(self) -> "Columns":
        """Sort the entries by position."""
        return self.take(self.indices.argsort())

    def weight(self) -> Tensor:
        """Return base + delta, fp32 [k]."""
        return self.base + self.values

    def update_(self, grad: Tensor, scale: Tensor, is_finite: Tensor, rule: AdamW, least: float = 0.0) -> Tensor:
        """Take one step of AdamW, after which no weight is 0.

        Args:
            grad: fp32 [k].
            scale: fp32 [], factor of the gradient (clipping).
            is_finite: bool [] on the device; False leaves every bit as it is.
            rule: AdamW with the rates of this step.
            least: Smallest size of a weight afterwards, see ``least_size``.

        Returns:
            fp32 [k], ``weight()`` after the step.
        """
        moments = [self.exp_avg, self.exp_avg_sq]
        weight = rule.update_(grad, scale, is_finite, self.base, self.values, moments, self.age)
        return self._keep_from_zero_(weight, is_finite, least)

    def _keep_from_zero_(self, weight: Tensor, is_finite: Tensor, least: float) -> Tensor:
        """Move deltas by so little that each weight is at least ``least`` in size, and return the weights."""
        lost = (weight.abs() < least) & is_finite
        if lost.is_cpu and not lost.numpy().any():  # elsewhere asking would wait for the device
            return weight
        moved = torch.copysign(torch.full_like(weight, least), weight) - self.base
        # Where the base is so large that the difference is rounded to -base, the next number beside the delta is taken.
        beside = torch.nextafter(self.values, torch.zeros_like(self.values))
        moved = torch.where(self.base.abs() < 2.0**24 * least, moved, beside)
        self.values.copy_(torch.where(lost, moved, self.values))
        return self.weight()


def least_size(dtype: torch.dtype) -> float:
    """Return the smallest size of an active weight after an update: it stays non-zero in its type, and cast to bf16.

    Args:
        dtype: Dtype of the model's weights.
    """
    info = torch.finfo(dtype)
    # The same for fp32 and bf16, 1.2e-38: the smallest normal number, which no hardware flushes to 0.
    return max(torch.finfo(torch.bfloat16).smallest_normal, info.smallest_normal * info.eps)


class Support:
    """Positions of all ranks' deltas in one weight, as the rows and columns that a sampled gradient needs."""

    def __init__(self, shape: tuple[int, int], parts: list[Tensor]) -> None:
        """Args:
        shape: [out, in] of the weight.
        parts: Each owner's positions, int32 or int64, sorted, in rank order.

        Raises:
            ValueError: A position is outside the weight: kernels index with them.
        """
        self.shape = shape
        self.sizes = [part.numel() for part in parts]
        """Number of entries of each owner."""
        positions = torch.cat(parts)
        _check_inside(positions, shape)
        rows = torch.bincount(positions // shape[1], minlength=shape[0])
        self.crow = torch.nn.functional.pad(rows.cumsum(0), (1, 0)).to(position_dtype(len(positions)))
        """int32 [out + 1], where each row's entries begin; int64 if there are 2^31 or more."""
        self.col = (positions % shape[1]).to(torch.int32)
        """int32 [len], input feature of each entry."""
        self.bounds = row_bounds(shape, self.crow)
        """Index at which each block of rows begins, on the host, so that no step has to wait for the device."""
        self._blocks: list[Support] = []

    def __len__(self) -> int:
        return self.col.numel()

    def blocks(self, count: int) -> list["Support"]:
        """Divide the entries into ``count`` equal blocks of rows (views), each with rows numbered from its first on."""
        if len(self._blocks) != count:  # the first of an evolution's steps waits for the device
            rows, crow = self.shape[0] // count, self.crow.cpu()
            bounds = crow[::rows].tolist()
            self._blocks = []
            for block, (begin, end) in enumerate(itertools.pairwise(bounds)):
                part = Support.__new__(Support)
                part.shape, part.sizes = (rows, self.shape[1]), [end - begin]
                inside = slice(block * rows, (block + 1) * rows + 1)
                part.crow = (self.crow[inside] - begin).to(position_dtype(end - begin))
                part.col = self.col[begin:end]
                part.bounds, part._blocks = row_bounds(part.shape, crow[inside] - begin), []
                self._blocks.append(part)
        return self._blocks

    def positions(self) -> Tensor:
        """Return the flat positions, int64 [len], increasing."""
        rows = torch.arange(self.shape[0], device=self.col.device)
        return rows.repeat_interleave(self.crow.diff()) * self.shape[1] + self.col


def _check_inside(positions: Tensor, shape: tuple[int, int]) -> None:
    if positions.numel():
        low, high = (int(extreme) for extreme in positions.aminmax())
        if low < 0 or high >= shape[0] * shape[1]:
            raise ValueError(
                f"positions {low} to {high} of a weight {list(shape)}: needs 0 to {shape[0] * shape[1] - 1}"
            )


def gather_supports(group: Group, indices: Tensor, lengths: list[int], shapes: list[tuple[int, int]]) -> list[Support]:
    """Let every rank know all positions of all layers. Collective.

    Args:
        group: The owners.
        indices: int32 or int64, on every rank the same: this rank's positions, sorted in each layer, layers one after
            another.
        lengths: Number of this rank's positions in each layer.
        shapes: [out, in] of each layer.

    Returns:
        All ranks' positions of each layer.
    """
    table = group.stack(torch.tensor(lengths)).tolist()
    parts = [positions.split(table[rank]) for rank, positions in enumerate(group.gather(indices))]
    return [Support(shape, [part[layer] for part in parts]) for layer, shape in enumerate(shapes)]
