"""Making a target record its weight gradient, and giving the module back as it was."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from seft_dist.backends.attachment import attachment_of
from seft_dist.backends.packed import packed_of
from seft_dist.backends.shards import zeros_beside
from seft_dist.config import SeftConfig
from seft_dist.modules.kinds import Target
from seft_dist.modules.targets import check_criteria, find_targets
from seft_dist.modules.trainable import check_not_flattened, check_trainable
from seft_dist.optim.anchors import ANCHOR
from seft_dist.optim.linear import SAMPLED_FORWARDS
from seft_dist.optim.slot import Slot
from seft_dist.optim.swap import Parent, check_parent


def checked_targets(model: nn.Module, config: SeftConfig, parent: Parent | None) -> dict[str, Target]:
    """Find the targets of a configuration, and check that they can be trained as it says.

    Args:
        model: The pruned model.
        config: The method.
        parent: Model from which pruned weights are to come back, if there is one.

    Returns:
        The targets by name.

    Raises:
        ValueError: There are none, they or the parent do not fit, or another optimizer trains the model.
    """
    check_not_flattened(model)
    targets = find_targets(model, config.targets)
    check_criteria(targets, config)
    check_parent(parent, config, targets)
    check_trainable(model, targets)
    _check_not_installed(model)
    return targets


def _check_not_installed(model: nn.Module) -> None:
    """Refuse a model that an optimizer trains already, even if it trains other layers of it."""
    if any(key.endswith(ANCHOR) for module in model.modules() for key in module._parameters):
        raise ValueError(
            "the model already has a SeftOptimizer: call detach() on it first. One optimizer trains all targets of a "
            "model, with one learning rate; to copy a model that trains, copy it before the optimizer is made, or load "
            "a state_dict of it into another"
        )


def install(target: Target) -> tuple[nn.Parameter, Slot]:
    """Make a target record its weight gradient in a slot.

    Returns:
        The anchor, a one-element trainable parameter that gives sharding engines something to train (it stays out of
        the state dict and has no effect on the output), and the slot.
    """
    module, name = target.module, target.attribute_name(ANCHOR)
    slot, weight, attachment = Slot(), target.weight, attachment_of(module)
    packed = packed_of(weight)
    device = weight.device if packed is None else packed.bits.device
    anchor = nn.Parameter(torch.zeros(1, dtype=weight.dtype, device=device))
    module.register_parameter(name, anchor)
    attachment.hooks += [
        module.register_state_dict_post_hook(_hide_anchor(name)),
        module.register_load_state_dict_pre_hook(_supply_anchor(name, target.key)),
    ]
    attachment.slots[target.key] = slot
    target.bind_forward(SAMPLED_FORWARDS)
    return anchor, slot


def uninstall(target: Target) -> None:
    """Undo ``install``; the first of a module's fused weights takes the hooks and slots of all with it."""
    attachment = attachment_of(target.module)
    for hook in attachment.hooks:
        hook.remove()
    attachment.hooks.clear()
    attachment.slots.clear()
    target.unbind_forward()
    delattr(target.module, target.attribute_name(ANCHOR))
    if packed_of(target.weight) is not None:
        target.bind_forward(SAMPLED_FORWARDS)


def _hide_anchor(name: str) -> Callable[..., None]:
    def hook(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        state.pop(prefix + name, None)

    return hook


def _supply_anchor(name: str, key: str) -> Callable[..., None]:
    def hook(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        anchor = getattr(module, name).detach()
        if anchor.is_meta and prefix + key in state:
            # FSDP2 shards a model without values and then assigns the state (accelerate's cpu_ram_efficient_loading)
            anchor = zeros_beside(anchor, state[prefix + key])
        state.setdefault(prefix + name, anchor)

    return hook
