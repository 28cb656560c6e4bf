"""The parts of a study's text: where they are, what they hold, and that no record is in two of them."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from seft_dist.config import DataConfig, StudyConfig
from seft_dist.data.paragraphs import normalize_whitespace, paragraphs
from seft_dist.data.records import LOCATION, local_files, read_records
from seft_dist.data.selection import select_records
from seft_dist.session.cli import option_reader, to_dict
from seft_dist.study.options import arguments, flatten, options_of_group, without_unused_options
from seft_dist.study.results import FEW_WORDS, TextPart
from seft_dist.study.split import FOLDER, PARTS, Split, read_split

NEEDED = ("train", "validation", "test")
WHICH_RECORDS = ("path", "name", "split", "holdout", "holdout_every", "holdout_share", "max_records", "mix")
"""Options of data that decide which records there are."""


def find_parts(config: StudyConfig) -> tuple[dict[str, DataConfig], Split | None]:
    """Find the location of each part, also of those that the split has yet to write.

    Args:
        config: The study.

    Returns:
        The parts that there are, and the rule of the split.

    Raises:
        ValueError: A part is missing, given twice, or its options are wrong.
    """
    shared = options_of_group(flatten(config.train, "train"), "data")
    wrong = [f"data.{name}" for name in WHICH_RECORDS if name in shared]
    if wrong:
        raise ValueError(f"train has {', '.join(wrong)}: needs it under data.train, since it belongs to one part")
    unknown = sorted(config.data.keys() - {*PARTS, "split"})
    if unknown:
        raise ValueError(f"data has {', '.join(unknown)}: needs only {', '.join(PARTS)} and split")
    split = read_split(config.data["split"]) if "split" in config.data else None
    made = dict.fromkeys(split["shares"]) if split else {}
    given = {name: value for name, value in config.data.items() if name in PARTS and value is not None}
    twice = sorted(made.keys() & given.keys())
    missing = [name for name in NEEDED if name not in made and name not in given]
    if twice or missing:
        what = f"{', '.join(twice)} twice" if twice else f"no {', '.join(missing)}"
        raise ValueError(f"data has {what}: needs each part once, by its path or in split.shares")
    read = option_reader(DataConfig)
    parts = {}
    for name in (name for name in PARTS if name in made or name in given):
        own: Any = {"path": str(Path(config.output) / FOLDER / f"{name}.jsonl")} if name in made else given[name]
        own = flatten(own if isinstance(own, dict) else {"path": own}, f"data.{name}")
        # The forgetting text is usually of another kind.
        options = {key: value for key, value in shared.items() if name != "forgetting" or key == "seq_len"} | own
        if any(key.partition(".")[0] == "mix" for key in options):
            raise ValueError(f"data.{name} has a mix: needs one source, so that its records can be told from others")
        parts[name] = read(arguments(options), f"data.{name}")
    return parts, split


def stamp_of(path: str, pattern: str = "*") -> list[list[Any]]:
    """Return path, size and time of change of each file; empty if there is none on this machine."""
    location = Path(path).expanduser()
    return _stamps(sorted(location.rglob(pattern)) if location.is_dir() else [location] if location.exists() else [])


def _stamps(files: list[Path]) -> list[list[Any]]:
    stats = [(str(file), file.stat()) for file in files if file.is_file()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def check_parts(parts: dict[str, DataConfig], known: dict[str, TextPart]) -> dict[str, TextPart]:
    """Read all parts, unless they are as they were, and refuse a record that is in two of them.

    Args:
        parts: The parts that ``find_parts`` gave; the files of the split are written.
        known: Facts that an earlier call returned.

    Returns:
        Facts about each part.

    Raises:
        ValueError: A part cannot be read, or records of two parts are equal.
    """
    options = {name: _options(part) for name, part in parts.items()}
    stamps = {name: _stamps(_files_of(name, part)) for name, part in parts.items()}
    if all(
        name in known and (known[name]["options"], known[name]["stamp"]) == (options[name], stamps[name])
        for name in parts
    ):
        return {name: known[name] for name in parts}
    contents = {name: _read(part) for name, part in parts.items()}
    names = list(contents)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            common = contents[first].record_hashes.keys() & contents[second].record_hashes.keys()
            if common:
                shown = contents[first].record_hashes[min(common)]
                raise ValueError(
                    f"{first} and {second} have {len(common)} records in common, e.g. {shown!r}: a record may be in "
                    "one part only. Remove them from one of the files, or let data.split with by: hash make the parts"
                )
    train, short = contents["train"].paragraphs, contents["train"].short.keys()
    return {
        name: TextPart(
            options=options[name],
            stamp=stamps[name],
            digest=content.digest,
            kind=content.kind,
            records=content.records,
            words=content.words,
            repeated=[len(content.paragraphs & train), len(content.paragraphs)] if name != "train" else [0, 0],
            short_repeated=sum(content.short[key] for key in content.short.keys() & short) if name != "train" else 0,
        )
        for name, content in contents.items()
    }


def _files_of(name: str, part: DataConfig) -> list[Path]:
    try:
        return local_files(part)
    except ValueError as error:
        raise ValueError(f"data.{name}: {error}") from error


def _options(part: DataConfig) -> dict[str, Any]:
    """Return the options that decide which records a part has."""
    kept = {
        key: value
        for key, value in without_unused_options(to_dict(part)).items()
        if key not in ("seq_len", "date", "join", "separate")
    }
    return kept


class _Content(NamedTuple):
    digest: str
    kind: str
    records: int
    words: int
    record_hashes: dict[bytes, str]
    """Hashes of the records that may be in one part only, with the beginning of each for messages."""
    paragraphs: set[bytes]
    short: Counter[bytes]
    """Hashes of the other records, and how many there are of each."""


def _read(part: DataConfig) -> _Content:
    rows, kind, _ = read_records(part)
    rows = select_records(rows, part)
    digest, count, pieces, short = hashlib.sha256(), 0, set(), Counter[bytes]()
    record_hashes: dict[bytes, str] = {}
    for row in rows:
        text = "\n".join(f"{value}" for name, value in row.items() if name != LOCATION and value is not None)
        digest.update(len(text).to_bytes(8, "little") + text.encode(errors="surrogatepass"))
        plain = normalize_whitespace(text)
        number = len(plain.split(" ")) if plain else 0
        count += number
        if kind != "text" or number >= FEW_WORDS:
            record_hashes.setdefault(_text_hash(plain), plain[:60])
        else:
            short[_text_hash(plain)] += 1
        if kind == "text":
            pieces |= {
                _text_hash(normalize_whitespace(piece)) for piece in paragraphs(text) if len(piece.split()) >= FEW_WORDS
            }
    return _Content(digest.hexdigest()[:16], kind, len(rows), count, record_hashes, pieces, short)


def _text_hash(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8]
