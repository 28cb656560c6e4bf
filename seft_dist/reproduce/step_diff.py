"""Differences between two runs in each step, from their traces or, without layers, from their metrics."""

import math
from dataclasses import dataclass, field
from typing import Any

from seft_dist.sparsity.hashes import SCALE, distance

_KINDS = ("support", "mask", "deltas", "weights")
_SCALARS = {"batch": "data", "lr": "learning rate", "loss": "loss", "grad_norm": "gradient norm"}


@dataclass
class LayerDifference:
    """Differences of one layer between two runs, after a step."""

    name: str
    kinds: list[str]
    """Those of support, mask, deltas and weights (at the support) that differ in any bit."""
    delta_distance: float
    """Estimated L2 norm of the difference of the deltas."""
    delta_relative: float
    """``delta_distance`` as a share of the norm of the deltas."""
    support_positions: int | None = None
    """Estimated number of positions in one support only; None: unknown, or no position moved."""
    mask_positions: int | None = None
    """Estimated number of positions in one mask only; None: unknown, or no position moved."""
    near_ties: int | None = None
    """Positions whose selection rounding can have decided, the smaller number of both runs; None: no evolution."""

    @property
    def by_near_ties(self) -> bool:
        """Rounding can have put the differing positions of support and mask on the other side of a selection."""
        moved = (self.support_positions or 0) + (self.mask_positions or 0)
        # The factor of 4 leaves room: a position that is decided differently in Grow can change another one in Adapt,
        # and the numbers are estimates.
        return self.near_ties is not None and moved <= 4 * self.near_ties

    def __str__(self) -> str:
        parts = []
        for kind, count in (("support", self.support_positions), ("mask", self.mask_positions)):
            if kind in self.kinds:
                parts.append(f"{kind} (about {count:,} positions)" if count else kind)
        if "deltas" in self.kinds:
            size = f"about {self.delta_relative:.1e} of their norm" if self.delta_distance else "less than 1e-12"
            parts.append(f"deltas ({size})")
        if "weights" in self.kinds and len(self.kinds) == 1:
            parts.append("weights at equal support and deltas")
        return f"{self.name}: {', '.join(parts)}"


@dataclass
class StepDifference:
    """Differences between two runs in one step."""

    step: int
    values: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Those of batch (a hash), lr, loss and grad_norm that differ, with the values of both runs."""
    layers: list[LayerDifference] = field(default_factory=list)
    """The layers that differ, in the order of the model."""

    @property
    def loss_relative(self) -> float:
        """Difference of the losses as a share of the larger one."""
        return _relative(*self.values["loss"]) if "loss" in self.values else 0.0

    @property
    def moved(self) -> list[LayerDifference]:
        """The layers whose support or mask differs."""
        return [layer for layer in self.layers if {"support", "mask", "only in one run"} & set(layer.kinds)]

    def __str__(self) -> str:
        parts = []
        for key, (one, two) in self.values.items():
            size = "" if key == "batch" else f" {one:.9g} against {two:.9g} ({_relative(one, two):.1e})"
            parts.append(_SCALARS[key] + size)
        if self.layers:
            count = f" and {len(self.layers) - 1} more layers" if len(self.layers) > 1 else ""
            parts.append(f"layer {self.layers[0]}{count}")
        return f"step {self.step}, {'; '.join(parts)}"


def describe_first(differences: list[StepDifference]) -> str:
    """Describe the first step that differs and, if only later steps differ in layers, the first of those too."""
    text = f"first at {differences[0]}"
    if not differences[0].layers:
        later = next((one for one in differences if one.layers), None)
        if later is not None:
            text += f". Layers first at step {later.step}: layer {later.layers[0]}"
            text += f" and {len(later.layers) - 1} more" if len(later.layers) > 1 else ""
    return text


def step_differences(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> list[StepDifference]:
    """Compare the steps that two runs both did, and return those that differ.

    Args:
        first: Lines of a run's trace, or of its metrics as ``read_metrics`` returns them.
        second: The same of another run.
    """
    two = {line["step"]: line for line in second}
    differences = [_compare_step(line, two[line["step"]]) for line in first if line["step"] in two]
    return [difference for difference in differences if difference.values or difference.layers]


def _compare_step(first: dict[str, Any], second: dict[str, Any]) -> StepDifference:
    values = {key: (first[key], second[key]) for key in _SCALARS if key in first and first[key] != second[key]}
    difference = StepDifference(first["step"], values)
    ours, theirs = first.get("layers", {}), second.get("layers", {})
    for name in dict.fromkeys([*ours, *theirs]) if ours and theirs else ():
        one, two = ours.get(name), theirs.get(name)
        if one is None or two is None:
            difference.layers.append(LayerDifference(name, ["only in one run"], 0.0, 0.0))
        elif one != two:
            difference.layers.append(_compare_layer(name, one, two, first.get("topology"), second.get("topology")))
    return difference


def _compare_layer(
    name: str, one: list[Any], two: list[Any], evolved: dict[str, Any] | None, evolved_too: dict[str, Any] | None
) -> LayerDifference:
    """Compare the traced hashes and sketches of one layer.

    Args:
        name: Name of the layer.
        one: Hashes of support, mask, deltas and weights in the first run, and a sketch of its deltas.
        two: The same of the second run.
        evolved: In a step with an evolution, by layer: sketches of support and mask, and number of near-ties.
        evolved_too: The same of the second run.
    """
    kinds = [kind for kind, a, b in zip(_KINDS, one, two, strict=False) if a != b]
    apart = distance(one[4], two[4]) / SCALE
    size = max(distance(row[4], [0] * len(row[4])) for row in (one, two)) / SCALE
    difference = LayerDifference(name, kinds, apart, apart / size if size else 0.0)
    if evolved and evolved_too and name in evolved and name in evolved_too:
        pairs = zip(("support", "mask"), evolved[name], evolved_too[name], strict=False)
        counts = {kind: round(distance(a, b) ** 2) for kind, a, b in pairs}
        difference.support_positions, difference.mask_positions = counts["support"], counts["mask"]
        difference.near_ties = min(evolved[name][2], evolved_too[name][2])
    return difference


def _relative(one: float, two: float) -> float:
    if one == two:
        return 0.0
    largest = max(abs(one), abs(two))
    return abs(one - two) / largest if math.isfinite(largest) else math.inf
