"""Noticing that a model's weights were replaced behind the optimizer's back.

The optimizer keeps base and delta of what it trains, and writes their sum into the weights. After ``load_state_dict``,
``p.data = ...`` or another optimizer's step, weights are something else, and the next update would overwrite some of
them with the sums of before.
"""

import itertools
import warnings
from collections.abc import Mapping

import torch
from torch import nn

from seft_dist.backends import Backend
from seft_dist.kernels.bits import count_outside
from seft_dist.modules.kinds import Target
from seft_dist.optim.notices import LEVEL, SeftWarning
from seft_dist.optim.state import State

_LOOKED_AT = 16
"""Most deltas of a target, on a rank, that are looked at in a step."""


class ReplacementCheck:
    """Compares weights with what the optimizer wrote there, and warns once if they differ."""

    def __init__(self, model: nn.Module, targets: Mapping[str, Target]) -> None:
        """Args:
        model: The model.
        targets: Its targets by name.
        """
        self._model, self._targets = model, targets
        self._warned = False

    def check(self, backend: Backend, state: State, step: int, *, with_masks: bool) -> None:
        """Look at some deltas of every target, and at its pruned positions if that is wanted.

        An update writes all deltas, so what it does not find is not found later. Waits for the device. Not collective:
        each rank looks at its own part, and warns about it.

        Args:
            backend: Holds the weights; inside its ``writing()`` context.
            state: Masks and deltas before the step's update.
            step: Optimizer step, counted from 1.
            with_masks: True: look whether weights outside the masks are 0, in one pass over all weights, and whether
                the targets are still modules of the model.
        """
        if self._warned:
            return
        if with_masks:
            self._check_modules(step)
        for name, different in zip(backend.names, _different(backend, state, with_masks), strict=True):
            if different:
                self._warned = True
                warnings.warn(
                    f"step {step}: weights of {name} (rank {backend.owners.rank}: {different} of those looked at) are "
                    "not what SeftOptimizer left there: they were replaced after it had read the model "
                    "(load_state_dict, p.data = ..., another optimizer). Its masks and deltas are those of the old "
                    "weights, so what is trained from here is a mixture. Load weights before the first forward pass, "
                    "or make a new optimizer after loading: seft.detach(); seft = SeftOptimizer(model, ...)",
                    SeftWarning,
                    stacklevel=LEVEL + 1,
                )
                return

    def _check_modules(self, step: int) -> None:
        """Warn if a target's module has left the model: what is trained in it is never called again."""
        modules = set(self._model.modules())
        gone = [name for name, target in self._targets.items() if target.module not in modules]
        if gone:
            self._warned = True
            warnings.warn(
                f"step {step}: {len(gone)} targets of SeftOptimizer are no longer modules of the model (e.g. "
                f"{gone[0]}): they were replaced after it was made, so what is in their place is not trained. Replace "
                "modules first, or make a new optimizer afterwards: seft.detach(); seft = SeftOptimizer(model, ...)",
                SeftWarning,
                stacklevel=LEVEL + 2,
            )


def _different(backend: Backend, state: State, with_masks: bool) -> list[int]:
    """Count the weights of each target, among those looked at, that are not as they were left."""
    starts = list(itertools.accumulate(state.lengths, initial=0))
    counts = [min(length, _LOOKED_AT) for length in state.lengths]
    rows = [row for start, count in zip(starts, counts, strict=False) for row in range(start, start + count)]
    left = state.columns.take(torch.tensor(rows, dtype=torch.int64, device=backend.device)).weight().split(counts)
    found = torch.zeros(len(counts), dtype=torch.int64, device=backend.device)
    for i, (count, expected) in enumerate(zip(counts, left, strict=True)):
        if count:
            seen = backend.load(i, state.memory_indices[i][:count])
            found[i] = torch.count_nonzero(seen != expected.to(seen.dtype))
    different = found.tolist()
    if with_masks:
        outside = [count_outside(mask, backend.own(i)) for i, mask in enumerate(state.masks)]
        different = [some + more for some, more in zip(different, outside, strict=True)]
    return different
