"""Numbers of a run by target: zeros, what moved, and the sizes of the deltas; from small files and headers only."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from typing_extensions import TypedDict

from seft_dist.files.kinds import Within, check_kind, lenient
from seft_dist.files.reading import read_json, read_text
from seft_dist.io import checkpoint
from seft_dist.io.weight_files import SafetensorError, safe_open
from seft_dist.results.run_files import Count

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_MOST_SAMPLED = 2_000_000
"""Number of deltas above which only every second, third ... is looked at."""
_MOVED = ("dropped", "grown", "reactivated", "pruned", "kept")


@dataclass(frozen=True)
class TargetLocation:
    """Layer and module of a target, read from its name."""

    layer: int | None
    """Number of the decoder layer; None outside of them."""
    module: str
    """Name inside the layer; experts have one name together."""

    @classmethod
    def of(cls, name: str) -> "TargetLocation":
        """Find the location of e.g. "model.layers.0.self_attn.q_proj"."""
        match = re.match(r"(?:[^\d.][^.]*\.)*?(\d{1,6})\.(.+)$", name.removesuffix(".weight"))
        if match is None:
            return cls(None, name.removesuffix(".weight"))
        return cls(int(match[1]), re.sub(r"(?<=\.)\d+(?=\.|$)", "*", match[2]))


@dataclass(frozen=True)
class Moves:
    """Counts of what evolutions have moved in one target up to a step."""

    dropped: int
    grown: int
    reactivated: int
    pruned: int
    kept: int | None
    """Active positions that were active in the pruned model."""


@dataclass(frozen=True)
class Layers:
    """Counts of each target, by its name."""

    numel: dict[str, int] = field(default_factory=dict)
    zeros: dict[str, int] = field(default_factory=dict)
    """Zeros now; wanted ones if ``is_counted`` is False."""
    is_counted: bool = False
    off_target: list[str] = field(default_factory=list)
    """Targets whose number of zeros has changed."""
    active: dict[str, int] = field(default_factory=dict)
    """Active positions in the pruned model."""
    trained: dict[str, int] = field(default_factory=dict)
    """Deltas after the last step or, of a run that is not finished, of the first support."""
    steps: list[int] = field(default_factory=list)
    """Steps at which it is known what had moved."""
    moves: list[dict[str, Moves]] = field(default_factory=list)
    """Movements up to each of ``steps``, by target."""
    since: int = 0
    """Step after which the record of movements begins."""
    source: str = ""
    """File that the last movements come from: topology.jsonl, or delta.safetensors, which has what they add up to."""

    @property
    def by_location(self) -> dict[TargetLocation, list[str]]:
        """Targets at each location, in the order of the model."""
        locations: dict[TargetLocation, list[str]] = {}
        for name in self.numel:
            locations.setdefault(TargetLocation.of(name), []).append(name)
        return locations


@dataclass(frozen=True)
class Deltas:
    """Sizes of the deltas in the newest checkpoint."""

    step: int
    count: int
    """Deltas of the model."""
    by_layer: dict[int, list[float]]
    """QUANTILES of the absolute deltas of each decoder layer, those that are 0 (just grown) aside."""
    by_module: dict[str, list[float]]
    """The same for each kind of module."""
    zero_share: float
    """Share of deltas that are exactly 0."""


@lenient
class _Target(TypedDict):
    numel: Count
    zeros: Count
    target: Count
    trained: Count


@lenient
class _LayersFile(TypedDict):
    targets: dict[str, _Target]


@lenient
class _FirstLine(TypedDict):
    since: Count
    targets: dict[str, Annotated[list[Count], Within(2, 2)]]


_ROWS = list[tuple[Count, Count, Count, Count, Count]]


def read_layers(folder: Path, newest: Path | None) -> Layers:
    """Read the counts of each target from layers.json, topology.jsonl, the checkpoint and the header of the delta.

    Args:
        folder: Folder of the run.
        newest: Its newest checkpoint, if there is one.

    Raises:
        ValueError: A file is damaged.
    """
    values: dict[str, Any] = {}
    if newest is not None:
        values |= _from_checkpoint(newest)
    if (folder / "topology.jsonl").is_file():
        values |= _from_topology(folder / "topology.jsonl")
    if (folder / "layers.json").is_file():
        targets = read_json(folder / "layers.json", _LayersFile)["targets"]
        values |= {"numel": {name: row["numel"] for name, row in targets.items()}, "is_counted": True}
        values |= {"zeros": {name: row["zeros"] for name, row in targets.items()}}
        values |= {"off_target": [name for name, row in targets.items() if row["zeros"] != row["target"]]}
        values |= {"trained": {name: row["trained"] for name, row in targets.items()}}
    elif values.get("moves") and not values["since"]:
        values |= {"trained": {name: moves.grown for name, moves in values["moves"][0].items()}}
    if "moves" not in values and (folder / "delta.safetensors").is_file() and "numel" in values:
        values |= _from_delta(folder / "delta.safetensors", values["numel"])
    return Layers(**values)


def _from_checkpoint(path: Path) -> dict[str, Any]:
    found = checkpoint.read_manifest(path)["targets"]
    numel = {target["name"]: target["shape"][0] * target["shape"][1] for target in found}
    active = {target["name"]: target["target"] for target in found}
    return {"numel": numel, "active": active, "zeros": {name: numel[name] - active[name] for name in numel}}


def _from_topology(path: Path) -> dict[str, Any]:
    """Read the last record of a topology.jsonl: a run that older versions began may have begun a second one."""
    values: dict[str, Any] = {}
    for text in read_text(path).splitlines():
        try:
            line = json.loads(text)
            if "targets" in line:
                first = check_kind(line, _FirstLine, path.name)
                sizes = first["targets"]
                values = {"since": first["since"], "steps": [], "moves": [], "source": path.name}
                values |= {"numel": {name: row[0] for name, row in sizes.items()}}
                values |= {"active": {name: row[1] for name, row in sizes.items()}}
                values |= {"zeros": {name: row[0] - row[1] for name, row in sizes.items()}}
            rows = check_kind(line["moved"], _ROWS, path.name)
            moves = {name: Moves(*row) for name, row in zip(values["numel"], rows, strict=True)}
            step = int(line["step"])
        except (KeyError, TypeError, ValueError, RecursionError):
            continue  # damaged, or still being written
        values["steps"].append(step)
        values["moves"].append(moves)
    return values if values.get("steps") else {}


def _from_delta(path: Path, numel: dict[str, int]) -> dict[str, Any]:
    """Read how many positions joined and left the masks, which the header of a delta file tells."""
    try:
        with safe_open(path, framework="pt") as handle:
            names = set(handle.keys())
            sizes = {name: handle.get_slice(name).get_shape()[0] for name in names if name.endswith(_MOVED)}
    except (SafetensorError, OSError, IndexError) as error:
        raise ValueError(f"{path} cannot be read as a delta file: {error}") from error
    moves = {}
    for name in numel:
        joined, left = (
            sizes.get(f"{name}.{kind}", sizes.get(f"{name}.weight.{kind}", 0)) for kind in ("reactivated", "pruned")
        )
        moves[name] = Moves(0, 0, joined, left, None)
    return {"moves": [moves], "steps": [0], "source": path.name}


def read_deltas(path: Path) -> Deltas | None:
    """Read the sizes of the deltas in a checkpoint; None if it has none.

    Args:
        path: Folder of the checkpoint.

    Raises:
        ValueError: A file is damaged.
    """
    manifest = checkpoint.read_manifest(path)
    try:
        total = sum(size for _, size, _ in _values(path, 0))
        layers: dict[int, list[torch.Tensor]] = {}
        modules: dict[str, list[torch.Tensor]] = {}
        zeros = seen = 0
        for name, _, values in _values(path, max(1, total // _MOST_SAMPLED)):
            seen, zeros = seen + len(values), zeros + int((values == 0).sum())
            location, values = TargetLocation.of(name), values[values != 0]
            if location.layer is not None:
                layers.setdefault(location.layer, []).append(values)
            modules.setdefault(location.module, []).append(values)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"a file of {path} cannot be read: {error}") from error
    if not seen:
        return None
    by_layer = {layer: _quantiles(layers[layer]) for layer in sorted(layers)}
    by_module = {module: _quantiles(parts) for module, parts in modules.items()}
    return Deltas(
        step=manifest["num_steps"],
        count=total,
        by_layer={layer: found for layer, found in by_layer.items() if found},
        by_module={module: found for module, found in by_module.items() if found},
        zero_share=zeros / seen,
    )


def _values(path: Path, every: int) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Yield name, number of deltas and absolute deltas of each target in each file of a checkpoint.

    Args:
        path: Folder of the checkpoint.
        every: Only every so many deltas; 0: none, their numbers only.
    """
    for file in sorted(path.glob("rank-*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118  # not a dict
                if key.endswith(".values") and not key.endswith(".committed_values"):
                    size = handle.get_slice(key).get_shape()[0]
                    values = handle.get_tensor(key)[::every].float().abs() if every else torch.empty(0)
                    yield key.removesuffix(".values"), size, values


def _quantiles(parts: list[torch.Tensor]) -> list[float]:
    values = torch.cat(parts).sort().values
    values = values[values.isfinite()]
    return [float(values[int(q * (len(values) - 1))]) for q in QUANTILES] if len(values) else []
