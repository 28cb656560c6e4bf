"""Types of checkpoint.json, and their validation before the content is used; ``optim.restoring`` checks the tensors.

Checksums detect accidental damage. These checks detect files that another program or an editor wrote: without them, a
wrong number would show much later, in a kernel or in a collective that only some ranks enter.
"""

from typing import Annotated, Any

from typing_extensions import NotRequired, TypedDict

from seft_dist.files.kinds import Within, check_kind

MOST_RANKS = 1 << 20
MOST_POSITIONS = (1 << 63) - 1
"""Largest number of positions in a weight: flat positions are int64."""
_Count = Annotated[int, Within(0, MOST_POSITIONS)]
_Size = Annotated[int, Within(1, MOST_POSITIONS)]


class TargetEntry(TypedDict):
    """Description of one target in a checkpoint: its shape, its chunk on a rank, and its number of active weights."""

    name: str
    shape: Annotated[list[_Size], Within(2, 2)]
    chunk: Annotated[int, Within(0)]
    target: _Count
    fingerprint: int
    budget: NotRequired[_Count]
    """Largest number of deltas; earlier versions do not have it, nor do other methods."""


class CheckpointManifest(TypedDict):
    """Content of checkpoint.json, without its own checksum."""

    format_version: int
    num_steps: Annotated[int, Within(0)]
    method: dict[str, Any]
    world_size: Annotated[int, Within(1, MOST_RANKS)]
    backend: str
    dtype: str
    window_steps: Annotated[int, Within(0)] | None
    targets: Annotated[list[TargetEntry], Within(1)]
    extra: dict[str, Any]
    sha256: list[str]
    needs: NotRequired[list[Annotated[int, Within(0)]]]
    """Steps of earlier checkpoints that a run which goes on from here may still read."""


def check_manifest(content: dict[str, Any], name: str) -> CheckpointManifest:
    """Validate the content of checkpoint.json.

    Args:
        content: The content without its checksum; it may have further entries.
        name: Name of the file, for the error message.

    Raises:
        ValueError: An entry is missing or wrong; the message names it and what is needed.
    """
    manifest = check_kind(content, CheckpointManifest, name)
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
                f"{target['chunk']}: needs at most {MOST_POSITIONS} positions, as many active ones, and chunks for all "
                "of them"
            )
    return manifest
