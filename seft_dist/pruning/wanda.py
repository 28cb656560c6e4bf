"""Wanda: a weight matters as much as its size times the norm of the input it meets.

Source: Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695.
"""

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class InputNorm:
    """The L2 norm of each input feature of one linear over all tokens that pass while it listens."""

    def __init__(self, linear: nn.Linear) -> None:
        self.num_tokens = 0
        self._sum = torch.zeros(linear.in_features, dtype=torch.float64, device=linear.weight.device)
        self._handle: RemovableHandle = linear.register_forward_pre_hook(self._listen)

    def _listen(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs = args[0].detach().reshape(-1, len(self._sum)).float()
        self.num_tokens += len(inputs)
        self._sum += inputs.square().sum(dim=0, dtype=torch.float64)

    def close(self, name: str) -> Tensor:
        """Stop listening. Local.

        Args:
            name: Of the linear, for messages.

        Returns:
            [in], fp32.

        Raises:
            ValueError: No token came by, or an input was not finite.
        """
        self._handle.remove()
        if self.num_tokens == 0:
            raise ValueError(
                f"no calibration token reached {name}: leave it out with --targets, or use --method magnitude"
            )
        norm = self._sum.sqrt().float()
        if not norm.isfinite().all():
            raise ValueError(f"inputs of {name} are not finite: try --model.dtype float32, or check the model")
        return norm


def wanda_scores(weight: Tensor, norm: Tensor) -> Tensor:
    """|weight| x norm of its input. Local.

    Args:
        weight: [out, in], any float type.
        norm: [in], fp32; 0 for a dead input, whose weights go first.

    Returns:
        [out, in], fp32, not negative.
    """
    return weight.detach().float().abs() * norm
