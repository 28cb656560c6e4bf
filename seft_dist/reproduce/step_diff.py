"""What differs between two runs in each step, from their traces (or, without layers, from their metrics)."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seft_dist.sparsity.hashes import SCALE, distance
from seft_dist.training.metrics import FILE as METRICS

_KINDS = ("support", "mask", "deltas", "weights")
_SCALARS = {"batch": "data", "lr": "learning rate", "loss": "loss", "grad_norm": "gradient norm"}


@dataclass
class LayerDifference:
    """A layer after a step."""

    name: str
    kinds: list[str]
    """Which of support, mask, deltas, weights (at the support) differ in any bit."""
    delta_distance: float
    """L2 norm of the difference of the deltas, estimated."""
    delta_relative: float
    """As a share of the deltas' norm."""
    support_positions: int | None = None
    """Positions in one support only, estimated; None: unknown, or none moved."""
    mask_positions: int | None = None
    near_ties: int | None = None
    """Positions of this layer that the evolution of this step took or left by a hair, the smaller of the two runs'."""

    @property
    def by_near_ties(self) -> bool:
        """Whether rounding can have put a few positions of support and mask on the other side of a selection."""
        moved = (self.support_positions or 0) + (self.mask_positions or 0)
        # One that falls the other way in Grow can make another fall in Adapt; and the sketches are estimates.
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
    """A step in which two runs differ."""

    step: int
    values: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """batch (a hash), lr, loss, grad_norm: those that differ, of both runs."""
    layers: list[LayerDifference] = field(default_factory=list)
    """In the model's order."""

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


def first_of(differences: list[StepDifference]) -> str:
    """The first difference in words, and the first layer, if that differs only in a later step."""
    text = f"first at {differences[0]}"
    if not differences[0].layers:
        later = next((one for one in differences if one.layers), None)
        if later is not None:
            text += f". Layers first at step {later.step}: layer {later.layers[0]}"
            text += f" and {len(later.layers) - 1} more" if len(later.layers) > 1 else ""
    return text


def step_differences(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> list[StepDifference]:
    """Steps that two runs both did and that differ.

    Args:
        first: Lines of a trace, or of the metrics as ``metrics_of`` gives them.
        second: The same of another run.
    """
    two = {line["step"]: line for line in second}
    found = [_compare(line, two[line["step"]]) for line in first if line["step"] in two]
    return [difference for difference in found if difference.values or difference.layers]


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """Steps of a run without a trace: losses are means over the steps since the line before."""
    path = folder / METRICS
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [{key: line[key] for key in ("step", "loss", "grad_norm", "lr")} for line in lines]


def _compare(first: dict[str, Any], second: dict[str, Any]) -> StepDifference:
    values = {key: (first[key], second[key]) for key in _SCALARS if key in first and first[key] != second[key]}
    found = StepDifference(first["step"], values)
    ours, theirs = first.get("layers", {}), second.get("layers", {})
    for name in dict.fromkeys([*ours, *theirs]) if ours and theirs else ():
        one, two = ours.get(name), theirs.get(name)
        if one is None or two is None:
            found.layers.append(LayerDifference(name, ["only in one run"], 0.0, 0.0))
        elif one != two:
            found.layers.append(_layer(name, one, two, first.get("topology"), second.get("topology")))
    return found


def _layer(
    name: str, one: list[Any], two: list[Any], moved: dict[str, Any] | None, moved_too: dict[str, Any] | None
) -> LayerDifference:
    kinds = [kind for kind, a, b in zip(_KINDS, one, two, strict=False) if a != b]
    apart = distance(one[4], two[4]) / SCALE
    size = max(distance(row[4], [0] * len(row[4])) for row in (one, two)) / SCALE
    found = LayerDifference(name, kinds, apart, apart / size if size else 0.0)
    if moved and moved_too and name in moved and name in moved_too:
        pairs = zip(("support", "mask"), moved[name], moved_too[name], strict=False)
        counts = {kind: round(distance(a, b) ** 2) for kind, a, b in pairs}
        found.support_positions, found.mask_positions = counts["support"], counts["mask"]
        found.near_ties = min(moved[name][2], moved_too[name][2])
    return found


def _relative(one: float, two: float) -> float:
    if one == two:
        return 0.0
    largest = max(abs(one), abs(two))
    return abs(one - two) / largest if math.isfinite(largest) else math.inf
