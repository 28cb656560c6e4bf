"""Names, checksums and the agreement of ranks: what writing and reading a checkpoint share."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from seft_dist.backends import Backend
from seft_dist.files.hashing import sha256_of

FORMAT_VERSION = 1
MANIFEST = "checkpoint.json"
WINDOW_OWN = ("positions", "total", "squares")  # window statistics with one value for each own weight or candidate
WINDOW_SHARED = ("rows", "cols")  # the same on every rank
WINDOW_SUMS = ("norms", "outputs")  # of each rank's own tokens
_MESSAGE_BYTES = 1000


class DamagedError(ValueError):
    """A file of a checkpoint is missing, cut or altered; an older checkpoint may still be whole."""


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, the newest last. Local."""
    found = {path.parent.name: path.parent for path in folder.glob(f"step-*/{MANIFEST}")}
    for path in folder.glob(f"replaced-*/{MANIFEST}"):  # killed between the two renames of one step's second save
        found.setdefault(path.parent.name.replace("replaced", "step"), path.parent)
    return [found[name] for name in sorted(found)]


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder, None if there is none. Local."""
    found = complete(folder)
    return found[-1] if found else None


def rank_file(rank: int, world_size: int) -> str:
    """Name of the file with what one rank owned. Local."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, with a checksum of itself, and force it and the folder to disk. Local.

    Raises:
        OSError: It cannot be written.
    """
    content = manifest | {"manifest_sha256": _digest(manifest)}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1))
    sync(folder / MANIFEST)
    sync_folder(folder)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Read and check a checkpoint's manifest. Local.

    Raises:
        DamagedError: It is missing or altered.
        ValueError: It is of another format version.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        version = manifest.get("format_version")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise DamagedError(
            f"{checkpoint} is no complete checkpoint ({error}): choose a folder with a {MANIFEST}"
        ) from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{checkpoint} has format version {version}, this program reads {FORMAT_VERSION}: use the program that wrote it"
        )
    if manifest.pop("manifest_sha256", None) != _digest(manifest):
        raise DamagedError(f"{checkpoint / MANIFEST} is damaged: its checksum does not fit; use an older checkpoint")
    return manifest


def check_sum(file: Path, expected: str) -> None:
    """Check a file of a checkpoint. Local.

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
    """Force a file to disk; its SHA-256. Local."""
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())
        return sha256_of(handle).digest()


def sync_folder(folder: Path) -> None:
    """Force a folder's names to disk. Local."""
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def everywhere(backend: Backend, act: Callable[[], Any]) -> None:
    """Act on every rank; if it failed anywhere, raise everywhere, with the words of the first that failed. **Collective**.

    Args:
        backend: Whose ranks act.
        act: Must not enter collectives.

    Raises:
        OSError: A rank could not read or write.
        ValueError: A rank found something wrong; ``DamagedError`` if all that failed did.
    """
    error: Exception | None = None
    try:
        act()
    except (OSError, ValueError, SafetensorError) as caught:
        error = OSError(str(caught)) if isinstance(caught, SafetensorError) else caught
    kind = 0 if error is None else 1 if isinstance(error, DamagedError) else 2 if isinstance(error, ValueError) else 3
    rows = [backend.owners.stack(torch.tensor([kind]))]
    rows = [backend.replicas.stack(rows[0]).view(-1)]
    if not rows[0].any():
        return
    words = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8)
    text = str(error or "").encode()[:_MESSAGE_BYTES]
    words[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    table = backend.replicas.stack(backend.owners.stack(words)).view(-1, _MESSAGE_BYTES)
    worst = int(rows[0].argmax())
    message = bytes(table[worst].tolist()).rstrip(b"\0").decode(errors="replace")
    where = "" if error is not None else f"rank {worst}: "
    raise {1: DamagedError, 2: ValueError, 3: OSError}[int(rows[0][worst])](f"{where}{message}") from error


def remove(folder: Path) -> None:
    """Remove a checkpoint such that it is never taken for a complete one half way. Local."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
