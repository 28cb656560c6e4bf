"""Where deltas may be, decided once, by the gradient of the first step."""

import torch

from seft_dist.kernels import bits
from seft_dist.optim.working_state import WorkingState
from seft_dist.sparsity import scores


def limit_columns(work: WorkingState) -> None:
    """Choose the input columns of each target with the largest squared gradients at active positions.

    One process only.
    """
    share = work.config.support_columns
    if share == 1:
        return
    assert work.backend.owners.size == 1
    for i, window in enumerate(work.windows):
        rows, cols = work.backend.shapes[i]
        squares = window.gradient().square().masked_fill_(~work.mask(i), 0).view(rows, cols).sum(0)
        inside = torch.zeros(rows, cols, dtype=torch.bool)
        inside[:, squares.topk(max(1, round(share * cols))).indices] = True
        work.state.columns_allowed[i] = bits.pack(inside.view(-1))
        room = int((inside.view(-1) & work.mask(i)).sum())
        work.state.budgets[i] = min(work.state.budgets[i], room)


def share_budgets(work: WorkingState) -> None:
    """Share the deltas of all targets in proportion to the gain that the gradient promises. Collective."""
    if work.config.layer_budgets == "density":
        return
    gains = []
    for i, window in enumerate(work.windows):
        numel = len(work.intervals[i])
        h = scores.curvature(torch.ones(numel), *window.moments(), work.intervals[i].start).mul_(2)
        gain = (window.gradient() / window.num_steps).square_().div_(h).nan_to_num_(0, 0, 0)
        gains.append(gain.masked_fill_(~work.mask(i), 0).sum(dtype=torch.float64))
    gain = work.backend.owners.sum(torch.stack(gains))
    asked = torch.tensor(work.state.budgets, dtype=torch.float64)
    most = torch.minimum(4 * asked, torch.tensor(work.state.mask_sizes, dtype=torch.float64))
    low, high = 0.0, float(100 * asked.sum() / gain.sum())
    for _ in range(60):  # the factor with which the limited budgets add up to the same number
        middle = (low + high) / 2
        total = torch.maximum(torch.minimum(middle * gain, most), asked / 4).sum()
        low, high = (middle, high) if total < asked.sum() else (low, middle)
    new = torch.maximum(torch.minimum(low * gain, most), asked / 4).floor()
    work.state.budgets = [int(each) for each in new]
