"""Local data files: finding them, hashing their content, and reading their records, each with its file and line.

Tokenized data is cached under the hash of the files' bytes, so a file that was replaced in place is read again even if
its name, size and time are the same. The price is that each process reads every file once when it starts.
"""

import glob
import hashlib
import json
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from seft_dist.files.hashing import sha256_of
from seft_dist.files.reading import read_text

BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
MOST_LINE_BYTES = 64 << 20
"""Longest line of a .jsonl file that is read."""
MOST_FILE_BYTES = 2 << 30
"""Largest .txt file that is read. Such a file is one record and is held in memory as a whole."""
_BOM = b"\xef\xbb\xbf"

Record = dict[str, Any]
Located = tuple[str, Record]
"""File and line of a record, for error messages, and the record."""


def is_pattern(path: str) -> bool:
    """Return whether a path is a pattern such as "part-*.jsonl", and no file of that very name."""
    return glob.has_magic(path) and not Path(path).expanduser().exists()


def find_data_files(paths: Sequence[str]) -> tuple[list[Path], str]:
    """Find the data files that paths stand for.

    Args:
        paths: Files, folders, and patterns of these, as the user wrote them.

    Returns:
        The files of one path after those of another, in the order of their names, and their kind, a value of
        ``BUILDERS``.

    Raises:
        ValueError: There are no such files, they are of several kinds, all are empty, one is there twice, or one is not
            a regular file.
    """
    name = ", ".join(paths)
    files = [file for path in paths for found in _expand(path) for file in _files_in(found)]
    twice = [file for file, count in Counter(file.resolve() for file in files).items() if count > 1]
    if twice:
        raise ValueError(f"data.path={name} names {twice[0]} twice: needs each file once")
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


def _expand(path: str) -> list[Path]:
    if is_pattern(path):
        found = sorted(glob.glob(str(Path(path).expanduser()), recursive=True))
        if not found:
            raise ValueError(f"data.path={path} matches no file: needs a pattern with at least one")
        return [Path(name) for name in found]
    whole = Path(path).expanduser()
    if not whole.exists():
        raise ValueError(f"data.path={path} does not exist: needs a file, a folder or a pattern")
    return [whole]


def _files_in(path: Path) -> list[Path]:
    inside = (file for file in path.rglob("*") if file.suffix in BUILDERS and not file.is_dir())
    return sorted(inside) if path.is_dir() else [path]


def hash_files(files: list[Path]) -> str:
    """Hash the bytes of files, in the given order; names, sizes and times are not part of the hash.

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
        files: The files, from ``find_data_files``.
        kind: Their kind, from ``find_data_files``.

    Yields:
        Each record with its file and line, or with its number, counted from 0, if the file has no lines.

    Raises:
        ValueError: A file is damaged, or a record is not an object; the message names the file and line.
    """
    readers = {"text": _read_txt, "json": _read_json, "parquet": _read_parquet}
    for file in files:
        yield from readers[kind](file)


def _read_txt(file: Path) -> Iterator[Located]:
    text = read_text(file, MOST_FILE_BYTES).removeprefix("\ufeff")
    if "\0" in text:
        raise ValueError(
            f"{file} has a null byte behind {text.index(chr(0))} characters: it is no text, or damaged; "
            "needs UTF-8 text"
        )
    yield str(file), {"text": text}


def _read_json(file: Path) -> Iterator[Located]:
    """Read one record from each line or, of a .json file, the records of one list."""
    with open(file, "rb") as handle:
        lines = iter(lambda: handle.readline(MOST_LINE_BYTES + 1), b"")
        first = next((line.removeprefix(_BOM).strip() for line in lines if line.removeprefix(_BOM).strip()), b"")
    if file.suffix == ".json" and first.startswith(b"["):
        yield from _read_json_list(file)
        return
    if file.suffix == ".json" and first.startswith(b"{") and not _is_json(first):
        raise ValueError(
            f"{file} holds an object at the top, or its first record is damaged: needs a list of records, or one "
            "record a line"
        )
    with open(file, "rb") as handle:
        for number, line in enumerate(iter(lambda: handle.readline(MOST_LINE_BYTES + 1), b""), start=1):
            where = f"{file}, line {number}"
            if len(line) > MOST_LINE_BYTES:
                raise ValueError(f"{where} is longer than {MOST_LINE_BYTES} bytes: needs one record a line")
            line = line.removeprefix(_BOM) if number == 1 else line
            if line.strip():
                yield where, _check_object(_parse(line, where), where)


def _read_json_list(file: Path) -> Iterator[Located]:
    """Read the records of a JSON list one after the other, so that a large file does not have to fit into memory.

    ``raw_decode`` takes one record from the beginning of ``text``. If it fails, the record may be cut off by the end of
    what was read so far, so more is read and the record is decoded again. The amount doubles each time, which keeps the
    total work linear in the length of a record.
    """
    decoder, number, missing = json.JSONDecoder(), 0, 1
    with open(file, encoding="utf-8-sig") as handle:
        text = _read_more(handle, missing, file).lstrip().removeprefix("[")
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
                more = _read_more(handle, missing, file)
                if not more or len(text) > MOST_LINE_BYTES:
                    raise ValueError(
                        f"{where} cannot be read as json ({error.msg}): it may be damaged or cut short"
                    ) from error
                text += more
                continue
            _check_characters(record, where)
            yield where, _check_object(record, where)
            text, number = text[end:] or _read_more(handle, 1 << 20, file), number + 1


def _read_more(handle: TextIO, characters: int, file: Path) -> str:
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
    """Remove the fields that hold None, at every depth. Arrow adds them wherever another record has a value."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    except RecursionError:
        return True  # the caller's own attempt to read the record reports it
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
        problem = "has a null byte" if b"\0" in line else f"cannot be read as json ({error})"
        raise ValueError(f"{where} {problem}: it may be damaged or cut short") from error
    if b"\\u" in line:
        _check_characters(content, where)
    return content


def _check_characters(content: Any, where: str) -> None:
    """Raise a ValueError for half of a surrogate pair, which JSON can express but UTF-8 text cannot."""
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} has half of a surrogate pair (\\ud800 to \\udfff): needs whole characters"
        ) from error


def _check_object(content: Any, where: str) -> Record:
    if not isinstance(content, dict):
        raise ValueError(f'{where} is a {_json_type(content)}: needs an object with fields, as {{"text": "..."}}')
    return content


def _json_type(content: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "truth value", type(None): "null"}
    return names.get(type(content), "number")
