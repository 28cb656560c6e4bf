"""One text cut into parts by a fixed rule: the same records in the same parts on every machine."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from typing_extensions import NotRequired, TypedDict

from seft_dist.data.data_files import find_data_files, hash_files, read_located
from seft_dist.data.paragraphs import normalize_whitespace, paragraphs
from seft_dist.data.selection import hash_record
from seft_dist.files.kinds import check_kind, closed
from seft_dist.files.writing import write_text

PARTS = ("train", "validation", "test", "forgetting")
FOLDER = "data"

Record = dict[str, Any]


@closed
class Split(TypedDict):
    """``data.split`` of a study."""

    path: str
    shares: dict[str, int]
    """Number of records that each part gets of every sum(shares), in this order."""
    by: NotRequired[Literal["hash", "index"]]
    """Choice of a record's part by its content (equal records go to one part) or by its number in the text."""
    repeated: NotRequired[Literal["keep", "drop"]]
    """"drop": paragraphs of the later parts that an earlier one has, too, are left out there."""


def read_split(content: Any) -> Split:
    """Check ``data.split``.

    Raises:
        ValueError: It is not a valid split.
    """
    split = check_kind(content, Split, "data.split")
    wrong = [name for name in split["shares"] if name not in PARTS]
    if wrong or not split["shares"] or min(split["shares"].values()) < 1:
        raise ValueError(
            f"data.split.shares is {split['shares']}: needs whole numbers from 1 on for some of {', '.join(PARTS)}, "
            "e.g. {train: 4, validation: 1, test: 1}"
        )
    return split


def source_hash(split: Split) -> str:
    """Hash the text that is split.

    Raises:
        ValueError: The text does not exist.
    """
    return hash_files(_files(split)[0])


def write_split(split: Split, folder: Path, text_field: str) -> None:
    """Write a file ``NAME.jsonl`` for each part.

    A .txt file has a record for each of its paragraphs; other files have the records they have.

    Args:
        split: The rule.
        folder: Gets the files; it exists.
        text_field: Column with the text, for ``repeated: drop``.

    Raises:
        ValueError: A record cannot be read, or a part gets none.
    """
    total = sum(split["shares"].values())
    order = [name for name, share in split["shares"].items() for _ in range(share)]
    parts: dict[str, list[Record]] = {name: [] for name in split["shares"]}
    for index, record in enumerate(_records(split)):
        number = index if split.get("by", "hash") == "index" else hash_record(record)
        parts[order[number % total]].append(record)
    if split.get("repeated") == "drop":
        _drop_repeated(parts, text_field)
    for name, records in parts.items():
        if not records:
            raise ValueError(
                f"data.split gives {name} no record of {split['path']}: needs more records (a .txt file has one for "
                "each paragraph), or other shares"
            )
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_text(folder / f"{name}.jsonl", lines)


def _files(split: Split) -> tuple[list[Path], str]:
    if not Path(split["path"]).expanduser().exists():
        raise ValueError(f"data.split.path={split['path']} does not exist: needs a local file or folder")
    return find_data_files([split["path"]])


def _records(split: Split) -> Iterator[Record]:
    files, kind = _files(split)
    for _, record in read_located(files, kind):
        if kind == "text":
            yield from ({"text": text} for text in paragraphs(record["text"]))
        else:
            yield record


def _drop_repeated(parts: dict[str, list[Record]], text_field: str) -> None:
    seen: set[str] = set()
    for name, records in parts.items():
        kept = []
        here: set[str] = set()
        for record in records:
            if not isinstance(record.get(text_field), str):
                raise ValueError(
                    f"data.split.repeated=drop: a record has no text in {text_field!r}; needs repeated: keep"
                )
            pieces = paragraphs(record[text_field])
            here.update(normalize_whitespace(piece) for piece in pieces)
            pieces = [piece for piece in pieces if normalize_whitespace(piece) not in seen]
            if pieces:
                kept.append(record | {text_field: "\n\n".join(pieces) + "\n"})
        seen |= here
        parts[name] = kept
