"""Records of a data set: which files or hub data set, which kind, which rows."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets

from seft_dist.config import DataConfig
from seft_dist.data.data_files import BUILDERS, Located, find_data_files, hash_files, read_located, without_none

PLACE = "place"
"""Column with the file and line of a record of local files."""
_PEEKED = 100  # records whose fields decide about the kind
_FORMAT = 1  # of the columns below; another number makes old caches of records useless


def read_records(config: DataConfig) -> tuple[Any, str]:
    """Read a file, a folder or a hub data set.

    Local files become columns of text: lists of messages and tools are kept as JSON, just as they were written. They are
    cached under a hash of the files' bytes.

    Returns:
        A ``datasets.Dataset``, memory-mapped, with the columns of its kind; and the kind, "chat", "instruction" or "text".

    Raises:
        ValueError: There is no such data, or it cannot be read.
        OSError: A file may not be read.
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
    peeked = [record for _, record in itertools.islice(read_located(files, file_kind), _PEEKED)]
    kind = record_kind(list(dict.fromkeys(name for record in peeked for name in record)), config)
    return _stored(files, file_kind, kind, digest, config), kind


def _stored(files: list[Path], file_kind: str, kind: str, digest: str, config: DataConfig) -> Any:
    columns = _columns(kind, config)

    def generate() -> Iterator[dict[str, str | None]]:
        for located in read_located(files, file_kind):
            yield _row(located, kind, config)

    features = {name: datasets.Value("large_string") for name in [*columns, PLACE]}
    # the place is part of a record, so the files' names are part of the key
    key = repr((_FORMAT, digest, [str(file) for file in files], kind, columns))
    return generated(generate, features, hashlib.sha256(key.encode()).hexdigest()[:32], f"as {file_kind}", config)


def generated(
    rows: Callable[[], Iterator[Any]], features: dict[str, Any], fingerprint: str, how: str, config: DataConfig
) -> Any:
    """Store what a generator gives as a data set in the cache, or find it there.

    Args:
        rows: Makes the generator.
        features: Type of each column.
        fingerprint: Names the data set in the cache: another name for other rows.
        how: What is done, for the message, e.g. "as jsonl".
        config: The data.

    Raises:
        OSError: A file cannot be read.
        ValueError: A row is wrong.
    """
    try:
        return datasets.Dataset.from_generator(rows, features=datasets.Features(features), fingerprint=fingerprint)
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, (ValueError, OSError)):
            raise error.__cause__ from None
        raise ValueError(f"data.path={config.path} cannot be read {how}: {reason(error)}") from error


def _columns(kind: str, config: DataConfig) -> list[str]:
    columns = {
        "chat": [config.messages_field, config.tools_field],
        "instruction": [config.prompt_field, config.input_field, config.answer_field],
        "text": [config.text_field],
    }
    return columns[kind]


def _row(located: Located, kind: str, config: DataConfig) -> dict[str, str | None]:
    """The columns of a record as text; what is missing or null is None."""
    where, record = located
    row: dict[str, str | None] = {PLACE: where}
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
    """Messages or tools of a record, from the JSON of local files or from the columns of a hub data set."""
    return json.loads(value) if isinstance(value, str) and value else without_none(value)


def _read_hub(config: DataConfig) -> Any:
    try:
        return datasets.load_dataset(config.path, config.name, split=config.split)
    except Exception as error:  # datasets, the hub's client and its transport have no common error type
        raise ValueError(
            f"data.path={config.path} is no file or folder here, and the hub did not give a dataset of that name "
            f"(data.name={config.name}, data.split={config.split}): {reason(error)}"
        ) from error


def reason(error: BaseException) -> str:
    """First line of what went wrong, from the error that caused it."""
    cause = error.__cause__ or error
    return next(iter(str(cause).strip().splitlines()), type(cause).__name__)


def select_records(records: Any, config: DataConfig) -> Any:
    """Keep the records of training or of the hold-out, at most ``max_records``.

    With ``holdout_every`` n the n-th, 2n-th, ... record is held out.

    Raises:
        ValueError: Nothing is left.
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
    """Decide how records are read: "chat", "instruction" or "text".

    Raises:
        ValueError: The columns fit none of them, or not the one asked for.
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
