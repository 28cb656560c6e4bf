"""Drawings of how runs trained: loss, validation loss, learning rate, gradient norm, and the perplexities."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from seft_dist.results.figures import smooth
from seft_dist.results.page.record import VALIDATION, RunRecord, number
from seft_dist.results.page.svg import (
    DASHES,
    GRID,
    HEIGHT,
    INK,
    MUTED,
    SERIES,
    WIDTH,
    Figure,
    Key,
    Table,
    draw_svg,
    printable,
    thin_out,
)
from seft_dist.results.page.words import decimal, spread_out

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_ROWS = 12
"""Largest number of steps in the table of a run's metrics."""
_MOST_RECORDED_LINES = 3
"""Largest number of runs in a drawing that has the recorded losses beside the running means."""
_SPIKE_RATIO = 10
"""Ratio of the largest gradient norm to the median above which the axis is logarithmic."""


def line_style(index: int) -> dict[str, Any]:
    """Return colour and dashes of a run as keyword arguments of matplotlib's ``plot``."""
    return {"color": SERIES[index % len(SERIES)], "linestyle": DASHES[index // len(SERIES) % len(DASHES)]}


def key_of(index: int, label: str) -> Key:
    """Return the legend's entry of a run."""
    shape = ("line", "dashes", "dotted")[index // len(SERIES) % len(DASHES)]
    return Key(label, SERIES[index % len(SERIES)], shape)


def keys_of(runs: Sequence[RunRecord]) -> list[Key]:
    """Return the legend of several runs; empty for one."""
    return [key_of(i, run.label) for i, run in enumerate(runs)] if len(runs) > 1 else []


def finish(axes: "Axes", runs: Sequence[RunRecord], ylabel: str, *, starts_at_zero: bool = False) -> None:
    """Label the axes of a drawing over steps."""
    axes.set(xlabel="optimizer step", ylabel=ylabel)
    axes.set_xlim(left=0, right=max([run.step for run in runs] + [1]) * 1.01)
    axes.grid(False, axis="x")
    axes.margins(y=0.08)
    if starts_at_zero:
        axes.set_ylim(bottom=0)


def over_layers(axes: "Axes", ylabel: str) -> None:
    """Label the axes of a drawing over layers."""
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel="layer", ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(False, axis="x")


def logarithmic(axes: "Axes") -> None:
    """Make the vertical axis logarithmic, with numbers that need no exponent."""
    axes.set_yscale("log", subs=[2, 5])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")


def training_figures(runs: Sequence[RunRecord], draws: bool) -> Iterator[Figure]:
    """Yield loss, validation loss, learning rate and gradient norm, as far as the runs have recorded them.

    Args:
        runs: The runs.
        draws: False: tables only.
    """
    if any(run.series("loss")[0] for run in runs):
        yield _loss(runs, draws)
    if len(runs) > 1 and any(run.series(VALIDATION)[0] for run in runs):
        yield _curve("validation", "Validation loss", VALIDATION, "nats per token", runs, draws)
    if any(run.series("lr")[0] for run in runs):
        yield _curve("learning-rate", "Learning rate", "lr", "learning rate", runs, draws, starts_at_zero=True)
    if any(run.series("grad_norm")[0] for run in runs):
        yield _curve("gradient-norm", "Gradient norm before clipping", "grad_norm", "norm", runs, draws)


def _loss(runs: Sequence[RunRecord], draws: bool) -> Figure:
    """Draw the training loss and, of a single run, its validation loss and evolutions."""
    title, alone = "Training loss", len(runs) == 1
    has_validation = alone and bool(runs[0].series(VALIDATION)[0])
    legend = keys_of(runs)
    if alone:
        legend = [Key("running mean"), Key("as recorded", SERIES[0], "thin")]
        legend += [Key("validation", SERIES[1], "dots")] if has_validation else []
        legend += [Key("evolution", MUTED, "dotted")] if runs[0].later_evolutions else []
        title += " and validation loss" if has_validation else ""

    def draw(axes: "Axes") -> None:
        for i, run in enumerate(runs):
            steps, losses = run.series("loss")
            style = line_style(i)
            if len(runs) <= _MOST_RECORDED_LINES:
                axes.plot(*thin_out(steps, losses), gid=f"run-{i}-0", alpha=0.35, linewidth=0.9, color=style["color"])
            axes.plot(*thin_out(steps, smooth(losses)), gid=f"run-{i}-1", **style)
        if alone:
            for line in spread_out(runs[0].later_evolutions, 60):
                axes.axvline(line["step"], color=MUTED, linestyle=":", linewidth=0.7, zorder=0)
        if has_validation:
            axes.plot(*runs[0].series(VALIDATION), color=SERIES[1], marker="o", markersize=3.5)
        finish(axes, runs, "nats per token")

    alt = " ".join(_describe(run, "loss", "training loss") for run in runs)
    alt += _describe(runs[0], VALIDATION, "validation loss") if has_validation else ""
    table = _values(runs[0]) if alone else _extremes(runs, "loss")
    note = "The thin line is the mean over ranks as it was recorded, the other one its running mean."
    note = note if len(runs) <= _MOST_RECORDED_LINES else "Running means."
    return _figure("loss", title, alt, table, draw, draws, legend, note)


def _curve(
    name: str, title: str, key: str, ylabel: str, runs: Sequence[RunRecord], draws: bool, starts_at_zero: bool = False
) -> Figure:
    """Draw one entry of metrics.jsonl over the steps."""

    def draw(axes: "Axes") -> None:
        for i, run in enumerate(runs):
            steps, values = run.series(key)
            marker: dict[str, Any] = {"marker": "o", "markersize": 3.5} if key == VALIDATION else {}
            axes.plot(*thin_out(steps, values), gid=f"run-{i}-0", **line_style(i), **marker)
        limit = runs[0].setting("optim.max_grad_norm") if key == "grad_norm" and len(runs) == 1 else None
        if isinstance(limit, (int, float)):
            axes.axhline(limit, color=MUTED, linestyle="--", linewidth=1)
        finish(axes, runs, ylabel, starts_at_zero=starts_at_zero)
        values = sorted(value for run in runs for value in run.series(key)[1])
        if key == "grad_norm" and values[0] > 0 and values[-1] > _SPIKE_RATIO * values[len(values) // 2]:
            logarithmic(axes)

    legend = keys_of(runs)
    limit = runs[0].setting("optim.max_grad_norm")
    if key == "grad_norm" and len(runs) == 1 and isinstance(limit, (int, float)):
        legend = [Key("gradient norm"), Key(f"clipped above {limit:g}", MUTED, "dashes")]
    alt = " ".join(_describe(run, key, title.lower()) for run in runs)
    return _figure(name, title, alt, _extremes(runs, key), draw, draws, legend)


def _figure(
    name: str,
    title: str,
    alt: str,
    table: Table,
    draw: Callable[["Axes"], None],
    draws: bool,
    legend: Sequence[Key] = (),
    note: str = "",
) -> Figure:
    svg = draw_svg(name, title, alt, draw) if draws else Markup()
    return Figure(name, title, alt, table, legend=legend, note=note if draws else "", svg=svg)


def _describe(run: RunRecord, key: str, what: str) -> str:
    """Describe in a sentence, for readers who do not see the drawing, how one entry of metrics.jsonl changed."""
    steps, values = run.series(key)
    if not values:
        return f"{printable(run.label)}: no {what}. "
    lowest = min(range(len(values)), key=values.__getitem__)
    return (
        f"{printable(run.label)}: {what} {decimal(values[0])} at step {steps[0]}, {decimal(values[-1])} at step "
        f"{steps[-1]}, lowest {decimal(values[lowest])} at step {steps[lowest]}. "
    )


def _values(run: RunRecord) -> Table:
    """Tabulate a run's metrics at a few steps."""
    names = {"loss": "loss", VALIDATION: "validation loss", "lr": "learning rate", "grad_norm": "gradient norm"}
    shown = [key for key in names if run.series(key)[0]]
    rows = [
        [str(line["step"]), *(decimal(number(line, key), 4) for key in shown)]
        for line in spread_out([line for line in run.lines if "loss" in line], _MOST_ROWS)
    ]
    return Table(["step", *(names[key] for key in shown)], rows, f"{len(rows)} of {len(run.lines)} recorded steps")


def _extremes(runs: Sequence[RunRecord], key: str) -> Table:
    rows = []
    for run in runs:
        steps, values = run.series(key)
        if values:
            low, high = (f(range(len(values)), key=values.__getitem__) for f in (min, max))
            ends = [decimal(values[0], 4), decimal(values[-1], 4)]
            between = [f"{decimal(values[i], 4)} (step {steps[i]})" for i in (low, high)]
            rows.append([run.label, *ends, *between])
    return Table(["run", "first", "last", "lowest", "highest"], rows)


def perplexity_figure(runs: Sequence[RunRecord], draws: bool) -> Figure | None:
    """Draw the perplexities of eval.json as bars; None if no run has been evaluated."""
    bars = []
    for i, run in enumerate(runs):
        models = run.evaluations["models"] if run.evaluations else {}
        for model, entry in models.items():
            if "perplexity" in entry:
                bars.append((i, run.label, model, float(entry["perplexity"])))
    if not bars:
        return None
    alone = len(runs) == 1
    names = [printable(model if alone else f"{label}: {model}", 40) for _, label, model, _ in bars]
    finite = [value for *_, value in bars if math.isfinite(value)]

    def draw(axes: "Axes") -> None:
        rows = range(len(bars))
        for row, (i, _, model, value) in enumerate(bars):
            colour = SERIES[i % len(SERIES)] if model == "repaired" or not alone else MUTED
            length = value if math.isfinite(value) else 0
            faint = 1.0 if model == "repaired" else 0.45
            axes.barh(row, length, 0.62, color=colour, alpha=faint, gid=f"run-{i}-{row}")
            label: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "color": INK}
            axes.annotate(decimal(value), (length, row), gid=f"run-{i}-{len(bars) + row}", **label)
        axes.set_yticks(rows, names)
        axes.invert_yaxis()
        axes.set(xlabel="perplexity (lower is better)")
        axes.set_xlim(0, 1.18 * max(finite + [1e-9]))
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_color(GRID)

    alt = "Perplexity: " + "; ".join(f"{name} {decimal(value)}" for name, (*_, value) in zip(names, bars, strict=True))
    table = Table(["run", "model", "perplexity"], [[label, model, decimal(v, 5)] for _, label, model, v in bars])
    height = max(0.55 + 0.3 * len(bars), HEIGHT / 2)
    title = "Perplexity on the evaluation's text"
    svg = draw_svg("perplexity", title, alt, draw, width=WIDTH, height=height) if draws else Markup()
    return Figure("perplexity", title, alt, table, svg=svg)
