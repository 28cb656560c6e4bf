"""Creation of the folders that exports write, which are either complete or absent, and copying of model settings."""

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


def check_path_is_new(path: Path, what: str = "") -> None:
    """Raise an error if the path of a new file or folder exists already, even as a broken link.

    Args:
        path: The file or folder to create.
        what: Option that named it, for the error message.

    Raises:
        ValueError: The path exists.
    """
    if os.path.lexists(path):
        kind = "is a link that leads nowhere" if not path.exists() else "exists already"
        raise ValueError(f"{what}{'=' if what else ''}{path} {kind}: choose another name, or remove it")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Create a folder under a temporary name. It gets its own name at the end, or is removed if an error is raised.

    Args:
        path: Final path of the folder; it must not exist.

    Yields:
        The temporary folder.

    Raises:
        ValueError: The folder exists already, or cannot be created.
    """
    path = Path(path).expanduser()
    check_path_is_new(path)
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
    """Copy a model's files other than its weights: configuration, generation settings, tokenizer.

    Args:
        folder: Folder that gets the files.
        source: The model to copy from.
        dtype: Dtype of the weights that were written; None: as stored.
        tokenizer: Folder of another tokenizer; None: the source's.
    """
    changes: dict[str, Any] = dict(source.changes)
    if dtype is not None:
        changes |= dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))
    copy_settings(source.folder, folder, changes, tokenizer)


def folder_bytes(folder: Path, pattern: str = "*") -> int:
    """Total size in bytes of the files in a folder whose names match a pattern."""
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())
