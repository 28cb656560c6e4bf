"""Noticing that a model's weights were replaced behind the optimizer's back.

The optimizer keeps base and delta of what it trains, and writes their sum into the weights. After ``load_state_dict``,
``p.data = ...`` or another optimizer's step, weights are something else, and the next update would overwrite some of
them with the sums of before.
"""

import warnings

from seft_dist.backends import Backend
from seft_dist.kernels.bits import count_outside
from seft_dist.optim.state import State

_LEVEL = 4  # stack level of the training loop, roughly: hooks lie between it and the optimizer's method


class ReplacementCheck:
    """Compares weights with what the optimizer wrote there, and warns once if they differ."""

    def __init__(self) -> None:
        self._warned = False

    def check(self, backend: Backend, state: State, step: int, *, everywhere: bool) -> None:
        """Look at the deltas of one target, in turn, or of all targets and at the pruned positions too.

        Waits for the device. Not collective: each rank looks at, and warns about, its own part.

        Args:
            backend: Holds the weights; inside its ``writing()`` context.
            state: Masks and deltas before the step's update.
            step: Optimizer step, counted from 1.
            everywhere: True: look at all targets.
        """
        if self._warned:
            return
        count = len(backend.names)
        for i in range(count) if everywhere else [step % count]:
            different = self._different(backend, state, i, everywhere)
            if different:
                self._warned = True
                warnings.warn(
                    f"step {step}: {different} weights of {backend.names[i]} (rank {backend.owners.rank}) are not what "
                    "SeftOptimizer wrote there: they were replaced after it had read the model (load_state_dict, "
                    "p.data = ..., another optimizer). Its masks and deltas are those of the old weights, and what is "
                    "trained from here is neither. Load weights before the first forward pass, or make a new optimizer "
                    "after loading: seft.detach(); seft = SeftOptimizer(model, ...)",
                    stacklevel=_LEVEL,
                )
                return

    def _different(self, backend: Backend, state: State, i: int, with_mask: bool) -> int:
        begin = sum(state.lengths[:i])
        written = state.columns.take(slice(begin, begin + state.lengths[i])).weight()
        seen = backend.load(i, state.places[i])
        different = int((seen != written.to(seen.dtype)).sum())
        return different + (int(count_outside(state.masks[i], backend.own(i))) if with_mask else 0)
