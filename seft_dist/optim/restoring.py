"""Taking over masks and deltas that come from outside, e.g. from a file: first everything is checked, then it is used.

Kernels index with positions and ages, so nothing out of bounds, out of order or not finite may get that far.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from seft_dist.backends import Backend
from seft_dist.config import SeftConfig
from seft_dist.kernels.bits import holds, popcount, unpack
from seft_dist.optim.agreement import raise_on_all_ranks
from seft_dist.optim.delta import Columns
from seft_dist.optim.nm_groups import NMGroups
from seft_dist.optim.state import LayerDelta, State, deltas_asked_for
from seft_dist.optim.window import Needs
from seft_dist.sparsity.partition import Interval
from seft_dist.sparsity.schedule import next_evolution

WINDOW_OWN = ("positions", "total", "squares")
"""Window statistics with one value for each own weight or candidate."""
WINDOW_SHARED = ("rows", "cols")
"""Window statistics that are the same on every rank."""
WINDOW_SUMS = ("norms", "outputs")
"""Window statistics of each rank's own tokens."""
COLUMNS = tuple(field.name for field in fields(Columns))


@dataclass(frozen=True)
class Limits:
    """Bounds of what a rank's part of one target may hold."""

    name: str
    shape: tuple[int, int]
    """[rows, columns] of the whole weight."""
    experts: int
    """Number of experts in it; 1 for an ordinary weight."""
    interval: Interval
    """Positions of the part."""
    dtype: torch.dtype
    """Dtype of the model's weights."""
    positions: torch.dtype
    """Dtype of the positions in the model's weights."""
    config: SeftConfig
    steps: int
    """Optimizer steps done."""
    window_steps: int
    """Number of steps in a window that has begun; 0: none has."""

    def expect(self, holds: bool, actual: str, needed: str) -> None:
        """Raise a ValueError that names the target unless a condition holds."""
        if not holds:
            raise ValueError(f"{self.name}: {actual}; needs {needed}: this is no state that training has written")


def parts_of(layer: LayerDelta) -> dict[str, Tensor | None]:
    """Return the tensors of a target's part by the names that they have in checkpoints."""
    parts: dict[str, Tensor | None] = {key: getattr(layer.columns, key) for key in COLUMNS}
    parts |= {"mask": layer.mask, "committed": layer.committed, "committed_values": layer.committed_values}
    parts["trial"] = layer.trial
    if layer.window is not None:
        keys = WINDOW_OWN + WINDOW_SHARED + WINDOW_SUMS
        parts |= {f"window.{key}": getattr(layer.window, key) for key in keys}
    return parts


