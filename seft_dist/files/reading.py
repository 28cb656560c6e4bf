"""Reading JSON and YAML that anybody may have written: bounded in size and depth, checked against a type.

Every ValueError names the file, its offending content and what is needed instead. ``files.kinds`` tells what a type can
be, e.g. a TypedDict or ``dict[str, str]``.
"""

import json
import stat
from pathlib import Path
from typing import Any, TypeVar

import yaml

from seft_dist.files.kinds import check_kind

T = TypeVar("T")

MOST_BYTES = 256 << 20
"""Largest JSON or YAML file that is read. The index of a model with 10^6 tensors is below 100 MB."""
MOST_YAML_NODES = 200_000
"""Most values of a YAML file after its aliases are expanded: a few short lines can stand for 10^9 values."""


def read_text(path: Path, most_bytes: int = MOST_BYTES) -> str:
    """Read a regular file as UTF-8.

    Args:
        path: The file; a link to a regular file is followed.
        most_bytes: Largest size that is read.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The path is not a regular file (a pipe would block for ever), or it is too large or not UTF-8.
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


def read_json(path: Path, kind: type[T], most_bytes: int = MOST_BYTES) -> T:
    """Read a JSON file and validate its content.

    Args:
        path: The file.
        kind: Type that the content must have.
        most_bytes: Largest size that is read.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not JSON, or its content is not of type ``kind``.
    """
    return parse_json(read_text(path, most_bytes), kind, str(path))


def parse_json(text: str, kind: type[T], name: str) -> T:
    """Parse JSON and validate its content.

    Args:
        text: The JSON.
        kind: Type that the content must have.
        name: Name of the file or field that the text came from, for the error message.

    Raises:
        ValueError: The text is not JSON, or its content is not of type ``kind``.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is no JSON ({error}): it may be damaged or cut short") from error
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply: needs at most a few hundred levels") from error
    return check_kind(content, kind, name)


def read_yaml(path: Path, most_bytes: int = 16 << 20) -> Any:
    """Read a YAML file that holds plain values only, with a limit on what its aliases expand to.

    Args:
        path: The file.
        most_bytes: Largest size that is read.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not YAML, has tags other than those of plain values, or expands to too many values.
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
        name: Name of the file, for the error message.

    Raises:
        ValueError: The text expands to more than ``MOST_YAML_NODES`` values, or an alias refers to what contains it.
        yaml.YAMLError: The text is not YAML.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        count = 0 if node is None else _count_expanded(node, {}, name)
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply: needs at most a few hundred levels") from error
    if count > MOST_YAML_NODES:
        raise ValueError(f"{name} stands for {count} values once aliases are expanded: needs at most {MOST_YAML_NODES}")


def _count_expanded(node: yaml.Node, known: dict[int, int | None], name: str) -> int:
    """Count the values at and below a node, those behind an alias as often as the alias occurs.

    Args:
        node: Node at which to count.
        known: Counts by ``id`` of a node, so that a node behind many aliases is walked once. None marks a node whose
            count has begun and not ended: meeting it again means that it contains itself.
        name: Name of the file, for the error message.
    """
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
    known[id(node)] = count = 1 + sum(_count_expanded(part, known, name) for part in inner)
    return count
