"""Files that are whole or not there, and reading what anybody may have written."""

import json
import os
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from typing_extensions import NotRequired, TypedDict

from seft_dist.files.kinds import Within, check_kind, closed, lenient
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


class Step(TypedDict):
    """Type of a test value: most forms that a type can have."""

    step: Annotated[int, Within(0, 9)]
    loss: float | None
    done: NotRequired[bool]
    rows: NotRequired[list[tuple[int, str]]]
    sizes: NotRequired[Annotated[list[int], Within(1, 2)]]
    clip: NotRequired[float | Literal["auto"]]
    scores: NotRequired[dict[str, float | int]]


@lenient
class LenientStep(Step):
    """The same, with further keys."""


@closed
class ClosedStep(Step):
    """The same, without further keys."""


def test_values_get_their_type() -> None:
    content = {"step": 1, "loss": 2, "rows": [[3, "a"]], "sizes": [1], "clip": "auto", "scores": {"a": 1}, "new": {}}
    found = check_kind(content, Step, "x")
    rest = {"rows": [(3, "a")], "sizes": [1], "clip": "auto", "scores": {"a": 1}}
    assert found == {"step": 1, "loss": 2.0} | rest
    assert isinstance(found["loss"], float) and type(found["scores"]["a"]) is int
    assert check_kind(content, LenientStep, "x") == found | {"new": {}}
    assert check_kind({"step": 0, "loss": None}, ClosedStep, "x") == {"step": 0, "loss": None}
    assert check_kind([1, "a", None], list[Any], "x") == [1, "a", None]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"step": "1"}, "x does not hold what is needed: step: Input should be a valid integer, found '1'"),
        ({"step": True}, "step: Input should be a valid integer, found True"),
        ({"step": 1.0}, "step: Input should be a valid integer, found 1.0"),
        ({"step": -1}, "step: Input should be at least 0, found -1"),
        ({"step": 10}, "step: Input should be at most 9, found 10"),
        ({"loss": "nan"}, "loss: Input should be a valid number, found 'nan'"),
        ({"loss": False}, "loss: Input should be a valid number, found False"),
        ({"loss": 10**400}, "loss: Input should be a valid number, found 1000"),
        ({"done": 1}, "done: Input should be a valid boolean, found 1"),
        ({"done": None}, "done: Input should be a valid boolean, found None"),
        ({"rows": {}}, "rows: Input should be a valid list, found {}"),
        ({"rows": [[1, "a"], [1]]}, r"rows.1: Input should be a list of 2 entries, found \[1\]"),
        ({"rows": [[1, 2]]}, "rows.0.1: Input should be a valid string, found 2"),
        ({"sizes": []}, "sizes: List should have at least 1 item"),
        ({"sizes": [1, 2, 3]}, "sizes: List should have at most 2 item"),
        ({"clip": "no"}, "clip: Input should be a valid number or 'auto', found 'no'"),
        ({"scores": {1: 2.0}}, "scores.1: Input should be a valid string, found 1"),
        ({"scores": []}, "scores: Input should be a valid dictionary"),
        ({"rows": [0, 1, 2, 3]}, r"rows.2: .*\(and 1 more\)$"),
        ({"new": 5}, "new: Extra inputs are not permitted, found 5"),
    ],
)
def test_values_of_another_type_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_kind({"step": 1, "loss": 2.0} | change, ClosedStep, "x")


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
