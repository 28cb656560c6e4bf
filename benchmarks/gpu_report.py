"""Conversion of gpu.json of benchmarks/gpu.py to a Markdown page with tables."""

from typing import Any


def markdown(report: dict[str, Any]) -> str:
    """Write the page.

    Args:
        report: Content of gpu.json.
    """
    about = report["about"]
    lines = ["# GPU check", "", f"    {report['command']}", ""]
    lines += table(["what", "is"], [[key, str(value)] for key, value in about.items()])
    found = report["parts"]
    heads = ["ok", "failed", "stopped", "does not fit", "not run", "missing"]
    rows = []
    for name, part in found.items():
        counts = [str(sum(row["status"] == head for row in part["rows"])) for head in heads]
        rows.append([name, part["status"], f"{part['seconds']:.0f}", *counts])
    lines += ["", *table(["part", "status", "seconds", *heads], rows)]
    makers = {"correct": correct, "sampled": sampled, "step": step, "70b": largest, "plan": plan}
    for name, part in found.items():
        lines += ["", f"## {name}", ""]
        if name in ("step", "70b", "plan") and "chosen_by" in part:
            lines += [f"Forms of the sampled gradient are chosen by {part['chosen_by']}.", ""]
        try:
            lines += makers[name](part["rows"])
        except (
            KeyError,
            TypeError,
            ValueError,
            IndexError,
        ) as error:  # an incomplete table must not hide the failures below
            lines.append(f"(no table: {type(error).__name__}: {error})")
        lines += problems(part)
    return "\n".join(lines) + "\n"


