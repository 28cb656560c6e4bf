"""What runs leave in their folders, read and checked: result.json, metrics.jsonl, eval.json, config.yaml."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, with_config
from typing_extensions import NotRequired, TypedDict

from seft_dist.files.reading import LENIENT, check_kind, parse_json, read_json, read_text, read_yaml

Count = Annotated[int, Field(ge=0, lt=1 << 63)]


@with_config(LENIENT)
class Sparsity(TypedDict):
    """Zeros in the targets."""

    final: float
    layers_off_target: Count
    target: NotRequired[float]


@with_config(LENIENT)
class Result(TypedDict):
    """result.json."""

    steps: Count
    loss: float | None
    seconds: float
    sparsity: Sparsity
    tokens: NotRequired[Count]
    trainable: NotRequired[Count]
    peak_memory_bytes: NotRequired[Count | None]


@with_config(LENIENT)
class Line(TypedDict):
    """A line of metrics.jsonl."""

    step: Count
    loss: float
    seconds: float


@with_config(LENIENT)
class Model(TypedDict):
    """A model in eval.json."""

    path: NotRequired[str]
    perplexity: NotRequired[float]
    num_tokens: NotRequired[Count]
    window: NotRequired[Count]
    stride: NotRequired[Count | None]
    sparsity: NotRequired[float]
    policy: NotRequired[dict[str, Any]]
    tasks: NotRequired[dict[str, dict[str, float | int]]]


@with_config(LENIENT)
class Evaluations(TypedDict):
    """eval.json."""

    models: dict[str, Model]
    data: NotRequired[dict[str, Any] | None]
    settings: NotRequired[dict[str, Any]]


def read_result(path: Path) -> Result:
    """Read result.json.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged.
    """
    return read_json(path, Result)


def read_evaluations(path: Path) -> Evaluations:
    """Read eval.json.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged.
    """
    return read_json(path, Evaluations)


def read_lines(path: Path, kind: Any = Line) -> list[Any]:
    """Read metrics.jsonl; a last line that is still being written is left out.

    Args:
        path: The file.
        kind: What each line must hold.

    Raises:
        FileNotFoundError: There is none.
        ValueError: A line is damaged.
    """
    lines = read_text(path).splitlines()
    if lines and not lines[-1].endswith("}"):
        lines.pop()
    adapter = TypeAdapter(kind)
    return [parse_json(line, adapter, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def read_config(path: Path) -> dict[str, Any]:
    """Read config.yaml of a run.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged.
    """
    return check_kind(read_yaml(path), dict[str, Any], str(path))


def how_measured(found: Evaluations, model: str) -> dict[str, Any]:
    """All that decides about a model's perplexity beside its weights, as far as eval.json says it.

    Args:
        found: eval.json.
        model: One of its models.
    """
    entry = found["models"][model]
    how: dict[str, Any] = {"num_tokens": entry["num_tokens"]} if "num_tokens" in entry else {}
    if "policy" in entry:
        return how | {name: value for name, value in entry["policy"].items() if name != "data"}
    data, settings = found.get("data") or {}, found.get("settings", {})
    how |= {name: data[name] for name in ("path", "name", "split", "holdout", "holdout_every") if name in data}
    how |= {"seq_len": entry["window"]} if "window" in entry else {}
    how |= {"stride": entry["stride"]} if "stride" in entry else {}
    how |= {name: settings[name] for name in ("max_tokens", "dtype") if settings.get(name, "auto") != "auto"}
    return how


def unlike(found: dict[str, dict[str, Any]]) -> list[str]:
    """Name what differs between numbers that stand side by side.

    Args:
        found: Name of each number, and how it was measured. What one of them does not say is not compared for it.

    Returns:
        "seq_len is 16 (a, b), 64 (c)" for each entry that differs.
    """
    texts = []
    for key in dict.fromkeys(key for how in found.values() for key in how):
        names: dict[str, list[str]] = {}
        for name, how in found.items():
            if key in how:
                names.setdefault(str(how[key]), []).append(name)
        if len(names) > 1:
            texts.append(f"{key} is " + "; ".join(f"{value} ({', '.join(of[:4])})" for value, of in names.items()))
    return texts
