"""Reading and checking of the files of a run: result.json, metrics.jsonl, eval.json, config.yaml."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

from typing_extensions import NotRequired, TypedDict

from seft_dist.files.kinds import Within, check_kind, lenient
from seft_dist.files.reading import parse_json, read_json, read_text, read_yaml

Count = Annotated[int, Within(0, (1 << 63) - 1)]


@lenient
class SparsityResult(TypedDict):
    """Zeros in the targets, in result.json: shares, and the number of layers whose count has changed."""

    final: float
    layers_off_target: Count
    target: NotRequired[float]


@lenient
class Evaluation(TypedDict):
    """One evaluation of ``validation`` in result.json."""

    step: Count
    loss: float
    perplexity: float


@lenient
class ValidationResult(TypedDict):
    """Entry ``validation`` of result.json."""

    last: Evaluation
    best: Evaluation
    exported: NotRequired[Evaluation]
    """Evaluation of the model that is written, if it is not the one that was trained."""
    stopped_early: bool


@lenient
class RunResult(TypedDict):
    """Content of result.json."""

    steps: Count
    loss: float | None
    seconds: float
    sparsity: SparsityResult
    tokens: NotRequired[Count]
    trainable: NotRequired[Count]
    peak_memory_bytes: NotRequired[Count | None]
    validation: NotRequired[ValidationResult]


@lenient
class ValidationLine(TypedDict):
    """Entry ``validation`` of a line of metrics.jsonl: one evaluation."""

    loss: float
    perplexity: float


@lenient
class MetricsLine(TypedDict):
    """Content of a line of metrics.jsonl."""

    step: Count
    loss: float
    seconds: float
    validation: NotRequired[ValidationLine]


@lenient
class EvaluatedModel(TypedDict):
    """Entry of one model in eval.json."""

    path: NotRequired[str]
    perplexity: NotRequired[float]
    num_tokens: NotRequired[Count]
    window: NotRequired[Count]
    stride: NotRequired[Count | None]
    sparsity: NotRequired[float]
    policy: NotRequired[dict[str, Any]]
    tasks: NotRequired[dict[str, dict[str, float | int]]]


@lenient
class Evaluations(TypedDict):
    """Content of eval.json."""

    models: dict[str, EvaluatedModel]
    data: NotRequired[dict[str, Any] | None]
    settings: NotRequired[dict[str, Any]]


def has_result(path: Path) -> bool:
    """Return whether a result.json is there; an empty or damaged one, as a full disk leaves it, is none."""
    try:
        return bool(read_json(path, dict[str, Any]))
    except (OSError, ValueError):
        return False


def read_result(path: Path) -> RunResult:
    """Read result.json.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged.
    """
    return read_json(path, RunResult)


def read_evaluations(path: Path) -> Evaluations:
    """Read eval.json.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged.
    """
    return read_json(path, Evaluations)


def read_lines(path: Path, kind: Any = MetricsLine) -> list[Any]:
    """Read metrics.jsonl; a last line that is still being written is left out.

    Args:
        path: The file.
        kind: Type that each line must have.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is damaged.
    """
    lines = read_text(path).splitlines()
    if lines and not lines[-1].endswith("}"):
        lines.pop()
    return [parse_json(line, kind, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def read_run_config(path: Path) -> dict[str, Any]:
    """Read config.yaml of a run.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged.
    """
    return check_kind(read_yaml(path), dict[str, Any], str(path))


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table in Markdown; a "|" in a cell is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def flatten_options(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return all options of a run by their dotted names, except its output."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten_options(value, f"{prefix}{key}.")
        elif f"{prefix}{key}" != "output":
            flat[f"{prefix}{key}"] = str(value)
    return flat


def measurement_of(evaluations: Evaluations, model: str) -> dict[str, Any]:
    """Collect everything except its weights that a model's perplexity depends on, as far as eval.json records it.

    A file of an earlier version has no ``policy``; then the entries are taken from its data and settings.

    Args:
        evaluations: Content of eval.json.
        model: Name of one of its models.
    """
    entry = evaluations["models"][model]
    conditions: dict[str, Any] = {"num_tokens": entry["num_tokens"]} if "num_tokens" in entry else {}
    if "policy" in entry:
        return conditions | {name: value for name, value in entry["policy"].items() if name != "data"}
    data, settings = evaluations.get("data") or {}, evaluations.get("settings", {})
    conditions |= {name: data[name] for name in ("path", "name", "split", "holdout", "holdout_every") if name in data}
    conditions |= {"seq_len": entry["window"]} if "window" in entry else {}
    conditions |= {"stride": entry["stride"]} if "stride" in entry else {}
    conditions |= {name: settings[name] for name in ("max_tokens", "dtype") if settings.get(name, "auto") != "auto"}
    return conditions


def list_differences(conditions: dict[str, dict[str, Any]]) -> list[str]:
    """List the conditions that differ between several measurements.

    Args:
        conditions: Conditions of each measurement, by its name. A measurement without an entry is not compared in it.

    Returns:
        A text such as "seq_len is 16 (a, b); 64 (c)" for each entry that differs.
    """
    texts = []
    for key in dict.fromkeys(key for entries in conditions.values() for key in entries):
        names: dict[str, list[str]] = {}
        for name, entries in conditions.items():
            if key in entries:
                names.setdefault(str(entries[key]), []).append(name)
        if len(names) > 1:
            texts.append(f"{key} is " + "; ".join(f"{value} ({', '.join(of[:4])})" for value, of in names.items()))
    return texts
