"""Watching the tokens that pass a target, for pruning methods that look at inputs or outputs."""

from collections.abc import Callable

from torch import Tensor, nn

from seft_dist.backends.attachment import attachment_of
from seft_dist.modules.experts import experts_forward, experts_linear
from seft_dist.modules.kinds import ExpertWeight, Target

Watcher = Callable[[Tensor, Tensor, list[int]], None]
"""Function that is called with the inputs [T, in] of a weight, sorted by expert, the outputs of the forward pass
[..., out], and where each expert's tokens end."""


def watch_inputs(target: Target, watcher: Callable[[Tensor, list[int]], None]) -> Callable[[], None]:
    """Pass the inputs of a target to a function, in every forward pass.

    Args:
        target: The weight that the inputs are multiplied with.
        watcher: Called with the tokens [T, in], sorted by expert, and where each expert's tokens end. For a weight
            without experts, all tokens are those of one expert.

    Returns:
        Function that stops the watching.
    """
    return watch_calls(target, lambda inputs, outputs, ends: watcher(inputs, ends))


def watch_calls(target: Target, watcher: Watcher) -> Callable[[], None]:
    """Pass the inputs and outputs of a target to a function, in every forward pass.

    Args:
        target: The weight that the inputs are multiplied with.
        watcher: For a weight without experts, all tokens are those of one expert.

    Returns:
        Function that stops the watching.
    """
    if isinstance(target, ExpertWeight):
        return _watch_experts(target, watcher)

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0].detach().reshape(-1, args[0].shape[-1])
        watcher(x, output, [len(x)])

    module: nn.Module = target.module
    return module.register_forward_hook(hook).remove


def _watch_experts(target: ExpertWeight, watcher: Watcher) -> Callable[[], None]:
    # Experts are no submodules, so that no hook sees their inputs: the whole forward method is replaced.
    module = target.module
    watchers = attachment_of(module).watchers
    watchers.setdefault(target.key, []).append(watcher)

    def project(key: str, x: Tensor, ends: list[int]) -> Tensor:
        output = experts_linear(x, getattr(module, key), ends)
        for watch in watchers.get(key, []):
            watch(x.detach(), output, ends)
        return output

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return experts_forward(module, hidden_states, top_k_index, top_k_weights, project)

    module.forward = forward

    def end() -> None:
        watchers[target.key].remove(watcher)
        if not any(watchers.values()):
            target.unbind_forward()

    return end
