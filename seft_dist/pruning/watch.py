"""Watching the tokens that pass a target, for pruning methods that look at inputs."""

from collections.abc import Callable

from torch import Tensor, nn

from seft_dist.backends.attachment import attachment_of
from seft_dist.modules.experts import experts_forward, experts_linear
from seft_dist.modules.kinds import ExpertWeight, Target


def watch_inputs(target: Target, watcher: Callable[[Tensor, list[int]], None]) -> Callable[[], None]:
    """Pass the inputs of a target to a function, in every forward pass.

    Args:
        target: The weight that the inputs are multiplied with.
        watcher: Called with the tokens [T, in], sorted by expert, and where each expert's tokens end. For a weight
            without experts, all tokens are those of one expert.

    Returns:
        Function that stops the watching.
    """
    if isinstance(target, ExpertWeight):
        return _watch_experts(target, watcher)

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().reshape(-1, args[0].shape[-1])
        watcher(x, [len(x)])

    module: nn.Module = target.module
    return module.register_forward_pre_hook(hook).remove


def _watch_experts(target: ExpertWeight, watcher: Callable[[Tensor, list[int]], None]) -> Callable[[], None]:
    # Experts are no submodules, so that no hook sees their inputs: the whole forward method is replaced.
    module = target.module
    watchers = attachment_of(module).watchers
    watchers[target.key] = watcher

    def project(key: str, x: Tensor, ends: list[int]) -> Tensor:
        if key in watchers:
            watchers[key](x, ends)
        return experts_linear(x, getattr(module, key), ends)

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return experts_forward(module, hidden_states, top_k_index, top_k_weights, project)

    module.forward = forward

    def end() -> None:
        watchers.pop(target.key, None)
        if not watchers:
            target.unbind_forward()

    return end