def good(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the cases that ended well."""
    return [row for row in rows if row["status"] == "ok"]


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a table."""
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    texts = [[" ".join(cell.replace("|", "/").split()) for cell in row] for row in rows]  # a cell is one line
    return lines + [f"| {' | '.join(row)} |" for row in texts]


def problems(part: dict[str, Any]) -> list[str]:
    """List the cases that did not run, with their tracebacks."""
    lines = []
    if "why" in part:
        lines += ["", f"{part['status']}: {part['why']}"]
    for row in part["rows"]:
        if "why" in row:
            lines += ["", f"{row['status']}: {row['case']} ({row['why']})"]
    texts = [(row["case"], row["traceback"]) for row in part["rows"] if "traceback" in row]
    texts += [("the part itself", part["traceback"])] if "traceback" in part else []
    for name, text in texts:
        lines += ["", f"failed: {name}", "", *[f"    {line}" for line in text.rstrip().splitlines()]]
    return lines


def correct(rows: list[dict[str, Any]]) -> list[str]:
    """Tabulate the kernels and the tests."""
    kernels = [row for row in good(rows) if "tests" not in row]
    lines = table(["kernel", "largest difference"], [[row["case"], differences(row)] for row in kernels])
    for row in rows:
        if "tests" in row:
            lines += ["", *table(["test", "outcome"], [[name, outcome] for name, outcome in row["tests"].items()])]
    return lines


def differences(row: dict[str, Any]) -> str:
    """Differences of the forms of one kernel; packing is compared bit for bit."""
    found = row.get("largest_difference")
    return "none" if found is None else ", ".join(f"{form} {value:.1e}" for form, value in found.items())


def sampled(rows: list[dict[str, Any]]) -> list[str]:
    """Tabulate the duration of every form in microseconds."""
    rows = good(rows)
    measured = [row for row in rows if "density" in row]
    forms = sorted({form for row in measured for form in row["seconds"]})
    heads = [
        "type",
        "tokens",
        "weight",
        "density",
        *[f"{form}, us" for form in forms],
        "fastest",
        "thin, us",
        "forward, us",
    ]
    cells = []
    for row in measured:
        times = [f"{1e6 * row['seconds'][form]:.0f}" if form in row["seconds"] else "" for form in forms]
        fastest = min(row["seconds"], key=lambda form: row["seconds"][form])
        where = [row["dtype"], str(row["tokens"]), f"{row['rows']} x {row['columns']}", f"{row['density']:.1%}"]
        cells.append([*where, *times, fastest, f"{1e6 * row['thin']:.0f}", f"{1e6 * row['forward']:.0f}"])
    launches = [f"Triton starts with {row['launch']}." for row in rows if "launch" in row]
    return [*launches, "", *table(heads, cells)]


def step(rows: list[dict[str, Any]]) -> list[str]:
    """Tabulate duration and memory of every method, as ratios to the floor."""
    heads = ["setting", "method", "density", "ms", "x floor", "peak GB", "x floor"]
    heads += ["evolution step, x floor", "average of 60, x floor"]
    cells = []
    for row in good(rows):
        density = f"{row['density']:.0%}" if row.get("density") else ""
        numbers = [f"{1e3 * row['seconds']:.1f}", times(row, "seconds"), f"{row['peak'] / 1e9:.2f}", times(row, "peak")]
        cells.append(
            [row["setting"], row["method"], density, *numbers, times(row, "evolution_step"), times(row, "average")]
        )
    return table(heads, cells)


def times(row: dict[str, Any], key: str) -> str:
    """Format a ratio to the floor; empty if there is none."""
    value = row.get(f"{key}_x_floor")
    return "" if value is None else f"{value:.3f}"


def largest(rows: list[dict[str, Any]]) -> list[str]:
    """Tabulate what was measured of the largest model, also where it was stopped or did not fit, and its plan."""
    lines = []
    for row in rows:
        if "plan" not in row:
            continue
        plan = row["plan"]
        cells = [
            ["peak of tensors, GB", number(row, "peak", 1e9), number(plan, "bytes_of_tensors", 1e9)],
            ["with reserve and fragmentation, GB", number(row, "peak_reserved", 1e9), number(plan, "bytes", 1e9)],
            ["free memory, GB", "", number(plan, "bytes_of_device", 1e9)],
            ["an ordinary step, s", number(row, "seconds"), number(plan, "seconds")],
            ["a step with an evolution, s", number(row, "evolution_step"), number(plan, "evolution_step")],
            ["creating the model, s", number(row, "seconds_to_create"), ""],
            ["packed weights, GB", number(row, "bytes_packed", 1e9), ""],
        ]
        about = f"{row['model']}, {row['status']}, {row.get('deltas', 'no')} deltas:"
        lines += [about, "", *table(["", "measured", "planned"], cells), ""]
    return lines


def number(row: dict[str, Any], key: str, unit: float = 1.0) -> str:
    """Format a number; empty if there is none."""
    value = row.get(key)
    return "" if value is None else f"{value / unit:.3f}"


def plan(rows: list[dict[str, Any]]) -> list[str]:
    """Tabulate the rates, and the ratios of plans to measurements."""
    lines = []
    for row in good(rows):
        if "rates" in row:
            shares = {key: row[key] for key in row if key.endswith("share") or key.startswith("mfu")}
            cells = [[key, "" if value is None else f"{value:.3f}"] for key, value in shares.items()]
            lines += [f"By the data sheet of {row['data_sheet']}:", "", *table(["share", "measured"], cells), ""]
    heads = ["case", "s measured", "by data sheet", "ratio", "by measured rates", "ratio"]
    heads += ["planned GB", "memory, planned over measured"]
    cells = []
    for row in good(rows):
        if "planned_bytes" not in row:
            continue
        keys = [f"{what} by {name}" for name in ("data sheet", "measured rates") for what in ("seconds", "ratio")]
        times = [f"{row[key]:.4f}" if key in row else "" for key in ("seconds", *keys)]
        times[0] = times[0] or row["measured"]
        cells.append([row["case"], *times, number(row, "planned_bytes", 1e9), number(row, "memory_ratio")])
    return [*lines, *table(heads, cells)]
