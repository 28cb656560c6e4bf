"""Tables of a study's results: for a terminal, Markdown, CSV."""

import csv
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from seft_dist.files.writing import write_text
from seft_dist.results.run_files import markdown_table
from seft_dist.study.results import FEW_WORDS, Results, Row, Search
from seft_dist.study.statistics import CONFIDENCE, Difference, Spread

_LEFT = ("method", "base", "chosen", "tried: validation perplexity", "own settings", "part", "text", "at the edge")
_WIDE = 160


@dataclass
class Section:
    """One table, with notes that explain it."""

    title: str
    head: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def sections(results: Results) -> Iterator[Section]:
    """Make all tables.

    Args:
        results: Results of the study, complete or not.
    """
    yield _quality(results)
    yield _cost(results)
    if results["searches"]:
        yield _searches(results)
    yield _parts(results)


def _quality(results: Results) -> Section:
    """Make the table of perplexities, differences, forgetting and tasks."""
    rows = results["rows"]
    tasks = dict.fromkeys(name for row in rows for name in row["tasks"] if _is_main(name, results))
    forgets = any(row["forgetting"] for row in rows)
    head = ["method", "base", "chosen", "test perplexity", f"minus {results['reference']}", "seeds"]
    head += ["forgetting"] if forgets else []
    table = []
    for row in rows:
        cells = [
            row["method"],
            row["base"],
            row["setting"],
            _spread(row["test"], 3),
            _difference(row["versus"], 3) + _pairs(row, results),
            _seeds(row),
        ]
        cells += [_spread(row["forgetting"], 3)] if forgets else []
        table.append(cells + [_spread(row["tasks"].get(name), 4) for name in tasks])
    notes = [
        "Perplexity of the test part: mean and standard deviation over seeds.",
        f"minus {results['reference']}: mean of the differences of runs with the same seed, and its {CONFIDENCE:.0%} "
        "interval (Student's t); negative is better than the reference.",
    ]
    notes += ["forgetting: perplexity of a text that has nothing to do with the training text."] if forgets else []
    return Section("Quality", [*head, *tasks], table, notes)


def _is_main(name: str, results: Results) -> bool:
    """Tell whether tables show a metric: accuracies, and all metrics of a task without an accuracy."""
    task, _, metric = name.partition(" ")
    others = {
        other.partition(" ")[2] for row in results["rows"] for other in row["tasks"] if other.startswith(f"{task} ")
    }
    return metric in ("acc", "acc_norm") or not others & {"acc", "acc_norm"}


def _cost(results: Results) -> Section:
    """Make the table of sizes, memory and seconds."""
    head = ["method", "trainable", "zeros", "off target", "peak memory", "s/step", "seconds", "steps", "tokens"]
    table = [
        [
            row["method"],
            _count(row["trainable"]),
            _share(row["zeros"]),
            _count(row["off_target"]),
            _bytes(row["peak_memory_bytes"]),
            _spread(row["seconds_per_step"], 3),
            _spread(row["seconds"], 0),
            _count(row["steps"]),
            _count(row["tokens"]),
        ]
        for row in results["rows"]
    ]
    made = results["made_with"]
    notes = [
        "zeros: of the targets' weights, in the model that was measured. seconds: of training, evolutions included."
    ]
    if made:
        notes.append(
            f"Made on {made.get('device')} ({made.get('processor')}), {made.get('threads')} threads, "
            f"{made.get('processes at a time')} processes at a time, torch {made.get('torch')}."
        )
    return Section("Cost", head, table, notes)


def _searches(results: Results) -> Section:
    head = ["method", "own settings", "tried: validation perplexity", "chosen", "at the edge"]
    table = [
        [one["method"], _options(one), _tried(one), _chosen(one), "; ".join(one["edges"])]
        for one in results["searches"]
    ]
    sizes = {max(1, len(one["tried"])) for one in results["searches"]}
    if sizes == {1}:
        return Section("What was searched", head, table, ["Nothing: each method has one setting."])
    notes = [
        f"Chosen by the smallest perplexity of the validation part, among runs of seed {results['search_seed']} with "
        f"all {results['tokens']:,} tokens.",
        f"Every method could choose among {min(sizes)}."
        if len(sizes) == 1
        else "**Methods could choose among different numbers of settings** (unequal_grids).",
    ]
    if any(one["edges"] for one in results["searches"]):
        notes.append("A choice at the edge of its grid may not be the best: what lies beyond was not tried.")
    return Section("What was searched", head, table, notes)


def _parts(results: Results) -> Section:
    table = []
    for name, part in results["parts"].items():
        repeated, of = part["repeated"]
        shared = f"{repeated:,} of {of:,}" if of else ""
        path = str(part["options"]["path"])
        table.append([name, path, part["kind"], f"{part['records']:,}", f"{part['words']:,}", shared])
    head = ["part", "text", "kind", "records", "words", "paragraphs also in train"]
    short = [
        f"{count} of {name}" for name, part in results["parts"].items() if (count := part.get("short_repeated", 0))
    ]
    note = "No record is in two parts"
    note += f", but records of fewer than {FEW_WORDS} words: train has {', '.join(short)}, too." if short else "."
    return Section("Text", head, table, [note])


def _options(search: Search) -> str:
    return ", ".join(f"{key}={value}" for key, value in search["options"].items()) or "-"


def _tried(search: Search) -> str:
    texts = []
    for one in search["tried"]:
        value = f"{one['validation']:.3f}" if one["validation"] is not None else one["status"]
        texts.append(f"{one['setting']}: {value}")
    return "; ".join(texts) or "-"


