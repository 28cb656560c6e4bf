"""Folders that exports write: complete or not there at all, with the settings that belong to a model."""

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from seft_dist.files.writing import sync_files, sync_folder
from seft_dist.io.models import TOKENIZER_FILES, Source


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Make a folder under a temporary name, which becomes its own at the end, or vanishes on an error. Local.

    Raises:
        ValueError: It exists already, or cannot be made.
    """
    if path.exists():
        raise ValueError(f"{path} exists already: choose another folder, or remove it")
    folder = path.with_name(path.name + ".part")
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
    sync_files(folder)
    folder.rename(path)
    sync_folder(path.parent)


def save_settings(folder: Path, source: Source, dtype: torch.dtype | None, tokenizer: Path | None = None) -> None:
    """Copy what belongs to a model beside its weights: configuration, generation settings, tokenizer. Local.

    Args:
        folder: Gets the files.
        source: The model they are taken from.
        dtype: Type of the weights written; None: as stored, and config.json is copied byte for byte.
        tokenizer: Folder of another tokenizer; None: the source's.
    """
    if dtype is None:
        shutil.copyfile(source.folder / "config.json", folder / "config.json")
    else:
        config = copy.deepcopy(source.config)
        config.dtype = dtype
        config.save_pretrained(folder)
    origins = ((source.folder, ("generation_config.json",)), (tokenizer or source.folder, TOKENIZER_FILES))
    for origin, names in origins:
        for name in names:
            if (origin / name).is_file():
                shutil.copyfile(origin / name, folder / name)


def folder_bytes(folder: Path, pattern: str = "*") -> int:
    """Bytes of all files in a folder whose names fit a pattern. Local."""
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())
