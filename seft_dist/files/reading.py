"""Reading JSON and YAML that anybody may have written: bounded in size and depth, checked against a type.

Every ValueError names the file, what was found in it and what is needed. Types are whatever pydantic validates: a
TypedDict, a dataclass, ``dict[str, str]``.
"""

import functools
import json
import stat
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

T = TypeVar("T")

MOST_BYTES = 256 << 20
"""Largest JSON or YAML file that is read. The index of a model with 10^6 tensors is below 100 MB."""
MOST_YAML_NODES = 200_000
"""Most values of a YAML file after its aliases are expanded: a few short lines can stand for 10^9 values."""
_SHOWN_PROBLEMS = 3


def read_text(path: Path, most_bytes: int = MOST_BYTES) -> str:
    """Read a regular file as UTF-8.

    Args:
        path: The file; a link to a regular file is followed.
        most_bytes: Largest size that is read.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no regular file (a pipe would block for ever), too large, or not UTF-8.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is a folder, a pipe or a device: needs a regular file")
    if status.st_size > most_bytes:
        raise ValueError(f"{path} has {status.st_size} bytes: needs at most {most_bytes}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): it may be damaged"
        ) from error


def read_json(path: Path, kind: type[T] | TypeAdapter[T], most_bytes: int = MOST_BYTES) -> T:
    """Read a JSON file and check what it holds.

    Args:
        path: The file.
        kind: What it must hold.
        most_bytes: Largest size that is read.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no JSON, or does not hold a ``kind``.
    """
    return parse_json(read_text(path, most_bytes), kind, str(path))


def parse_json(text: str, kind: type[T] | TypeAdapter[T], name: str) -> T:
    """Read JSON from text and check what it holds.

    Args:
        text: The JSON.
        kind: What it must hold.
        name: Of the file or field it came from, for the message.

    Raises:
        ValueError: It is no JSON, or does not hold a ``kind``.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is no JSON ({error}): it may be damaged or cut short") from error
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply: needs at most a few hundred levels") from error
    return check_kind(content, kind, name)


def check_kind(content: Any, kind: type[T] | TypeAdapter[T], name: str) -> T:
    """Check a value that was read against a type; numbers are not made from text or the other way round.

    Raises:
        ValueError: Names the first entries that do not fit, and what each of them needs to be.
    """
    adapter = kind if isinstance(kind, TypeAdapter) else _adapter_of(cast(Any, kind))
    try:
        return adapter.validate_python(content, strict=True)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc'])) or 'it'}: {problem['msg']}, found {_short(problem['input'])}"
            for problem in error.errors(include_url=False)[:_SHOWN_PROBLEMS]
        ]
        more = f" (and {error.error_count() - len(problems)} more)" if error.error_count() > len(problems) else ""
        raise ValueError(f"{name} does not hold what is needed: {'; '.join(problems)}{more}") from error


@functools.cache
def _adapter_of(kind: Any) -> TypeAdapter[Any]:
    """Made once for each type: that takes longer than most files."""
    return TypeAdapter(kind)


def read_yaml(path: Path, most_bytes: int = 16 << 20) -> Any:
    """Read a YAML file: plain values only, aliases within reason.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no YAML, has other tags than plain values, or stands for too many values.
    """
    text = read_text(path, most_bytes)
    try:
        check_yaml(text, str(path))
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no plain YAML: {' '.join(str(error).split())}") from error


def check_yaml(text: str, name: str) -> None:
    """Refuse YAML whose aliases would multiply into more values than anybody writes.

    Args:
        text: The YAML.
        name: Of the file, for the message.

    Raises:
        ValueError: It stands for more than ``MOST_YAML_NODES`` values, or for itself.
        yaml.YAMLError: It is no YAML.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        count = 0 if node is None else _expanded(node, {}, name)
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply: needs at most a few hundred levels") from error
    if count > MOST_YAML_NODES:
        raise ValueError(f"{name} stands for {count} values once aliases are expanded: needs at most {MOST_YAML_NODES}")


def _expanded(node: yaml.Node, known: dict[int, int | None], name: str) -> int:
    """Values below a node, those behind aliases counted each time. ``known`` is None while a node is being counted."""
    if id(node) in known:
        count = known[id(node)]
        if count is None:
            raise ValueError(f"{name} has an alias inside what it stands for: needs a file that ends")
        return count
    known[id(node)] = None
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        inner = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        inner = node.value
    known[id(node)] = count = 1 + sum(_expanded(part, known, name) for part in inner)
    return count


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


LENIENT = ConfigDict(extra="allow", strict=True)
"""For ``@with_config(LENIENT)`` on a TypedDict: further keys are kept, those named must fit."""
