"""Reading the records of runs with every entry that a comparison needs."""

from pathlib import Path
from typing import Annotated, Any

from typing_extensions import TypedDict

from seft_dist.files.kinds import Within, check_kind, lenient
from seft_dist.results.run_files import read_lines
from seft_dist.training.manifest import read_manifest
from seft_dist.training.metrics import FILE as METRICS


@lenient
class _Update(TypedDict):
    lr: Any
    betas: Any
    eps: Any
    weight_decay: Any
    max_grad_norm: Any


@lenient
class _Config(TypedDict):
    log_every: int
    optim: _Update


@lenient
class _Layout(TypedDict):
    backend: str
    world_size: int
    deepspeed: dict[str, Any] | None


@lenient
class _Code(TypedDict):
    source: Any


@lenient
class _Attempt(TypedDict):
    first_step: int
    config: _Config
    optimizer: _Update | None
    layout: _Layout
    versions: dict[str, Any]
    numerics: dict[str, Any]
    code: _Code
    hosts: list[dict[str, Any]]


@lenient
class _Data(TypedDict):
    fingerprint: Any
    global_batch: int


@lenient
class _Final(TypedDict):
    step: int
    loss: float | None
    digest: str
    layers: dict[str, list[str]]


@lenient
class _Manifest(TypedDict):
    model: Any
    dtype: str
    dropout: bool
    data: _Data
    attempts: Annotated[list[_Attempt], Within(1)]
    final: _Final | None


@lenient
class _Step(TypedDict):
    step: int
    loss: float | None
    grad_norm: float | None
    lr: float | None


def read_comparable(path: Path) -> dict[str, Any]:
    """Read the manifest of a run that is to be compared.

    Args:
        path: The file, or the folder of a run.

    Raises:
        ValueError: There is none, or an entry is missing or of another type; names both.
    """
    content = read_manifest(path)
    check_kind(content, _Manifest, f"the manifest of {path}")
    return content


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the metrics of a run that has no trace. Losses are means over the steps since the line before.

    Raises:
        ValueError: A line is damaged; names it.
    """
    path = folder / METRICS
    if not path.is_file():
        return []
    return [{key: line[key] for key in ("step", "loss", "grad_norm", "lr")} for line in read_lines(path, _Step)]
