"""Names, checksums and the agreement of ranks: what writing and reading a checkpoint share."""

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
from seft_dist.io.checkpoint.schema import Manifest, check_manifest
from seft_dist.optim import agreement

FORMAT_VERSION = 1
MANIFEST = "checkpoint.json"


class DamagedError(ValueError):
    """A file of a checkpoint is missing, cut or altered; an older checkpoint may still be whole."""


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, the newest last.

    Only names that ``Saver`` gives count: a copy with another name, e.g. step-00000040-good, is the user's.
    """
    found = _named(folder, "step")
    for number, path in _named(folder, "replaced").items():  # killed between the two renames of one step's second save
        found.setdefault(number, path)
    return [found[number] for number in sorted(found) if (found[number] / MANIFEST).exists()]


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder, None if there is none."""
    found = complete(folder)
    return found[-1] if found else None


def tidy(folder: Path, keep: int) -> None:
    """Remove older checkpoints, and what a killed attempt has left of others.

    Args:
        folder: Holds the checkpoints of a run.
        keep: How many complete checkpoints stay.
    """
    for kind in ("partial", "removed"):
        for path in _named(folder, kind).values():
            shutil.rmtree(path, ignore_errors=True)
    steps = _named(folder, "step")
    for number, path in _named(folder, "replaced").items():
        if number in steps and (steps[number] / MANIFEST).exists():
            remove(path)
    for path in complete(folder)[:-keep]:
        remove(path)


def _named(folder: Path, kind: str) -> dict[int, Path]:
    """Folders that are called ``kind`` and a number of steps, by it; links are the user's."""
    found = {}
    for path in folder.glob(f"{kind}-*"):
        number = path.name.removeprefix(f"{kind}-")
        if (
            number.isascii()
            and number.isdecimal()
            and path.name == f"{kind}-{int(number):08d}"
            and not path.is_symlink()
        ):
            found[int(number)] = path
    return found


def rank_file(rank: int, world_size: int) -> str:
    """Name of the file with what one rank owned."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, with a checksum of itself, and force it and the folder to disk.

    Raises:
        OSError: It cannot be written.
    """
    content = dict(manifest) | {"manifest_sha256": _digest(manifest)}
    write_json(folder / MANIFEST, content)


def read_manifest(checkpoint: Path) -> Manifest:
    """Read and check a checkpoint's manifest.

    Raises:
        DamagedError: It is missing, altered, or does not hold what a manifest holds.
        ValueError: It is whole, and of another format version.
    """
    file = checkpoint / MANIFEST
    try:
        content = read_json(file, dict[str, Any])
    except (OSError, ValueError) as error:
        raise DamagedError(
            f"{checkpoint} is no complete checkpoint ({error}): choose a folder with a {MANIFEST}"
        ) from error
    # The checksum first: a version that is damaged must not hide that older checkpoints are whole
    if content.pop("manifest_sha256", None) != _digest(content):
        raise DamagedError(f"{file} is damaged: its checksum does not fit; use an older checkpoint")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{checkpoint} has format version {version}, this program reads {FORMAT_VERSION}: use the program that wrote it"
        )
    try:
        return check_manifest(content, str(file))
    except ValueError as error:
        raise DamagedError(f"{error}; use an older checkpoint") from error


def check_sum(file: Path, expected: str) -> None:
    """Check a file of a checkpoint.

    Raises:
        DamagedError: It is missing or altered.
    """
    try:
        with open(file, "rb") as handle:
            found = sha256_of(handle).hexdigest()
    except FileNotFoundError as error:
        raise DamagedError(f"{file} is missing: use an older checkpoint") from error
    if found != expected:
        raise DamagedError(
            f"{file} is damaged: SHA-256 {found[:12]}..., written with {expected[:12]}...; use an older checkpoint"
        )


def sync(file: Path) -> bytes:
    """Force a file to disk; its SHA-256."""
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())
        return sha256_of(handle).digest()


def everywhere(backend: Backend, act: Callable[[], Any]) -> None:
    """Act on every rank; if it failed anywhere, raise everywhere, with the words of the first that failed. Collective.

    Args:
        backend: Whose ranks act.
        act: Must not enter collectives.

    Raises:
        OSError: A rank could not read or write.
        ValueError: A rank found something wrong; ``DamagedError`` if all that failed did.
    """

    def read_or_write() -> None:
        try:
            act()
        except SafetensorError as error:
            raise OSError(str(error)) from error

    agreement.raise_on_all_ranks(backend, read_or_write, (DamagedError, ValueError, OSError))


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint such that it is never taken for a complete one half way."""
    going = checkpoint.with_name(f"removed-{checkpoint.name.rpartition('-')[2]}")
    shutil.rmtree(going, ignore_errors=True)
    with contextlib.suppress(OSError):  # one that cannot be removed does no harm
        os.rename(checkpoint, going)
        shutil.rmtree(going, ignore_errors=True)


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(manifest), sort_keys=True).encode()).hexdigest()
