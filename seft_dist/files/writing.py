"""Files that are whole or not there: written under a temporary name, forced to disk, then renamed."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PART = ".part"
"""Ending of a file or folder that is still being written; whoever finds one alone may remove it."""


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole: after a kill or on a full disk it holds the old text or the new one, never a part.

    Args:
        path: The file; its folder must exist.
        text: Its new content, written as UTF-8.

    Raises:
        OSError: It cannot be written; what was there is still there, and the temporary file is gone.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file by bytes, as ``write_text`` does."""
    with replacing(path) as part:
        part.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name for a file, which replaces the file of its final name when the context ends.

    On an error the temporary file is removed, and what was there is still there.

    Args:
        path: The final name; its folder must exist.

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
    """Give a complete folder its final name, after everything in it was forced to disk.

    Args:
        part: The folder under its temporary name.
        path: The final name, in the same folder; nothing may have it.
    """
    sync_files(part)
    part.rename(path)
    sync_folder(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Replace a file by indented JSON, as ``write_text`` does."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def sync_folder(folder: Path) -> None:
    """Force a folder's names to disk, so that a rename in it survives a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_files(folder: Path) -> None:
    """Force every file in a folder to disk, before the folder gets the name that says it is complete."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            sync_folder(path)
        else:
            sync_file(path)


def sync_file(path: Path) -> None:
    """Force a file's content to disk."""
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


def put_aside(path: Path) -> Path:
    """Rename a damaged file or folder, so that it stays for whoever wants to look into it.

    Returns:
        Its new path: ``damaged-NAME``, or ``damaged-NAME-2`` and so on if there is one already.
    """
    number, aside = 1, path.with_name(f"damaged-{path.name}")
    while aside.exists() or aside.is_symlink():
        number += 1
        aside = path.with_name(f"damaged-{path.name}-{number}")
    os.rename(path, aside)
    return aside
