"""Validation of values that were read from JSON or YAML against a type, without a library for it.

A type is one of: a TypedDict, ``dict[K, V]``, ``list[T]``, ``tuple[A, B]`` (a list of that length), ``Literal``, a
union, None, int, float, str, bool, Any, ``Annotated[T, Within(...)]``. Text is not converted to numbers, nor numbers to
text; a whole number may stand where a float is needed.

Keys that a TypedDict does not name are left out of the result. ``@lenient`` keeps them, ``@closed`` refuses them.
"""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

from typing_extensions import NotRequired, get_type_hints, is_typeddict

T = TypeVar("T")
C = TypeVar("C", bound=type)
Check = Callable[[Any], Any]
"""Returns the value that was given, as its type has it, or raises ``_WrongError``."""

_SHOWN_PROBLEMS = 3
_FURTHER = "__further_keys__"
_NAMES = {int: "integer", float: "number", str: "string", bool: "boolean", list: "list", dict: "dictionary"}


@dataclass(frozen=True)
class Within:
    """Bounds of a number, or of the length of a list: ``Annotated[int, Within(0)]``."""

    least: int
    most: int | None = None


@dataclass
class _Problem:
    place: tuple[Any, ...]
    """Keys and indices that lead to the value."""
    text: str
    found: Any

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.place)) or 'it'}: {self.text}, found {_short(self.found)}"


class _WrongError(Exception):
    """A value is not of its type. Places are completed on the way up, so a value that fits costs nothing for them."""

    def __init__(self, problems: list[_Problem]) -> None:
        super().__init__()
        self.problems = problems

    def below(self, key: Any) -> list[_Problem]:
        for problem in self.problems:
            problem.place = (key, *problem.place)
        return self.problems


def lenient(kind: C) -> C:
    """Let a TypedDict keep keys that it does not name. Named keys must have their type."""
    setattr(kind, _FURTHER, "keep")
    return kind


def closed(kind: C) -> C:
    """Let a TypedDict refuse keys that it does not name."""
    setattr(kind, _FURTHER, "refuse")
    return kind


def check_kind(content: Any, kind: type[T], name: str) -> T:
    """Validate a value that was read.

    Args:
        content: The value, as ``json`` or ``yaml`` returned it.
        kind: Type that it must have.
        name: Name of the file or field that it came from, for the error message.

    Returns:
        The value, in new lists and dictionaries.

    Raises:
        ValueError: Names the first entries that do not fit, and what each of them needs to be.
    """
    try:
        return cast(T, _check_of(cast(Any, kind))(content))
    except _WrongError as error:
        shown, count = error.problems[:_SHOWN_PROBLEMS], len(error.problems)
        more = f" (and {count - len(shown)} more)" if count > len(shown) else ""
        raise ValueError(f"{name} does not hold what is needed: {'; '.join(map(str, shown))}{more}") from None


