"""Names, checksums and error handling across ranks, shared by the writing and the reading of checkpoints."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from seft_dist.backends import Backend
from seft_dist.files.hashing import sha256_of
from seft_dist.files.reading import read_json
from seft_dist.files.writing import write_json
from seft_dist.io.checkpoint.schema import CheckpointManifest, check_manifest
from seft_dist.optim import agreement

FORMAT_VERSION = 1
MANIFEST = "checkpoint.json"


class DamagedError(ValueError):
    """A file of a checkpoint is missing, truncated or altered. An older checkpoint may still be usable."""


def complete(folder: Path | str) -> list[Path]:
    """Return the complete checkpoints in a folder, the newest last.

    Only names that ``Saver`` gives are considered. A copy with another name, e.g. step-00000040-good, is the user's
    own.
    """
    folder = Path(folder)
    checkpoints = _numbered(folder, "step")
    # A process that was killed between the two renames of a step's second save left its first one under this name
    for number, path in _numbered(folder, "replaced").items():
        checkpoints.setdefault(number, path)
    return [checkpoints[number] for number in sorted(checkpoints) if (checkpoints[number] / MANIFEST).exists()]


def latest(folder: Path | str) -> Path | None:
    """Return the newest complete checkpoint in a folder, or None if there is none."""
    checkpoints = complete(folder)
    return checkpoints[-1] if checkpoints else None


def tidy(folder: Path | str, keep: int) -> None:
    """Remove older checkpoints, and the remains of saves and removals that were interrupted.

    Args:
        folder: Folder of a run's checkpoints.
        keep: Number of complete checkpoints to keep, the newest; those that one of these needs stay as well.
    """
    folder = Path(folder)
    for kind in ("partial", "removed"):
        for path in _numbered(folder, kind).values():
            shutil.rmtree(path, ignore_errors=True)
    steps = _numbered(folder, "step")
    for number, path in _numbered(folder, "replaced").items():
        if number in steps and _is_intact(steps[number]):
            remove(path)
    checkpoints = complete(folder)
    needed = {number for path in checkpoints[-keep:] for number in _needs(path)}
    for path in checkpoints[:-keep]:
        if _number(path) not in needed:
            remove(path)


def _is_intact(checkpoint: Path) -> bool:
    try:
        manifest = read_manifest(checkpoint)
        for rank, expected in enumerate(manifest["sha256"]):
            verify_checksum(checkpoint / rank_file(rank, manifest["world_size"]), expected)
    except (ValueError, OSError):
        return False
    return True


def _needs(checkpoint: Path) -> list[int]:
    try:
        return read_manifest(checkpoint).get("needs", [])
    except ValueError:  # a damaged one is reported by those who load it
        return []


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _numbered(folder: Path, kind: str) -> dict[int, Path]:
    """Find the folders whose names are ``kind`` and a number of steps, by that number. Links are left to the user."""
    numbered = {}
    for path in folder.glob(f"{kind}-*"):
        number = path.name.removeprefix(f"{kind}-")
        if (
            number.isascii()
            and number.isdecimal()
            and path.name == f"{kind}-{int(number):08d}"
            and not path.is_symlink()
        ):
            numbered[int(number)] = path
    return numbered


def checkpoint_of(folder: Path, step: int) -> Path | None:
    """Return the complete checkpoint of a step, or None if there is none."""
    return next((path for path in complete(folder) if _number(path) == step), None)


def rank_file(rank: int, world_size: int) -> str:
    """Name of the file with the tensors that one rank owned."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, with a checksum of itself, and sync it and the folder to disk.

    Raises:
        OSError: The file cannot be written.
    """
    content = dict(manifest) | {"manifest_sha256": _digest(manifest)}
    write_json(folder / MANIFEST, content)


def read_manifest(checkpoint: Path | str) -> CheckpointManifest:
    """Read and check a checkpoint's manifest.

    Raises:
        DamagedError: It is missing or altered, or lacks entries of a manifest.
        ValueError: It is intact, but of another format version.
    """
    file = Path(checkpoint) / MANIFEST
    try:
        content = read_json(file, dict[str, Any])
    except (OSError, ValueError) as error:
        newest = latest(checkpoint)
        inside = "" if newest is None else f"; the newest one inside it is {newest}"
        raise DamagedError(
            f"{checkpoint} is no complete checkpoint ({error}): choose a folder with a {MANIFEST}{inside}"
        ) from error
    # The checksum comes first: a damaged version number must count as damage, so that an older checkpoint is tried
    if content.pop("manifest_sha256", None) != _digest(content):
        raise DamagedError(f"{file} is damaged: its checksum does not fit; use an older checkpoint")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{checkpoint} has format version {version}, this program reads {FORMAT_VERSION}: use the program that "
            "wrote it"
        )
    try:
        return check_manifest(content, str(file))
    except ValueError as error:
        raise DamagedError(f"{error}; use an older checkpoint") from error


def verify_checksum(file: Path, expected: str) -> None:
    """Compare the SHA-256 of a checkpoint's file with the one in the manifest.

    Args:
        file: The file.
        expected: SHA-256 in hexadecimal digits.

    Raises:
        DamagedError: The file is missing or altered.
    """
    try:
        with open(file, "rb") as handle:
            actual = sha256_of(handle).hexdigest()
    except FileNotFoundError as error:
        raise DamagedError(f"{file} is missing: use an older checkpoint") from error
    if actual != expected:
        raise DamagedError(
            f"{file} is damaged: SHA-256 {actual[:12]}..., written with {expected[:12]}...; use an older checkpoint"
        )


def sync_and_hash(file: Path) -> bytes:
    """Sync a file to disk, and return the SHA-256 of its content."""
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())
        return sha256_of(handle).digest()


def io_on_all_ranks(backend: Backend, act: Callable[[], Any]) -> None:
    """Call a function on every rank; if it raises on any rank, raise that error on all of them. Collective.

    Without this, the ranks that succeeded would wait for ever in the next collective.

    Args:
        backend: Backend whose ranks take part.
        act: Function to call; it must not enter collectives.

    Raises:
        OSError: A rank could not read or write.
        ValueError: A check failed on a rank; ``DamagedError`` if every rank that failed raised it.
    """

    def read_or_write() -> None:
        try:
            act()
        except SafetensorError as error:
            raise OSError(str(error)) from error

    agreement.raise_on_all_ranks(backend, read_or_write, (DamagedError, ValueError, OSError))


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that one that is removed in part never looks complete."""
    going = checkpoint.with_name(f"removed-{checkpoint.name.rpartition('-')[2]}")
    shutil.rmtree(going, ignore_errors=True)
    with contextlib.suppress(OSError):  # a checkpoint that cannot be removed does no harm
        os.rename(checkpoint, going)
        shutil.rmtree(going, ignore_errors=True)


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(manifest), sort_keys=True).encode()).hexdigest()
