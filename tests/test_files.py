"""Files that are whole or not there, and reading what anybody may have written."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import TypedDict

from seft_dist.files.reading import check_yaml, parse_json, read_json, read_text, read_yaml
from seft_dist.files.writing import write_json, write_text


class Index(TypedDict):
    """Type of a test file."""

    weight_map: dict[str, str]


def test_a_file_is_replaced_as_a_whole_or_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"steps": 3})
    assert json.loads(path.read_text()) == {"steps": 3}

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert json.loads(path.read_text()) == {"steps": 3}
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is no JSON"),
        ('{"weight_map": ', "cut short"),
        ("[]", "it: "),
        ('{"weight_map": {"a": 3}}', "weight_map.a: .*string.*found 3"),
        ("{}", "weight_map: Field required"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_json_that_does_not_fit_is_refused_by_name(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "index.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=says) as caught:
        read_json(path, Index)
    assert str(path) in str(caught.value)


def test_json_that_fits_is_read() -> None:
    assert parse_json('{"weight_map": {"a": "b"}}', Index, "x") == {"weight_map": {"a": "b"}}


def test_a_pipe_a_folder_and_bytes_are_no_text(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for name, says in (("pipe", "regular file"), (".", "regular file"), ("bytes", "not UTF-8")):
        with pytest.raises(ValueError, match=says):
            read_text(tmp_path / name)
    with pytest.raises(ValueError, match="needs at most 2"):
        read_text(tmp_path / "bytes", most_bytes=2)


def test_yaml_bombs_end_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    began = time.monotonic()
    with pytest.raises(ValueError, match="once aliases are expanded"):
        check_yaml("\n".join(lines), "recipe.yaml")
    assert time.monotonic() - began < 5
    with pytest.raises(ValueError, match="inside what it stands for"):
        check_yaml("a: &a [*a]", "recipe.yaml")
    path = tmp_path / "r.yaml"
    for text, says in (("a: !!python/object:os.system x", "no plain YAML"), ("a: [", "no plain YAML")):
        path.write_text(text)
        with pytest.raises(ValueError, match=says):
            read_yaml(path)
    expected: dict[str, Any] = {"a": [1], "b": [1]}
    path.write_text("a: &x [1]\nb: *x")
    assert read_yaml(path) == expected
