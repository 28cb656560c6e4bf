"""The methods that schedulers, savers and GradScaler expect of any torch optimizer."""

import warnings
from typing import Any

import torch
from torch import Tensor

from seft_dist.optim.notices import LEVEL, SeftWarning

_NOT_IN_STATE_DICT = (
    "SEFT's masks and deltas are not in state_dict(), so neither in engine.save_checkpoint: save them with "
    "seft_dist.io.checkpoint.save(seft, folder, {}) first, for any number of ranks"
)


class TorchInterface(torch.optim.Optimizer):
    """The methods of ``SeftOptimizer`` that only other libraries call."""

    num_steps: int = 0
    """Optimizer steps done."""
    saved_step: int | None = None
    """Steps done when masks and deltas were last saved; ``state_dict`` of the same step need not warn."""
    is_managed: bool = False
    """True: something else clips by ``max_grad_norm``, and saves and loads masks and deltas, so nobody is warned."""
    _awaited_steps: int | None = None
    """Steps of the state_dict that was loaded; masks and deltas of the same step must be loaded before the next one."""
    _idle_steps: int = 0
    """Calls of ``step`` without a gradient."""
    _step_supports_amp_scaling = True
    """GradScaler then sets ``grad_scale``, which refuses it, instead of scaling the anchors only."""

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to be copied or pickled.

        Raises:
            TypeError: Always: a copy would write into the weights of the same model.
        """
        raise TypeError(
            "a SeftOptimizer cannot be copied or pickled, since it belongs to its model: save masks and deltas with "
            "seft_dist.io.checkpoint.save(seft, folder, {}), and load them into the SeftOptimizer of another copy of "
            "the pruned model"
        )

    @property
    def grad_scale(self) -> Tensor | float:
        """Scale that is in the gradients; there is none."""
        return 1.0

    @grad_scale.setter
    def grad_scale(self, scale: Tensor | float) -> None:
        raise ValueError(
            "SeftOptimizer got a GradScaler: it does not support loss scaling. Train in bf16 (or fp32) without scaler: "
            'torch.autocast(..., dtype=torch.bfloat16), mixed_precision="bf16" of Accelerator, bf16=True of Trainer'
        )

    def _note_idle_step(self) -> None:
        """Warn once if nothing is trained. DeepSpeed calls ``step`` once before there can be a gradient."""
        self._idle_steps += 1
        if self._idle_steps == 2 and not self.num_steps:
            warnings.warn(
                "step() was called twice and no gradient has reached SeftOptimizer: nothing is trained. Call the very "
                "model on which it was made, as a whole: model(...), not model.model(...), and no copy of it",
                SeftWarning,
                stacklevel=LEVEL,
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take the group of the constructor; others are refused.

        Raises:
            ValueError: There is one already: SEFT steps no other parameters.
        """
        if self.param_groups:
            raise ValueError(
                "SeftOptimizer trains deltas of its targets only (norms and biases with train_norms), with one group: "
                "give other parameters to an optimizer of their own"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the param group and the number of steps only; masks and deltas go into ``seft_dist.io.checkpoint``.

        One rank's part of them is of no use on another number of ranks, and many savers keep the dict of rank 0 alone.
        """
        if self.num_steps and not self.is_managed and self.saved_step != self.num_steps:
            warnings.warn(_NOT_IN_STATE_DICT, SeftWarning, stacklevel=2)
        return super().state_dict() | {"seft_steps": self.num_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the param group. Masks and deltas of the same step may be loaded before or afterwards.

        Raises:
            ValueError: The dict is of another step than the masks and deltas that were already loaded; if
                ``is_managed``, the next training forward pass raises it.
        """
        steps = state_dict.get("seft_steps", self.num_steps)
        self._awaited_steps = steps if steps or self.num_steps else None  # accelerate loads what a new optimizer gave
        if self.num_steps and not self.is_managed:  # else they may come next, e.g. those of the best model
            self._check_awaited()
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "seft_steps"})

    def _check_awaited(self) -> None:
        """Refuse to train with masks and deltas of another step than the state_dict.

        Raises:
            ValueError: They are of another step.
        """
        if self._awaited_steps not in (None, self.num_steps):
            raise ValueError(
                f"this optimizer has done {self.num_steps} steps, the state_dict is of step {self._awaited_steps}. "
                f"{_NOT_IN_STATE_DICT}, and load them with seft_dist.io.checkpoint.load(seft, checkpoint) before "
                "training goes on (with transformers.Trainer, SeftCallback does both)"
            )
        self._awaited_steps = None
