"""Writing files that are either complete or absent: write under a temporary name, sync to disk, then rename."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PART = ".part"
"""Suffix of a file or folder that is still being written. One that a killed program left behind may be removed."""


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically: after a kill or on a full disk it holds the old text or the new one, never a part.

    Args:
        path: The file; its folder must exist.
        text: Its new content, written as UTF-8.

    Raises:
        OSError: The file cannot be written. Its old content is unchanged, and the temporary file is removed.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file by these bytes, with the guarantees of ``write_text``."""
    with replacing(path) as part:
        part.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context with a temporary name for a file, which replaces the file of the final name when the context ends.

    On an error the temporary file is removed, and the old file is unchanged.

    Args:
        path: The final name; its folder must exist.

    Yields:
        The temporary name.

    Raises:
        OSError: The file cannot be written.
    """
    part = path.with_name(path.name + PART)
    try:
        yield part
        sync_file(part)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def publish_folder(part: Path, path: Path) -> None:
    """Give a complete folder its final name, after everything in it was synced to disk.

    Args:
        part: The folder under its temporary name.
        path: The final name, in the same folder; nothing may have it.
    """
    sync_files(part)
    part.rename(path)
    sync_folder(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Replace a file by indented JSON, with the guarantees of ``write_text``."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def sync_folder(folder: Path) -> None:
    """Sync the entries of a folder to disk, so that a rename in it survives a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_files(folder: Path) -> None:
    """Sync every file in a folder to disk, before the folder gets the name that marks it as complete."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            sync_folder(path)
        else:
            sync_file(path)


def sync_file(path: Path) -> None:
    """Sync a file's content to disk."""
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


def put_aside(path: Path) -> Path:
    """Rename a damaged file or folder instead of deleting it, so that a user can inspect it.

    Returns:
        The new path: ``damaged-NAME``, or ``damaged-NAME-2`` and so on if that exists already.
    """
    number, aside = 1, path.with_name(f"damaged-{path.name}")
    while aside.exists() or aside.is_symlink():
        number += 1
        aside = path.with_name(f"damaged-{path.name}-{number}")
    os.rename(path, aside)
    return aside
