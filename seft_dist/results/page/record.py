"""Reading of a run's folder for its page: a file that is missing or damaged is named, and the rest is used."""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from seft_dist.config.baselines import VARIANTS
from seft_dist.files.reading import read_json, read_text
from seft_dist.io import checkpoint
from seft_dist.results.page.layers import Deltas, Layers, read_deltas, read_layers
from seft_dist.results.run_files import Evaluations, read_evaluations, read_run_config

T = TypeVar("T")

CONFIG, METRICS, RESULT, EVALUATION, MANIFEST = (
    "config.yaml",
    "metrics.jsonl",
    "result.json",
    "eval.json",
    "manifest.json",
)
_MOST_RUNS = 24
VALIDATION = "validation.loss"
"""Entry of a line of metrics.jsonl: the loss on validation data."""


@dataclass(frozen=True)
class RunRecord:
    """A run as far as its folder tells; empty where there is no file."""

    folder: Path
    label: str
    """Name of the run on the page, different from those of the others."""
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved TrainConfig."""
    lines: list[dict[str, Any]] = field(default_factory=list)
    """Lines of metrics.jsonl, by step."""
    result: dict[str, Any] = field(default_factory=dict)
    """Content of result.json."""
    evaluations: Evaluations | None = None
    """Content of eval.json."""
    manifest: dict[str, Any] = field(default_factory=dict)
    """Content of manifest.json."""
    layers: Layers = field(default_factory=Layers)
    deltas: Deltas | None = None
    """Deltas of the newest checkpoint."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of the files and folders that the run has written, by name."""
    problems: list[str] = field(default_factory=list)
    """Files that could not be read, and why."""

    @property
    def is_finished(self) -> bool:
        """True if the run has a result."""
        return bool(self.result)

    @property
    def step(self) -> int:
        """The last step that is known to be done."""
        last = self.lines[-1]["step"] if self.lines else 0
        return max(last, whole(self.result, "steps") or 0)

    @property
    def steps(self) -> int | None:
        """Steps of the whole run, if the configuration says."""
        return whole(self.config, "steps")

    @property
    def exported_step(self) -> int | None:
        """Step of the exported model, if the result says that it is the best one's."""
        validation: Any = self.result.get("validation")
        best = validation.get("best") if isinstance(validation, dict) and self.config.get("export") == "best" else None
        return whole(best, "step") if isinstance(best, dict) else None

    @property
    def method(self) -> str:
        """Name of the method, as ``--method`` takes it."""
        return str(self.config.get("method") or self.result.get("method") or "seft")

    @property
    def is_seft(self) -> bool:
        """True if the method is SEFT or a setting of it, so that there are deltas."""
        return self.method in VARIANTS

    @property
    def evolutions(self) -> list[dict[str, Any]]:
        """Records of the evolutions, each with its step."""
        found = [(line["step"], line.get("evolution")) for line in self.lines]
        return [{**evolution, "step": step} for step, evolution in found if isinstance(evolution, dict)]

    @property
    def later_evolutions(self) -> list[dict[str, Any]]:
        """Records of the evolutions after the choice of the first support."""
        return [evolution for evolution in self.evolutions if not evolution.get("first")]

    @property
    def layout(self) -> dict[str, Any]:
        """Layout of the last attempt, as the manifest says."""
        found = self.attempts[-1].get("layout") if self.attempts else None
        return found if isinstance(found, dict) else {}

    @property
    def world_size(self) -> int:
        """Number of ranks; 1 if it is not known."""
        return whole(self.layout, "world_size") or whole(self.result, "world_size") or 1

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a number in lines of metrics.jsonl; values that are not finite are left out."""
        pairs = [(line["step"], number(line, key)) for line in self.lines]
        known = [(step, value) for step, value in pairs if value is not None and math.isfinite(value)]
        return [step for step, _ in known], [value for _, value in known]

    def setting(self, name: str) -> Any:
        """Value of a setting by its dotted name; None if it is not known."""
        value: Any = self.config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """Attempts of the manifest."""
        found = self.manifest.get("attempts")
        return [attempt for attempt in found if isinstance(attempt, dict)] if isinstance(found, list) else []


def number(values: dict[str, Any], key: str) -> float | None:
    """Return a number of a JSON object, inner ones by dotted names; None if there is none."""
    value: Any = values
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def whole(values: dict[str, Any], key: str) -> int | None:
    """Return a whole number of a JSON object; None if there is none."""
    value = values.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def read_records(folders: Sequence[Path]) -> list[RunRecord]:
    """Read runs, finished or not.

    Args:
        folders: Their folders, each once.

    Raises:
        ValueError: A folder is no run, is given twice, or there are too many.
    """
    if len(folders) > _MOST_RUNS:
        raise ValueError(f"{len(folders)} runs: a page shows at most {_MOST_RUNS}; seft sweep tabulates more")
    whole_paths = [folder.resolve() for folder in folders]
    for folder, path in zip(folders, whole_paths, strict=True):
        if whole_paths.count(path) > 1:
            raise ValueError(f"{folder} is given twice: name each run once")
        if not (path / CONFIG).is_file() and not (path / METRICS).is_file():
            raise ValueError(
                f"{folder} is no run: {CONFIG} is missing; needs the folder that seft train wrote (its --output)"
            )
    return [_read(path, label) for path, label in zip(whole_paths, labels_of(whole_paths), strict=True)]


def labels_of(folders: Sequence[Path]) -> list[str]:
    """Name runs by the parts of their paths that differ; a single run by the name of its folder."""
    parts = [folder.parts for folder in folders]
    if len(folders) == 1:
        return [folders[0].name or str(folders[0])]
    common = len(os.path.commonprefix(parts))
    rests = [part[common:] for part in parts]
    behind = len(os.path.commonprefix([rest[::-1] for rest in rests]))
    shortest = min(map(len, rests))
    behind = min(behind, max(shortest - 1, 0))
    return ["/".join(rest[: len(rest) - behind]) or folder.name for rest, folder in zip(rests, folders, strict=True)]


def _read(folder: Path, label: str) -> RunRecord:
    """Read whatever a folder holds; what cannot be read becomes a problem of the record, not an error."""
    problems: list[str] = []

    def attempt(act: Callable[[Path], T], name: str, otherwise: T) -> T:
        try:
            return act(folder / name)
        except FileNotFoundError:
            return otherwise
        except (OSError, ValueError) as error:
            problems.append(str(error))
            return otherwise

    def read_object(path: Path) -> dict[str, Any]:
        return read_json(path, dict[str, Any])

    no_lines: tuple[list[dict[str, Any]], int] = ([], 0)
    nothing: dict[str, Any] = {}
    lines, damaged = attempt(_read_lines, METRICS, no_lines)
    if damaged:
        problems.append(f"{damaged} lines of {folder / METRICS} cannot be read and are left out")
    newest = checkpoint.latest(folder / "checkpoints") if (folder / "checkpoints").is_dir() else None
    config = attempt(read_run_config, CONFIG, nothing)
    is_seft = config.get("method", "seft") in VARIANTS
    return RunRecord(
        folder=folder,
        label=label,
        config=config,
        lines=lines,
        result=attempt(read_object, RESULT, nothing),
        evaluations=attempt(read_evaluations, EVALUATION, None),
        manifest=attempt(read_object, MANIFEST, nothing),
        layers=attempt(lambda path: read_layers(path, newest), "", Layers()),
        deltas=attempt(lambda _: read_deltas(newest), "", None) if newest and is_seft else None,
        sizes=_sizes(folder),
        problems=problems,
    )


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Read the lines of metrics.jsonl that can be read, by step.

    Returns:
        The lines, and the number of damaged ones; a last line that is still being written counts as neither.
    """
    lines: dict[int, dict[str, Any]] = {}
    damaged, texts = 0, read_text(path).split("\n")
    for text in texts[:-1]:  # behind the last line end is nothing, or a line that is being written
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        step = whole(line, "step") if isinstance(line, dict) else None
        if step is None or step < 1:
            damaged += 1
        else:
            lines[step] = lines.get(step, {}) | line
    return [lines[step] for step in sorted(lines)], damaged


def _sizes(folder: Path) -> dict[str, int]:
    sizes = {}
    for name in ("model", "delta.safetensors", "checkpoints", "adapter", "trace.jsonl", METRICS, "topology.jsonl"):
        path = folder / name
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        sizes[name] = sum(file.stat().st_size for file in files if file.is_file())
    return {name: size for name, size in sizes.items() if size}
