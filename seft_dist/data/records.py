"""The records of a data set: where they are read from, how their kind is determined, and which rows are used."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets

from seft_dist.config import DataConfig
from seft_dist.data.data_files import (
    BUILDERS,
    Located,
    find_data_files,
    hash_files,
    is_pattern,
    read_located,
    without_none,
)

LOCATION = "place"
"""Name of the column with the file and line of a record of local files."""
SYSTEM = "system"
"""Column in which some ShareGPT files keep the system's message, beside the conversation."""
_VALUE = "\0value:"
"""Beginning of the text of a column that usually holds text, and here held a list or an object."""
_NUM_SAMPLED = 100
"""Number of records whose fields determine the kind of a data set."""
_FORMAT = 2
"""Version of the columns below, part of the cache's key: to be raised when the same files give other columns."""


def read_records(config: DataConfig) -> tuple[Any, str, DataConfig]:
    """Read a file, a folder or a hub data set.

    Local files become columns of text: lists of messages and tools are kept as JSON, exactly as they were written,
    since Arrow would give every message the fields of all others. The columns are cached under a hash of the files'
    bytes.

    Args:
        config: The data.

    Returns:
        A ``datasets.Dataset``, memory-mapped, with the columns of its kind; the kind, "chat", "instruction" or "text";
        and the configuration with the names of the columns that were found.

    Raises:
        ValueError: There is no such data, or it cannot be read.
        OSError: The permission to read a file is missing.
    """
    if _is_of_the_hub(config):
        records = _read_hub(config)
        kind, config = record_kind(records.column_names, config)
        columns = [name for name in _columns(kind, config) if name in records.column_names]
        return records.select_columns(columns), kind, config
    if config.name is not None or config.split != "train":
        raise ValueError(
            f"data.path={config.label} is local: data.name and data.split are only for hub datasets; remove them"
        )
    files, file_kind = find_data_files(config.paths)
    digest = hash_files(files)
    sampled = [record for _, record in itertools.islice(read_located(files, file_kind), _NUM_SAMPLED)]
    kind, config = record_kind(list(dict.fromkeys(name for record in sampled for name in record)), config)
    return _read_cached(files, file_kind, kind, digest, config), kind, config


def local_files(config: DataConfig) -> list[Path]:
    """Find the files of a data set; empty if it is one of the hub.

    Raises:
        ValueError: A file does not exist.
    """
    return [] if _is_of_the_hub(config) else find_data_files(config.paths)[0]


def _is_of_the_hub(config: DataConfig) -> bool:
    """Return whether the one path is the hub name of a data set.

    Raises:
        ValueError: It is neither that nor anything local.
    """
    if len(config.paths) > 1 or is_pattern(config.label) or Path(config.label).expanduser().exists():
        return False
    if Path(config.label).suffix in BUILDERS or config.label.startswith((".", "/", "~")):
        raise ValueError(
            f"data.path={config.label} does not exist: needs a file, a folder or the hub name of a dataset"
        )
    if config.label.count("/") > 1:
        raise ValueError(f"data.path={config.label} does not exist, and is no hub name (OWNER/NAME)")
    return True


def _read_cached(files: list[Path], file_kind: str, kind: str, digest: str, config: DataConfig) -> Any:
    columns = _columns(kind, config)

    def generate() -> Iterator[dict[str, str | None]]:
        for located in read_located(files, file_kind):
            yield _text_columns(located, kind, config)

    features = {name: datasets.Value("large_string") for name in [*columns, LOCATION]}
    # A row holds its location, so the names of the files are part of the key
    key = repr((_FORMAT, digest, [str(file) for file in files], kind, columns))
    return generate_cached(generate, features, hashlib.sha256(key.encode()).hexdigest()[:32], f"as {file_kind}", config)


def generate_cached(
    rows: Callable[[], Iterator[Any]], features: dict[str, Any], fingerprint: str, how: str, config: DataConfig
) -> Any:
    """Return the data set of a fingerprint from the cache, or generate it and store it there.

    Args:
        rows: Makes the generator of rows.
        features: Type of each column.
        fingerprint: Key of the data set in the cache; it must differ if the rows differ.
        how: How the data is read, for the error message, e.g. "as jsonl".
        config: The data.

    Returns:
        A ``datasets.Dataset``, memory-mapped.

    Raises:
        OSError: A file cannot be read.
        ValueError: A row is wrong.
    """
    try:
        return datasets.Dataset.from_generator(rows, features=datasets.Features(features), fingerprint=fingerprint)
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, (ValueError, OSError)):
            raise error.__cause__ from None
        raise ValueError(f"data.path={config.label} cannot be read {how}: {cause_of(error)}") from error


