"""What checkpoint.json and the files of ranks must hold, checked before anything is made of it.

Checksums find accidents. These checks find what somebody else's program wrote, or an editor: a wrong number would be
found much later, in a kernel or in a collective that only some ranks enter.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter
from safetensors import SafetensorError, safe_open
from typing_extensions import TypedDict

from seft_dist.files.reading import check_kind
from seft_dist.sparsity.partition import Partition

MOST_RANKS = 1 << 20
MOST_POSITIONS = (1 << 31) - 1
"""Positions are int32."""
COLUMN_TYPES: dict[str, tuple[str, ...]] = {
    "indices": ("I32",),
    "base": ("F32",),
    "values": ("F32",),
    "exp_avg": ("F32",),
    "exp_avg_sq": ("F32",),
    "age": ("I32",),
}
WINDOW_TYPES: dict[str, tuple[str, ...]] = {
    "total": ("F32", "BF16"),
    "squares": ("F32", "BF16"),
    "positions": ("I32",),
    "rows": ("F32",),
    "cols": ("F32",),
    "norms": ("F32",),
    "outputs": ("F32",),
}
_OF_ROWS, _OF_COLUMNS = ("rows", "outputs"), ("cols", "norms")  # with one value for each row or column of the weight
_Count = Annotated[int, Field(ge=0, le=MOST_POSITIONS)]
_Size = Annotated[int, Field(ge=1, le=MOST_POSITIONS)]


class Target(TypedDict):
    """One weight of a checkpoint."""

    name: str
    shape: Annotated[list[_Size], Field(min_length=2, max_length=2)]
    chunk: Annotated[int, Field(ge=0)]
    target: _Count
    fingerprint: int


class Manifest(TypedDict):
    """checkpoint.json, without its own checksum."""

    format_version: int
    num_steps: Annotated[int, Field(ge=0)]
    method: dict[str, Any]
    world_size: Annotated[int, Field(ge=1, le=MOST_RANKS)]
    backend: str
    dtype: str
    window_steps: Annotated[int, Field(ge=0)] | None
    targets: Annotated[list[Target], Field(min_length=1)]
    extra: dict[str, Any]
    sha256: list[str]


_MANIFEST = TypeAdapter(Manifest)


def check_manifest(content: dict[str, Any], name: str) -> Manifest:
    """Check what checkpoint.json holds. Local.

    Args:
        content: Without its checksum; it may have further entries.
        name: Of the file, for the message.

    Raises:
        ValueError: Says what does not fit, and what is needed.
    """
    manifest = check_kind(content, _MANIFEST, name)
    ranks = manifest["world_size"]
    if len(manifest["sha256"]) != ranks:
        raise ValueError(f"{name} has {len(manifest['sha256'])} checksums of files: needs world_size={ranks}")
    if (manifest["window_steps"] or 0) > manifest["num_steps"]:
        raise ValueError(f"{name} has window_steps={manifest['window_steps']}: needs at most num_steps")
    names = [target["name"] for target in manifest["targets"]]
    if len(set(names)) != len(names):
        raise ValueError(f"{name} names a target twice: needs each once")
    for target in manifest["targets"]:
        numel = target["shape"][0] * target["shape"][1]
        if numel > MOST_POSITIONS or target["target"] > numel or target["chunk"] * ranks < numel:
            raise ValueError(
                f"{name} describes {target['name']} with shape {target['shape']}, target {target['target']} and chunk "
                f"{target['chunk']}: needs at most {MOST_POSITIONS} positions, as many active ones, and chunks for all of them"
            )
    return manifest


def check_tensors(file: Path, manifest: Manifest, rank: int, types: dict[str, str], window: set[str]) -> None:
    """Check that a rank's file has every tensor with its type and length; reads the file's header only. Local.

    Args:
        file: Of the rank.
        manifest: Of the checkpoint.
        rank: Number of the rank that wrote it.
        types: For each target, the type of its weights as safetensors calls it.
        window: Statistics that a window of this method has on that rank once it has begun.

    Raises:
        ValueError: Names the tensor, says what was found and what is needed.
    """
    try:
        with safe_open(file, framework="pt") as handle:
            found = {key: _described(handle.get_slice(key)) for key in handle.keys()}  # noqa: SIM118, not a dict
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file: {error}") from error
    for target in manifest["targets"]:
        for key, allowed, length in _needed(target, manifest, rank, found, types[target["name"]], window):
            _check_tensor(file, found, key, allowed, length)


def _check_tensor(
    file: Path, found: dict[str, tuple[str, list[int]]], key: str, types: tuple[str, ...], length: int
) -> None:
    if key not in found:
        raise ValueError(f"{file} has no tensor {key}")
    dtype, shape = found[key]
    if dtype not in types or shape != [length]:
        raise ValueError(f"{file} has {key} of {dtype} {shape}: needs {length} values of {' or '.join(types)}")


def _needed(
    target: Target,
    manifest: Manifest,
    rank: int,
    found: dict[str, tuple[str, list[int]]],
    model_type: str,
    window: set[str],
) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """Names, types and lengths of one target's tensors; lists that nothing else bounds are as long as they say."""
    name, (rows, columns) = target["name"], target["shape"]
    own = len(Partition(rows * columns, target["chunk"], manifest["world_size"]).interval(rank))

    def length_of(key: str) -> int:
        shape = found.get(f"{name}.{key}", ("", []))[1]
        return min(shape[0], own) if len(shape) == 1 else own

    for key, types in COLUMN_TYPES.items():
        yield f"{name}.{key}", types, length_of("indices")
    yield f"{name}.mask", ("U8",), -(-own // 8)
    yield f"{name}.committed", ("I32",), length_of("committed")
    yield f"{name}.committed_values", (model_type,), length_of("committed")
    if not manifest["window_steps"]:
        return
    kept = length_of("window.positions")
    for key, allowed in WINDOW_TYPES.items():
        if key in window or f"{name}.window.{key}" in found:
            length = rows if key in _OF_ROWS else columns if key in _OF_COLUMNS else kept
            yield f"{name}.window.{key}", allowed, length


def _described(part: Any) -> tuple[str, list[int]]:
    return part.get_dtype(), part.get_shape()