def _chosen(search: Search) -> str:
    is_lost = search["tried"] and all(one["status"] == "diverged" for one in search["tried"])
    return search["chosen"] or ("none: all diverged" if is_lost else "not yet")


def _spread(value: Spread | None, digits: int) -> str:
    if value is None:
        return "-"
    mean = f"{value['mean']:,.{digits}f}"
    return mean if value["deviation"] is None else f"{mean} ± {value['deviation']:,.{digits}f}"


def _difference(value: Difference | None, digits: int) -> str:
    if value is None:
        return "-"
    mean = f"{value['mean']:+.{digits}f}"
    if value["low"] is None or value["high"] is None:
        return mean
    return f"{mean} [{value['low']:+.{digits}f}, {value['high']:+.{digits}f}]"


def _pairs(row: Row, results: Results) -> str:
    """Say how many pairs a difference is of, if seeds are missing."""
    count, seeds = row["versus"]["count"] if row["versus"] else 0, len(results["seeds"])
    return f" ({count} of {seeds} pairs)" if count and count < seeds and row["wanted"] == seeds else ""


def _seeds(row: Row) -> str:
    text = str(row["runs"]) if row["runs"] == row["wanted"] else f"{row['runs']} of {row['wanted']}"
    return text + (f" ({row['diverged']} diverged)" if row["diverged"] else "")


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _bytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e9:.2f} GB"


def table_console() -> Console:
    """Open a console on standard output; a file gets lines that are wide enough for the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, _WIDE))


def print_results(results: Results, console: Console) -> None:
    """Print all tables, warnings and failures."""
    for section in sections(results):
        table = Table(title=section.title, box=SIMPLE, padding=(0, 1), title_justify="left", title_style="bold")
        for name in section.head:
            table.add_column(escape(name), justify="left" if name in _LEFT else "right", overflow="fold")
        for row in section.rows:
            table.add_row(*map(escape, row))
        console.print(table)
        for note in section.notes:
            console.print(note.replace("**", ""), style="dim", markup=False, highlight=False)
    for text in endings(results):
        console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)


def endings(results: Results) -> list[str]:
    """List warnings, failures, and the share that is done."""
    texts = [f"Warning: {text}" for text in results["warnings"]]
    texts += [
        f"{failure['task']} failed with code {failure['code']}, see {failure['log']}" for failure in results["failures"]
    ]
    if results["done"] < results["total"]:
        texts.append(
            f"{results['done']} of {results['total']} processes are done; the same command goes on with the others"
        )
    return texts


def write_tables(results: Results, folder: Path) -> list[Path]:
    """Write results.md, results.csv (a line a method), runs.csv (a line a run) and search.csv (a line a setting tried).

    Args:
        results: Results of the study.
        folder: Gets the files.
    """
    parts = [f"# Study {results['name']}\n"]
    for section in sections(results):
        table = markdown_table(section.head, section.rows)
        parts.append(f"## {section.title}\n\n{table}\n\n" + "\n".join(section.notes) + "\n")
    parts += [f"**{text}**\n" for text in endings(results)]
    contents = {"results.md": "\n".join(parts), "results.csv": _methods_csv(results), "runs.csv": _runs_csv(results)}
    contents["search.csv"] = _search_csv(results)
    for name, text in contents.items():
        write_text(folder / name, text)
    return [folder / name for name in contents]


def _methods_csv(results: Results) -> str:
    searches = {one["method"]: one for one in results["searches"]}
    lines = []
    for row in results["rows"]:
        line: dict[str, object] = {
            name: row[name] for name in ("method", "base", "setting", "runs", "wanted", "diverged")
        }
        for name in ("test", "forgetting", "seconds_per_step", "seconds"):
            line |= _columns(name, row[name])
        versus = row["versus"] or {"mean": "", "low": "", "high": "", "count": ""}
        line |= {f"versus {results['reference']} {key}": versus[key] for key in ("mean", "low", "high", "count")}
        for name, value in row["tasks"].items():
            line |= _columns(name, value)
        for name in ("trainable", "zeros", "off_target", "peak_memory_bytes", "steps", "tokens"):
            line[name] = row[name]  # type: ignore[literal-required]
        search = searches.get(row["method"])
        line |= {"tried": len(search["tried"]) if search else 0, "edges": "; ".join(search["edges"]) if search else ""}
        lines.append(line)
    return _csv(lines)


def _columns(name: str, value: Spread | None) -> dict[str, object]:
    shown = value or {"mean": "", "deviation": ""}
    return {f"{name} mean": shown["mean"], f"{name} deviation": shown["deviation"]}


def _runs_csv(results: Results) -> str:
    lines = []
    for run in results["runs"]:
        line: dict[str, object] = {**run, **run["tasks"]}
        del line["tasks"]
        lines.append(line)
    return _csv(lines)


def _search_csv(results: Results) -> str:
    lines: list[dict[str, object]] = []
    for search in results["searches"]:
        for tried in search["tried"]:
            chosen = tried["setting"] == search["chosen"]
            lines.append({"method": search["method"], "seed": results["search_seed"], **tried, "chosen": chosen})
    return _csv(lines, ["method", "seed", "setting", "validation", "status", "chosen"])


def _csv(lines: list[dict[str, object]], names: list[str] | None = None) -> str:
    text = io.StringIO()
    names = names or list(dict.fromkeys(name for line in lines for name in line))
    writer = csv.DictWriter(text, names, restval="")
    writer.writeheader()
    for line in lines:
        writer.writerow({key: "" if value is None or _is_nan(value) else value for key, value in line.items()})
    return text.getvalue()


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)