def check_part(parts: Mapping[str, Tensor | None], limits: Limits) -> None:
    """Check that training could have left a part of a target as it is.

    Args:
        parts: Tensors by their names, see ``parts_of``; window sums and shared statistics may be missing, and so may
            the positions on trial if there are none.
        limits: Bounds of the tensors.

    Raises:
        ValueError: Names the target, what it holds and what is needed.
    """
    start, numel = limits.interval.start, len(limits.interval)
    mask = _vector(parts, "mask", torch.uint8, -(-numel // 8), limits)
    if numel % 8:
        limits.expect(int(mask[-1]) >> numel % 8 == 0, "mask has bits behind its last position", "none there")
    indices = _positions(parts, "indices", limits)
    for key in ("base", "values", "exp_avg", "exp_avg_sq"):
        column = _vector(parts, key, torch.float32, len(indices), limits)
        _bounded(column, key, 0.0 if key == "exp_avg_sq" else None, None, limits)
    oldest = limits.steps + limits.config.window
    _bounded(_vector(parts, "age", torch.int32, len(indices), limits), "age", 0, oldest, limits)
    committed = _positions(parts, "committed", limits)
    values = _vector(parts, "committed_values", limits.dtype, len(committed), limits)
    _bounded(values, "committed_values", None, None, limits)
    _check_trial(parts, indices, limits)
    for key, positions in (("indices", indices), ("committed", committed)):
        outside = (~holds(mask, positions.long() - start)).nonzero()
        if outside.numel():
            limits.expect(
                False, f"{key} has position {int(positions[outside[0]])} outside the mask", "active positions"
            )
    if limits.window_steps:
        _check_window(parts, indices, limits)


def _check_trial(parts: Mapping[str, Tensor | None], indices: Tensor, limits: Limits) -> None:
    if parts.get("trial") is None:
        return
    trial = _positions(parts, "trial", limits)
    if len(trial):
        limits.expect(limits.config.reactivate == "trial", f"{len(trial)} positions on trial", "none")
        entries = torch.isin(indices, trial)
        base = _given(parts, "base", limits)[entries]
        sound = len(base) == len(trial) and not bool(base.any())
        limits.expect(sound, "a position on trial without a delta over base 0", "one at each of them")


def _check_window(parts: Mapping[str, Tensor | None], indices: Tensor, limits: Limits) -> None:
    """Refuse a window that the steps done could not have left."""
    needs, (rows, columns) = Needs.of(limits.config), limits.shape
    window = limits.config.window
    limits.expect(0 <= limits.window_steps <= window, f"a window of {limits.window_steps} steps", f"at most {window}")
    kept = len(limits.interval)
    if needs.candidates:
        positions = _positions(parts, "window.positions", limits)
        kept = len(positions)
        missing = ~torch.isin(indices, positions)
        limits.expect(not bool(missing.any()), "a window without the gradient of some deltas", "all of them")
    else:
        limits.expect(parts.get("window.positions") is None, "a window of candidates only", "one of all positions")
    # More than is needed is there if the window began with the first support.
    for key, needed, low in (("window.total", needs.dense, None), ("window.squares", needs.squares, 0.0)):
        if needed or parts.get(key) is not None:
            _bounded(_vector(parts, key, needs.dtype, kept, limits), key, low, None, limits)
    norms = columns * limits.experts
    for key, length in (("rows", rows), ("cols", columns), ("norms", norms), ("outputs", rows)):
        name = f"window.{key}"
        if parts.get(name) is not None:
            _bounded(_vector(parts, name, torch.float32, length, limits), name, 0.0, None, limits)


def _given(parts: Mapping[str, Tensor | None], key: str, limits: Limits) -> Tensor:
    value = parts.get(key)
    limits.expect(value is not None, f"{key} is missing", "it")
    assert value is not None
    return value


def _vector(parts: Mapping[str, Tensor | None], key: str, dtype: torch.dtype, length: int, limits: Limits) -> Tensor:
    value = _given(parts, key, limits)
    actual = f"{key} is {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    needed = f"{str(dtype).removeprefix('torch.')} [{length}]"
    limits.expect(value.dtype == dtype and value.shape == (length,), actual, needed)
    return value


def _positions(parts: Mapping[str, Tensor | None], key: str, limits: Limits) -> Tensor:
    """Return a vector of increasing flat positions inside the interval."""
    given = _given(parts, key, limits)
    value = _vector(parts, key, limits.positions, len(given) if given.dim() == 1 else 0, limits)
    wrong = (value[1:] <= value[:-1]).nonzero()
    if wrong.numel():
        at = int(wrong[0])
        limits.expect(False, f"{key} has {int(value[at + 1])} behind {int(value[at])}", "increasing positions")
    _bounded(value, key, limits.interval.start, limits.interval.stop - 1, limits)
    return value


def _bounded(values: Tensor, key: str, low: float | None, high: float | None, limits: Limits) -> None:
    """Check that all values are finite and from ``low`` to ``high``."""
    if not values.numel():
        return
    least, most = (float(extreme) for extreme in values.aminmax())  # both NaN if there is one
    finite = abs(least) + abs(most) < float("inf")
    limits.expect(finite, f"{key} has values that are not finite", "finite ones")
    inside = (low is None or least >= low) and (high is None or most <= high)
    needed = f"from {low} on" if high is None else f"{low} to {high}"
    limits.expect(inside, f"{key} has values from {least:g} to {most:g}", needed)


def check_layers(
    layers: Sequence[LayerDelta], backend: Backend, config: SeftConfig, state: State, num_steps: int
) -> None:
    """Check that layers are this rank's part of every target, and that they can be taken over.

    Args:
        layers: This rank's parts, in the targets' order.
        backend: Knows which rank owns which positions.
        config: The method.
        state: State at the beginning of the run.
        num_steps: Optimizer steps done.

    Raises:
        ValueError: Names the target, what it holds and what is needed.
    """
    if [layer.name for layer in layers] != backend.names:
        raise ValueError(f"{len(layers)} layers were given for the {len(backend.names)} targets, or in another order")
    if num_steps < 0:
        raise ValueError(f"{num_steps} optimizer steps done: needs a number from 0 on")
    for i, layer in enumerate(layers):
        steps = 0 if layer.window is None else layer.window.num_steps
        limits = Limits(
            name=layer.name,
            shape=backend.shapes[i],
            experts=backend.experts[i],
            interval=backend.interval(i),
            dtype=backend.dtypes[i],
            positions=backend.position_dtype,
            config=config,
            steps=num_steps,
            window_steps=steps,
        )
        limits.expect(layer.interval == backend.interval(i), f"{layer.interval}", f"{backend.interval(i)}")
        limits.expect(tuple(layer.shape) == backend.shapes[i], f"shape {layer.shape}", f"{backend.shapes[i]}")
        if config.scope == "layer":
            wanted = state.mask_sizes[i]
            limits.expect(layer.mask_size == wanted, f"a target of {layer.mask_size} active positions", f"{wanted}")
        check_part(parts_of(layer), limits)
    if sum(layer.mask_size for layer in layers) != sum(state.mask_sizes):
        raise ValueError(
            f"targets of {sum(layer.mask_size for layer in layers)} active positions in all: needs "
            f"{sum(state.mask_sizes)}"
        )


def _check_counts(
    layers: Sequence[LayerDelta], backend: Backend, config: SeftConfig, state: State, num_steps: int
) -> None:
    """Check the numbers of active positions, deltas and positions on trial over all ranks. Collective."""
    tried = int(backend.owners.sum(torch.tensor(sum(len(layer.trial) for layer in layers))))
    if tried and next_evolution(config, num_steps) is None:
        raise ValueError(
            f"{tried} positions are on trial after step {num_steps}, and no evolution follows that would decide about "
            f"them: needs steps and end as the run had them (the last evolution is at step {config.last_step} at most)"
        )
    own = [[popcount(layer.mask) - len(layer.trial), len(layer.columns)] for layer in layers]
    counts = backend.owners.sum(torch.tensor(own))
    for layer, budget, (active, deltas) in zip(layers, state.budgets, counts.tolist(), strict=True):
        if config.adapt != "none" and active != layer.mask_size:
            raise ValueError(f"{layer.name}: a mask with {active} active positions; needs exactly {layer.mask_size}")
        if deltas > budget:
            raise ValueError(f"{layer.name}: {deltas} deltas; needs at most {budget}")


def take_over(layers: Sequence[LayerDelta], backend: Backend, config: SeftConfig, state: State, num_steps: int) -> None:
    """Put masks and deltas into the weights and the state, after all of them have been checked. Collective.

    Args:
        layers: This rank's part of every target.
        backend: Holds the weights, as they were when the run began.
        config: The method.
        state: The state to change.
        num_steps: Optimizer steps done.

    Raises:
        ValueError: Names the target, what it holds and what is needed; every rank raises the same, nothing was changed.
    """
    raise_on_all_ranks(backend, lambda: check_layers(layers, backend, config, state, num_steps))
    _check_counts(layers, backend, config, state, num_steps)
    with backend.writing():
        for i, layer in enumerate(layers):
            backend.put_own(i, _applied(layer, backend.own(i)), layer.mask)
            state.masks[i], state.mask_sizes[i], state.committed[i] = layer.mask, layer.mask_size, layer.committed
            state.trial[i] = layer.trial
        backend.sync_mask_counts()
        state.set_entries(backend, [layer.columns for layer in layers])


def _applied(layer: LayerDelta, own: Tensor) -> Tensor:
    """Return this rank's weights of a target with masks and deltas in them.

    Args:
        layer: Masks and deltas.
        own: Flat weights of its interval, before; not changed.
    """
    own, start = own.clone(), layer.interval.start
    own[layer.committed.long() - start] = layer.committed_values.to(own)
    own.masked_fill_(unpack(layer.mask, len(layer.interval)).logical_not_(), 0)
    own[layer.columns.indices.long() - start] = layer.columns.weight().to(own.dtype)
    return own


def holds_result(layers: Sequence[LayerDelta], backend: Backend) -> bool:
    """Tell whether the weights are already those that taking over the layers would make of them. Collective.

    Args:
        layers: This rank's part of every target, checked for this layout.
        backend: Holds the weights.
    """
    backend.drop_gathered()  # shards, not gathered copies, are compared
    differs = any(not torch.equal(_applied(layer, backend.own(i)), backend.own(i)) for i, layer in enumerate(layers))
    return not bool(backend.replicas.max(backend.owners.max(torch.tensor([int(differs)]))))


def begin_as(
    state: State,
    backend: Backend,
    config: SeftConfig,
    layers: Sequence[LayerDelta],
    fingerprints: list[int],
    budgets: list[int | None],
) -> None:
    """Give a state on trained weights the mask sizes, budgets and fingerprints with which their run began.

    Collective with a pattern.

    Args:
        state: The state to change.
        backend: Holds the weights.
        config: The method.
        layers: What the run has written of this rank's part of every target.
        fingerprints: Hash of each weight that the run began with.
        budgets: Largest number of deltas of each; None if a version has written them that knew only the density.
    """
    state.mask_sizes, state.fingerprints = [layer.mask_size for layer in layers], fingerprints
    asked = zip(budgets, deltas_asked_for(backend, config), strict=True)
    state.budgets = [most if budget is None else budget for budget, most in asked]
    if config.pattern is not None:
        state.group_prints = NMGroups(backend, config.pattern).fingerprints([layer.mask for layer in layers])