def _columns(kind: str, config: DataConfig) -> list[str]:
    columns = {
        "chat": [config.messages_field, config.tools_field, SYSTEM],
        "instruction": [config.prompt_field, config.input_field, config.answer_field, config.tools_field],
        "text": [config.text_field],
    }
    return columns[kind]


def _text_columns(located: Located, kind: str, config: DataConfig) -> dict[str, str | None]:
    """Convert the columns of a record to text; a value that is missing or null becomes None."""
    where, record = located
    row: dict[str, str | None] = {LOCATION: where}
    for name in _columns(kind, config):
        value = record.get(name)
        if value is None or isinstance(value, str):
            row[name] = value
        elif kind == "chat" and name != SYSTEM:
            row[name] = json.dumps(value)
        elif name in (SYSTEM, config.tools_field) or (kind == "instruction" and isinstance(value, list)):
            row[name] = _VALUE + json.dumps(value)
        elif kind == "instruction" and isinstance(value, (int, float)) and not isinstance(value, bool):
            row[name] = str(value)
        else:
            raise ValueError(
                f"{where}: its {name!r} is no text but {type(value).__name__} (choose other columns with data.*_field)"
            )
        if kind == "chat" and name == config.messages_field and not isinstance(value, (list, type(None))):
            raise ValueError(
                f'{where}: needs a list of {{"role", "content"}} messages in {name!r}, found {type(value).__name__}'
            )
    return row


def chat_value(value: Any) -> Any:
    """Return the messages or tools of a record, from the JSON of local files or the columns of a hub data set."""
    return json.loads(value) if isinstance(value, str) and value else without_none(value)


def text_or_value(value: Any) -> Any:
    """Return the value of a column that usually holds text, from local files or the columns of a hub data set."""
    if isinstance(value, str):
        return json.loads(value.removeprefix(_VALUE)) if value.startswith(_VALUE) else value
    return without_none(value) if isinstance(value, (list, dict)) else value


def _read_hub(config: DataConfig) -> Any:
    try:
        return datasets.load_dataset(config.label, config.name, split=config.split)
    except Exception as error:  # datasets, the hub's client and its transport have no common error type
        raise ValueError(
            f"data.path={config.label} is no file or folder here, and the hub did not give a dataset of that name "
            f"(data.name={config.name}, data.split={config.split}): {cause_of(error)}"
        ) from error


def cause_of(error: BaseException) -> str:
    """Return the first line of an error's message, or of the error that caused it."""
    cause = error.__cause__ or error
    return next(iter(str(cause).strip().splitlines()), type(cause).__name__)


_USUAL: dict[str, dict[str, Any]] = {
    "chat": {"messages_field": "conversations"},
    "instruction": {"prompt_field": "prompt", "answer_field": "completion"},
}
"""Options of the columns of a kind, and their names in widespread formats other than the default."""


def record_kind(columns: list[str], config: DataConfig) -> tuple[str, DataConfig]:
    """Determine the kind of records from their columns: "chat", "instruction" or "text".

    The columns that the options name win. ``conversations``, and ``prompt`` with ``completion``, need no options.

    Args:
        columns: Names of the columns.
        config: The data; it may demand a kind.

    Returns:
        The kind, and the configuration with the names of its columns.

    Raises:
        ValueError: The columns fit no kind, or not the kind demanded.
    """
    needed = {
        "chat": [config.messages_field],
        "instruction": [config.prompt_field, config.answer_field],
        "text": [config.text_field],
    }
    kinds = list(needed) if config.kind == "auto" else [config.kind]
    for kind in kinds:
        if all(name in columns for name in needed[kind]):
            return kind, config
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for kind, names in _USUAL.items():
        is_free = kind in kinds and all(getattr(config, field) == defaults[field] for field in names)
        if is_free and all(name in columns for name in names.values()):
            return kind, dataclasses.replace(config, **names)
    wanted = "; or ".join(f"{kind}: {', '.join(needed[kind])}" for kind in kinds)
    shown = ", ".join(columns[:20]) or "none"
    raise ValueError(
        f"data.path={config.label} has the columns {shown}: needs {wanted} (choose others with "
        "data.text_field, data.prompt_field, data.answer_field, data.messages_field)"
    )
