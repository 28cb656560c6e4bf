"""Records of a data set, read by the ``datasets`` library: which files, which rows, which kind."""

from pathlib import Path
from typing import Any

import datasets

from seft_dist.config import DataConfig

BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def read_records(config: DataConfig) -> Any:
    """Read a file, a folder or a hub data set. Local.

    Returns:
        A ``datasets.Dataset``, memory-mapped.

    Raises:
        ValueError: There is no such data, or it cannot be read.
    """
    path = Path(config.path).expanduser()
    if not path.exists():
        if path.suffix in BUILDERS or config.path.startswith((".", "/", "~")) or config.path.count("/") > 1:
            raise ValueError(
                f"data.path={config.path} does not exist: needs a file, a folder or the hub name of a dataset"
            )
        return _read_hub(config)
    if config.name is not None or config.split != "train":
        raise ValueError(
            f"data.path={config.path} is local: data.name and data.split are only for hub datasets; remove them"
        )
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in BUILDERS)
    kinds = sorted({BUILDERS[file.suffix] for file in files if file.suffix in BUILDERS})
    if len(kinds) != 1 or files[0].suffix not in BUILDERS:
        found = " and ".join(kinds) or path.suffix or "no such file"
        raise ValueError(f"data.path={config.path} holds {found}: needs files of one kind out of {', '.join(BUILDERS)}")
    if not any(file.stat().st_size for file in files):
        raise ValueError(f"data.path={config.path} is empty: needs at least one record")
    options = {"sample_by": "document"} if kinds == ["text"] else {}
    try:
        return datasets.load_dataset(kinds[0], data_files=[str(file) for file in files], split="train", **options)
    except Exception as error:  # readers of three formats, each with errors of its own
        raise ValueError(f"data.path={config.path} cannot be read as {kinds[0]}: {reason(error)}") from error


def _read_hub(config: DataConfig) -> Any:
    try:
        return datasets.load_dataset(config.path, config.name, split=config.split)
    except Exception as error:  # datasets, the hub's client and its transport have no common error type
        raise ValueError(
            f"data.path={config.path} is no file or folder here, and the hub did not give a dataset of that name "
            f"(data.name={config.name}, data.split={config.split}): {reason(error)}"
        ) from error


def reason(error: BaseException) -> str:
    """First line of what went wrong, from the error that caused it. Local."""
    cause = error.__cause__ or error
    return next(iter(str(cause).strip().splitlines()), type(cause).__name__)


def select_records(records: Any, config: DataConfig) -> Any:
    """Keep the records of training or of the hold-out, at most ``max_records``. Local.

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
    """Decide how records are read: "chat", "instruction" or "text". Local.

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
    raise ValueError(
        f"data.path={config.path} has the columns {', '.join(columns)}: needs {wanted} (choose others with "
        "data.text_field, data.prompt_field, data.answer_field, data.messages_field)"
    )
