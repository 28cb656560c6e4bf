"""Warnings about runs that would end without an error and without a result. Each is given once, by one rank."""

import warnings
from collections.abc import Mapping

import torch

from seft_dist.backends import Backend
from seft_dist.config import SeftConfig
from seft_dist.modules.kinds import Target
from seft_dist.optim.gradient_check import GradientCheck
from seft_dist.optim.recompute_inputs import unknown_nodes
from seft_dist.optim.state import State, deltas_asked_for
from seft_dist.optim.swap import Parent
from seft_dist.sparsity.schedule import first_evolution

LEVEL = 4  # stack level of the training loop, roughly: hooks lie between it and the optimizer's method
_MANY_WEIGHTS = 100
"""Weights of a target from which on it is no accident that none of them is 0."""
_COMPARED, _MOST = 1024, 0.5
"""Values of each target that are compared with the parent's; largest share that may differ without a warning."""
_ROUNDING = 2**-7
"""Relative difference that is no change: the file of one of both may be bf16."""


class SeftWarning(UserWarning):
    """A warning about training that would end without an error and without the result that is wanted."""


def _is_main(backend: Backend) -> bool:
    return backend.owners.rank == 0 and backend.replicas.rank == 0


def warn_at_start(backend: Backend, config: SeftConfig, state: State, frozen: list[str], parent: Parent | None) -> None:
    """Give the warnings that can be given before the first step.

    Args:
        backend: Knows the ranks.
        config: The method.
        state: The state of a run that begins.
        frozen: Result of ``frozen_targets``.
        parent: Model before it was pruned, if weights are to come back from it.
    """
    if _is_main(backend):
        _warn_of_frozen_targets(frozen)
        _warn_without_evolution(config)
        _warn_without_recomputation()
        _warn_of_dense_targets(backend, state)
        _warn_of_small_targets(backend, config, state)
        if parent is not None:
            _warn_of_changed_weights(backend, parent)


def _warn_without_evolution(config: SeftConfig) -> None:
    """Warn if the schedule has no evolution although it is not ``static``."""
    if config.static or first_evolution(config) is not None:
        return
    until = "80 % of steps" if config.end is None else "end"
    warnings.warn(
        f"no evolution will happen: one is due at every step from begin={config.begin} on that is divisible by "
        f"interval={config.interval}, but only until step {config.last_step} ({until}), so the first support stays. "
        "Make the interval shorter, or begin earlier, or end later; or set static if this is wanted",
        SeftWarning,
        stacklevel=LEVEL + 1,
    )


def frozen_targets(targets: Mapping[str, Target]) -> list[str]:
    """List the targets that a user has frozen, and others not: perhaps to leave them as they are.

    Args:
        targets: Targets by name, before the optimizer freezes all. All are frozen after an earlier optimizer.
    """
    frozen = [name for name, target in targets.items() if not target.weight.requires_grad]
    return frozen if len(frozen) < len(targets) else []


def _warn_of_frozen_targets(frozen: list[str]) -> None:
    if frozen:
        warnings.warn(
            f"{len(frozen)} targets were frozen (requires_grad was False, e.g. {frozen[0]}), others not. They train "
            "all the same: the pattern of the targets alone decides. To leave them as they are, give a regular "
            "expression that does not match them (targets)",
            SeftWarning,
            stacklevel=LEVEL + 1,
        )


def _warn_of_dense_targets(backend: Backend, state: State) -> None:
    """Warn of targets without zeros in a model that has zeros elsewhere: a head, or a layer that was not pruned."""
    numels = [partition.numel for partition in backend.partitions]
    sizes = zip(backend.names, state.mask_sizes, numels, strict=True)
    dense = [name for name, size, numel in sizes if size == numel and numel >= _MANY_WEIGHTS]
    if dense and len(dense) < len(numels):
        warnings.warn(
            f"{len(dense)} of {len(numels)} targets have no zeros (e.g. {dense[0]}). They get deltas like the others, "
            "and stay dense. If they were left out of pruning on purpose, or are a new head that has to be trained "
            "whole, leave them out here too (targets)",
            SeftWarning,
            stacklevel=LEVEL + 1,
        )


