"""The one place where this package keeps something of its own on the modules of another library's model.

Most modules have no attachment. It is an ordinary attribute, not an entry of a dictionary elsewhere, so that it is
copied and freed together with its module.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from seft_dist.backends.gather import PackedAllGather

_NAME = "_seft_attachment"


@dataclass
class Attachment:
    """Everything that this package keeps on one module."""

    slots: dict[str, Any] = field(default_factory=dict)
    """A parameter's name to the ``seft_dist.optim.slot.Slot`` in which its gradient is recorded."""
    hooks: list[RemovableHandle] = field(default_factory=list)
    """Hooks that ``seft_dist.optim.install`` registered on the module."""
    vectors: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    """Name of a trained norm's or bias's parameter to the function that returns it for one forward pass, such that the
    backward pass records its gradient (``seft_dist.optim.vectors``)."""
    watchers: dict[str, list[Callable[[Tensor, Tensor, list[int]], None]]] = field(default_factory=dict)
    """A fused parameter's name to the functions that get the inputs and outputs of its experts
    (``seft_dist.pruning.watch``)."""
    gather: PackedAllGather | None = None
    """All-gather of this module's parameters, if FSDP2 sends them packed."""


def attachment_of(module: nn.Module) -> Attachment:
    """Return the attachment of a module; the first call makes it."""
    attachment: Attachment | None = vars(module).get(_NAME)
    if attachment is None:
        attachment = vars(module)[_NAME] = Attachment()
    return attachment
