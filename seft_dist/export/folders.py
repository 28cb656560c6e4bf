"""Folders that exports write: complete or not there at all, with the settings that belong to a model."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from seft_dist.files.writing import PART, publish_folder
from seft_dist.io.readers import copy_settings
from seft_dist.io.source import Source


def refuse_existing(path: Path, what: str = "") -> None:
    """Raise an error if anything has a name that is to be made; a link that leads nowhere has it too.

    Args:
        path: The file or folder to make.
        what: The option that named it, for the message.

    Raises:
        ValueError: It is taken.
    """
    if os.path.lexists(path):
        kind = "is a link that leads nowhere" if not path.exists() else "exists already"
        raise ValueError(f"{what}{'=' if what else ''}{path} {kind}: choose another name, or remove it")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Make a folder under a temporary name, which becomes its own at the end, or vanishes on an error.

    Raises:
        ValueError: It exists already, or cannot be made.
    """
    path = Path(path).expanduser()
    refuse_existing(path)
    folder = path.with_name(path.name + PART)
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir()):
        raise ValueError(
            f"{folder}, where {path.name} is put together, is no folder: remove it, or choose another name"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
    except OSError as error:
        raise ValueError(f"{path} cannot be made ({error}): choose another folder") from error
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    publish_folder(folder, path)


def save_settings(folder: Path, source: Source, dtype: torch.dtype | None, tokenizer: Path | None = None) -> None:
    """Copy what belongs to a model beside its weights: configuration, generation settings, tokenizer.

    Args:
        folder: Gets the files.
        source: The model they are taken from.
        dtype: Type of the weights written; None: as stored.
        tokenizer: Folder of another tokenizer; None: the source's.
    """
    changes: dict[str, Any] = dict(source.changes)
    if dtype is not None:
        changes |= dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))
    copy_settings(source.folder, folder, changes, tokenizer)


def folder_bytes(folder: Path, pattern: str = "*") -> int:
    """Bytes of all files in a folder whose names fit a pattern."""
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())