@functools.cache
def _check_of(kind: Any) -> Check:
    """Build the function that checks values of a type, once for each type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind in (Any, object):
        return lambda value: value
    if kind in (None, type(None)):
        return lambda value: value if value is None else _raise_wrong("Input should be None", value)
    if kind in (int, str, bool):
        return functools.partial(_plain, kind)
    if kind is float:
        return _float
    if is_typeddict(kind):
        return _typed_dict(kind)
    if origin is NotRequired:
        return _check_of(arguments[0])
    if origin is Annotated:
        return functools.partial(_within, _check_of(arguments[0]), arguments[1])
    if origin is Literal:
        return functools.partial(_literal, arguments)
    if origin in (Union, types.UnionType):
        return functools.partial(_union, [(_check_of(one), _describe(one)) for one in arguments])
    if origin is list:
        return functools.partial(_list, _check_of(arguments[0]))
    if origin is tuple:
        return functools.partial(_tuple, [_check_of(one) for one in arguments])
    if origin is dict:
        return functools.partial(_dict, *map(_check_of, arguments))
    raise TypeError(f"{kind} is no type of JSON that can be checked")


def _raise_wrong(text: str, value: Any) -> Any:
    raise _WrongError([_Problem((), text, value)])


def _plain(kind: type, value: Any) -> Any:
    # bool is a subclass of int
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    return _raise_wrong(f"Input should be a valid {_NAMES[kind]}", value)


def _float(value: Any) -> float:
    if isinstance(value, float):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            pass
    return cast(float, _raise_wrong("Input should be a valid number", value))


def _within(check: Check, bounds: Within, value: Any) -> Any:
    value = check(value)
    is_list = isinstance(value, list)
    size, text, unit = (len(value), "List should have", " item(s)") if is_list else (value, "Input should be", "")
    if size < bounds.least:
        return _raise_wrong(f"{text} at least {bounds.least}{unit}", value)
    if bounds.most is not None and size > bounds.most:
        return _raise_wrong(f"{text} at most {bounds.most}{unit}", value)
    return value


def _literal(allowed: tuple[Any, ...], value: Any) -> Any:
    if any(type(value) is type(one) and value == one for one in allowed):  # True is not 1
        return value
    return _raise_wrong(f"Input should be {' or '.join(map(repr, allowed))}", value)


def _union(members: list[tuple[Check, str]], value: Any) -> Any:
    problems, fitting = [], []
    for check, _ in members:
        try:
            fitting.append(check(value))
        except _WrongError as error:
            problems.append(error)
    if fitting:  # a whole number stays one if there is a member for it
        return next((one for one in fitting if type(one) is type(value)), fitting[0])
    if len(members) == 2 and members[-1][1] == "None":
        raise problems[0]
    return _raise_wrong(f"Input should be {' or '.join(text for _, text in members)}", value)


def _describe(kind: Any) -> str:
    if kind in (None, type(None)):
        return "None"
    if get_origin(kind) is Annotated:
        return _describe(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    return f"a valid {_NAMES.get(get_origin(kind) or kind, 'dictionary')}"


def _list(check: Check, value: Any) -> list[Any]:
    if not isinstance(value, list):
        return cast(list[Any], _raise_wrong("Input should be a valid list", value))
    return _gather(enumerate(value), check)


def _gather(pairs: Any, check: Check) -> list[Any]:
    """Check the value of each (place, value); report all that do not fit."""
    done, problems = [], []
    for place, value in pairs:
        try:
            done.append(check(value))
        except _WrongError as error:
            problems += error.below(place)
    if problems:
        raise _WrongError(problems)
    return done


def _tuple(checks: list[Check], value: Any) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)) or len(value) != len(checks):
        return cast(tuple[Any, ...], _raise_wrong(f"Input should be a list of {len(checks)} entries", value))
    return tuple(_gather(enumerate(zip(checks, value, strict=True)), lambda pair: pair[0](pair[1])))


def _dict(check_key: Check, check: Check, value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        return cast(dict[Any, Any], _raise_wrong("Input should be a valid dictionary", value))
    _gather(((key, key) for key in value), check_key)
    return dict(zip(value, _gather(value.items(), check), strict=True))


def _typed_dict(kind: Any) -> Check:
    checks = {key: _check_of(one) for key, one in get_type_hints(kind, include_extras=True).items()}
    return functools.partial(_keys, checks, kind.__required_keys__, getattr(kind, _FURTHER, "drop"))


def _keys(checks: dict[str, Check], required: frozenset[str], further: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return cast(dict[str, Any], _raise_wrong("Input should be a valid dictionary", value))
    problems, done = [], {}
    for key, check in checks.items():
        if key in value:
            try:
                done[key] = check(value[key])
            except _WrongError as error:
                problems += error.below(key)
        elif key in required:
            problems.append(_Problem((key,), "Field required", value))
    others = [key for key in value if key not in checks]
    if further == "refuse":
        problems += [_Problem((key,), "Extra inputs are not permitted", value[key]) for key in others]
    if problems:
        raise _WrongError(problems)
    return done | {key: value[key] for key in others} if further == "keep" else done


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
