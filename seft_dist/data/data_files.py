"""Local data files: which ones, a hash of what they hold, and their records, each with its file and line.

The tokenised data is kept under the hash of the files' bytes, so a file replaced in place is read anew whatever its name,
size and time say. That costs one reading of every file at each start of a process.
"""

import hashlib
import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from seft_dist.files.hashing import sha256_of
from seft_dist.files.reading import read_text

BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
MOST_LINE_BYTES = 64 << 20
"""Longest line of a .jsonl file that is read."""
MOST_FILE_BYTES = 2 << 30
"""Largest .txt file that is read: it is one record, held in memory as a whole."""
_BOM = b"\xef\xbb\xbf"

Record = dict[str, Any]
Located = tuple[str, Record]
"""Where a record stands, for messages, and the record."""


def find_data_files(path: Path, name: str) -> tuple[list[Path], str]:
    """Find the data files that a path stands for.

    Args:
        path: A file or a folder; it exists.
        name: What the user wrote, for messages.

    Returns:
        The files in the order of their names, and their kind, a value of ``BUILDERS``.

    Raises:
        ValueError: There are none, they are of several kinds, all are empty, or one is no regular file.
    """
    inside = (file for file in path.rglob("*") if file.suffix in BUILDERS and not file.is_dir())
    files = sorted(inside) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"data.path={name} holds no such file: needs files of one kind out of {', '.join(BUILDERS)}")
    for file in files:
        if not stat.S_ISREG(file.stat().st_mode):
            raise ValueError(f"{file} is a pipe or a device: needs a regular file")
    kinds = sorted({BUILDERS.get(file.suffix, file.suffix or "a file without a suffix") for file in files})
    if len(kinds) != 1 or files[0].suffix not in BUILDERS:
        raise ValueError(
            f"data.path={name} holds {' and '.join(kinds)}: needs files of one kind out of {', '.join(BUILDERS)}"
        )
    if not any(file.stat().st_size for file in files):
        raise ValueError(f"data.path={name} is empty: needs at least one record")
    return files, kinds[0]


def hash_files(files: list[Path]) -> str:
    """Hash the bytes of files, in their order; names, sizes and times do not matter.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as handle:
            digest.update(sha256_of(handle).digest())
    return digest.hexdigest()[:32]


def read_located(files: list[Path], kind: str) -> Iterator[Located]:
    """Read the records of files one after the other.

    Args:
        files: From ``find_data_files``.
        kind: Theirs.

    Yields:
        Each record with its file and line (files of records without lines: its number, counted from 0).

    Raises:
        ValueError: A file is damaged, or a record is no object; names the file and line.
    """
    readers = {"text": _read_txt, "json": _read_json, "parquet": _read_parquet}
    for file in files:
        yield from readers[kind](file)


def _read_txt(file: Path) -> Iterator[Located]:
    text = read_text(file, MOST_FILE_BYTES).removeprefix("\ufeff")
    if "\0" in text:
        raise ValueError(
            f"{file} has a null byte behind {text.index(chr(0))} characters: it is no text, or damaged; needs UTF-8 text"
        )
    yield str(file), {"text": text}


def _read_json(file: Path) -> Iterator[Located]:
    """One record a line, or (.json) one list of records."""
    with open(file, "rb") as handle:
        lines = iter(lambda: handle.readline(MOST_LINE_BYTES + 1), b"")
        first = next((line.removeprefix(_BOM).strip() for line in lines if line.removeprefix(_BOM).strip()), b"")
    if file.suffix == ".json" and first.startswith(b"["):
        yield from _read_json_list(file)
        return
    if file.suffix == ".json" and first.startswith(b"{") and not _is_json(first):
        raise ValueError(
            f"{file} holds an object at the top, or its first record is damaged: needs a list of records, or one record "
            "a line"
        )
    with open(file, "rb") as handle:
        for number, line in enumerate(iter(lambda: handle.readline(MOST_LINE_BYTES + 1), b""), start=1):
            where = f"{file}, line {number}"
            if len(line) > MOST_LINE_BYTES:
                raise ValueError(f"{where} is longer than {MOST_LINE_BYTES} bytes: needs one record a line")
            line = line.removeprefix(_BOM) if number == 1 else line
            if line.strip():
                yield where, _record(_parse(line, where), where)


def _read_json_list(file: Path) -> Iterator[Located]:
    """The records of a list, one after the other, so that a large file does not have to fit into memory."""
    decoder, number, missing = json.JSONDecoder(), 0, 1
    with open(file, encoding="utf-8-sig") as handle:
        text = _more(handle, missing, file).lstrip().removeprefix("[")
        while True:
            where = f"{file}, record {number}"
            text = text.lstrip()
            if number and text.startswith(","):
                text = text[1:].lstrip()
            if text.startswith("]"):
                return
            try:
                record, end = decoder.raw_decode(text)
            except RecursionError as error:
                raise ValueError(f"{where} is nested too deeply: needs at most a few hundred levels") from error
            except json.JSONDecodeError as error:  # cut off by the end of what was read, or damaged
                missing = max(1 << 20, len(text))
                more = _more(handle, missing, file)
                if not more or len(text) > MOST_LINE_BYTES:
                    raise ValueError(
                        f"{where} cannot be read as json ({error.msg}): it may be damaged or cut short"
                    ) from error
                text += more
                continue
            _check_characters(record, where)
            yield where, _record(record, where)
            text, number = text[end:] or _more(handle, 1 << 20, file), number + 1


def _more(handle: TextIO, characters: int, file: Path) -> str:
    try:
        return handle.read(characters)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason}): it may be damaged") from error


def _read_parquet(file: Path) -> Iterator[Located]:
    import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]
    import pyarrow.parquet as pq  # type: ignore[import-untyped,unused-ignore]

    number = 0
    try:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=500):
                for record in batch.to_pylist():
                    yield f"{file}, record {number}", without_none(record)
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read as parquet: {next(iter(str(error).splitlines()), '')}") from error


def without_none(value: Any) -> Any:
    """Take out the fields that hold None: Arrow puts them where another record has a value."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    except RecursionError:
        return True  # whoever reads the record says so
    return True


def _parse(line: bytes, where: str) -> Any:
    try:
        content = json.loads(line)
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply: needs at most a few hundred levels") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not UTF-8 text ({error.reason} at byte {error.start}): it may be damaged"
        ) from error
    except ValueError as error:
        what = "has a null byte" if b"\0" in line else f"cannot be read as json ({error})"
        raise ValueError(f"{where} {what}: it may be damaged or cut short") from error
    if b"\\u" in line:
        _check_characters(content, where)
    return content


def _check_characters(content: Any, where: str) -> None:
    """Refuse halves of surrogate pairs, which JSON can write and no text can hold."""
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} has half of a surrogate pair (\\ud800 to \\udfff): needs whole characters"
        ) from error


def _record(content: Any, where: str) -> Record:
    if not isinstance(content, dict):
        raise ValueError(f'{where} is a {_name(content)}: needs an object with fields, as {{"text": "..."}}')
    return content


def _name(content: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "truth value", type(None): "null"}
    return names.get(type(content), "number")
