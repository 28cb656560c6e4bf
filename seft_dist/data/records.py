"""The records of a data set: where they are read from, how their kind is determined, and which rows are used."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets

from seft_dist.config import DataConfig
from seft_dist.data.data_files import BUILDERS, Located, find_data_files, hash_files, read_located, without_none

LOCATION = "place"
"""Name of the column with the file and line of a record of local files."""
_NUM_SAMPLED = 100
"""Number of records whose fields determine the kind of a data set."""
_FORMAT = 1
"""Version of the columns below, part of the cache's key: to be raised when the same files give other columns."""


def read_records(config: DataConfig) -> tuple[Any, str]:
    """Read a file, a folder or a hub data set.

    Local files become columns of text: lists of messages and tools are kept as JSON, exactly as they were written,
    since Arrow would give every message the fields of all others. The columns are cached under a hash of the files'
    bytes.

    Args:
        config: The data.

    Returns:
        A ``datasets.Dataset``, memory-mapped, with the columns of its kind; and the kind, "chat", "instruction" or
        "text".

    Raises:
        ValueError: There is no such data, or it cannot be read.
        OSError: The permission to read a file is missing.
    """
    path = Path(config.path).expanduser()
    if not path.exists():
        if path.suffix in BUILDERS or config.path.startswith((".", "/", "~")):
            raise ValueError(
                f"data.path={config.path} does not exist: needs a file, a folder or the hub name of a dataset"
            )
        if config.path.count("/") > 1:
            raise ValueError(f"data.path={config.path} does not exist, and is no hub name (OWNER/NAME)")
        records = _read_hub(config)
        kind = record_kind(records.column_names, config)
        return records.select_columns([name for name in _columns(kind, config) if name in records.column_names]), kind
    if config.name is not None or config.split != "train":
        raise ValueError(
            f"data.path={config.path} is local: data.name and data.split are only for hub datasets; remove them"
        )
    files, file_kind = find_data_files(path, config.path)
    digest = hash_files(files)
    sampled = [record for _, record in itertools.islice(read_located(files, file_kind), _NUM_SAMPLED)]
    kind = record_kind(list(dict.fromkeys(name for record in sampled for name in record)), config)
    return _read_cached(files, file_kind, kind, digest, config), kind


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
        raise ValueError(f"data.path={config.path} cannot be read {how}: {cause_of(error)}") from error


def _columns(kind: str, config: DataConfig) -> list[str]:
    columns = {
        "chat": [config.messages_field, config.tools_field],
        "instruction": [config.prompt_field, config.input_field, config.answer_field],
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
        elif kind == "chat":
            row[name] = json.dumps(value)
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


def _read_hub(config: DataConfig) -> Any:
    try:
        return datasets.load_dataset(config.path, config.name, split=config.split)
    except Exception as error:  # datasets, the hub's client and its transport have no common error type
        raise ValueError(
            f"data.path={config.path} is no file or folder here, and the hub did not give a dataset of that name "
            f"(data.name={config.name}, data.split={config.split}): {cause_of(error)}"
        ) from error


def cause_of(error: BaseException) -> str:
    """Return the first line of an error's message, or of the error that caused it."""
    cause = error.__cause__ or error
    return next(iter(str(cause).strip().splitlines()), type(cause).__name__)


def select_records(records: Any, config: DataConfig) -> Any:
    """Keep the records of the training part or of the held-out part, at most ``max_records``.

    With ``holdout_every`` n, the n-th, 2n-th, ... record is held out.

    Args:
        records: A ``datasets.Dataset``.
        config: The data.

    Raises:
        ValueError: No record is left.
    """
    chosen: Any = range(len(records))
    if config.holdout_every:
        n = config.holdout_every
        chosen = [i for i in chosen if (i % n == n - 1) == config.holdout]
    chosen = chosen[: config.max_records]
    if len(chosen) == 0:
        raise ValueError(
            f"data.path={config.path} has {len(records)} records, none of them left with "
            f"holdout_every={config.holdout_every}, holdout={config.holdout}: needs more records (a .txt file is one "
            "record; use .jsonl with one document a line)"
        )
    return records if len(chosen) == len(records) else records.select(chosen)


def record_kind(columns: list[str], config: DataConfig) -> str:
    """Determine the kind of records from their columns: "chat", "instruction" or "text".

    Args:
        columns: Names of the columns.
        config: The data; it may demand a kind.

    Raises:
        ValueError: The columns fit no kind, or not the kind demanded.
    """
    needed = {
        "chat": [config.messages_field],
        "instruction": [config.prompt_field, config.answer_field],
        "text": [config.text_field],
    }
    kinds = needed if config.kind == "auto" else [config.kind]
    for kind in kinds:
        if all(name in columns for name in needed[kind]):
            return kind
    wanted = "; or ".join(f"{kind}: {', '.join(needed[kind])}" for kind in kinds)
    shown = ", ".join(columns[:20]) or "none"
    raise ValueError(
        f"data.path={config.path} has the columns {shown}: needs {wanted} (choose others with "
        "data.text_field, data.prompt_field, data.answer_field, data.messages_field)"
    )