def _warn_of_small_targets(backend: Backend, config: SeftConfig, state: State) -> None:
    """Warn of targets that have fewer active weights than the density asks for, as after pruning across layers."""
    rows = zip(backend.names, state.budgets, deltas_asked_for(backend, config), strict=True)
    less = [row for row in rows if row[1] < row[2]]
    if less:
        name, budget, wanted = less[0]
        warnings.warn(
            f"{len(less)} of {len(backend.names)} targets have fewer active weights than density={config.density} asks "
            f"for (e.g. {name}: {budget} instead of {wanted}). They get no more deltas than that",
            SeftWarning,
            stacklevel=LEVEL + 1,
        )


def _warn_of_changed_weights(backend: Backend, parent: Parent) -> None:
    """Warn if most active weights differ from the parent's, so that what would come back does not fit them.

    A run that goes on differs in few: those that had deltas. Only the last values of each target are compared:
    SparseGPT leaves the first inputs alone, with which a transposed weight begins.
    """
    counts = torch.zeros(2, dtype=torch.int64, device=backend.device)  # active ones, changed ones
    for i, name in enumerate(backend.names):
        stop, mine = backend.interval(i).stop, backend.own(i)[-_COMPARED:].float()
        try:
            theirs = parent.read(name, stop - len(mine), stop).to(mine.device).float()
        except ValueError:
            return  # an evolution will say so; here only this rank reads, and the others would wait for it
        active, changed = mine != 0, (mine - theirs).abs() > _ROUNDING * theirs.abs()
        counts += torch.stack([active.sum(), (active & changed).sum()]).to(counts.device)
    share = float(counts[1]) / max(1, int(counts[0]))
    if share > _MOST:
        warnings.warn(
            f"{share:.0%} of the active weights (of the last {_COMPARED} values of each target) are not those of the "
            "parent: pruning changed them to make up for what it removed (--compensate, SparseGPT), they were trained "
            "since, or this is not the model that was pruned. What comes back at its old value may not fit them, so "
            "swaps may gain little or do harm (docs/results.md). Compare with a run without swaps: swap_fraction 0, "
            "and no parent",
            SeftWarning,
            stacklevel=LEVEL + 1,
        )


def _warn_without_recomputation() -> None:
    """Warn if torch records operations in a way that is not known here, so that more inputs are kept than need be."""
    unknown = unknown_nodes()
    if unknown:
        warnings.warn(
            f"torch {torch.__version__} has no autograd nodes {', '.join(unknown)} as they are expected here, so "
            "inputs of linears that could be computed again for backward are kept: training is right, but needs more "
            "memory",
            SeftWarning,
            stacklevel=LEVEL + 1,
        )


def warn_without_gradient(
    backend: Backend, config: SeftConfig, state: State, check: GradientCheck, first: bool
) -> None:
    """Warn if there is nothing to learn from, in all layers or in some. Waits for the device.

    Args:
        backend: Knows the ranks.
        config: The method.
        state: After the step's update.
        check: Result for the gradient that the deltas were updated with.
        first: True if the first support was chosen in this step.
    """
    if not _is_main(backend):
        return
    estimated = first and config.window_store == "factored"  # then this update had no gradient
    without = [
        name
        for name, support, budget in zip(backend.names, state.supports, state.budgets, strict=True)
        if budget and not len(support)
    ]
    if len(without) == sum(map(bool, state.budgets)) or (not estimated and float(check.norm) == 0):
        warnings.warn(
            f"step {check.step}: the gradient of every target is exactly 0, so nothing is learnt. Look at the labels "
            "(all masked?), at whether the loss depends on the targets, and for weights or activations that are all 0",
            SeftWarning,
            stacklevel=LEVEL,
        )
    elif without:
        warnings.warn(
            f"step {check.step}: the gradient of {len(without)} of {len(backend.names)} targets is exactly 0 (e.g. "
            f"{without[0]}): they get no deltas until an evolution finds one. Look for inputs or outputs that are dead",
            SeftWarning,
            stacklevel=LEVEL,
        )


def warn_of_untrained_vectors(backend: Backend, names: list[str]) -> None:
    """Warn of norms and biases that are to train and got no gradient.

    Args:
        backend: Knows the ranks.
        names: Names of the parameters.
    """
    if names and _is_main(backend):
        warnings.warn(
            f"train_norms: {len(names)} norms or biases got no gradient in the first step (e.g. {names[0]}). They stay "
            "as they are as long as they get none: the model does not compute with them, or reads them from outside of "
            "their module",
            SeftWarning,
            stacklevel=LEVEL,
        )
