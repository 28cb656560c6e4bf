"""Figures of a study: quality against cost, and learning curves.

Only this file of seft_dist.study needs matplotlib (the extra ``plots``).
"""

import itertools
import logging
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import TypedDict

from seft_dist.results.figures import BLUE, GREEN, GREY, ORANGE, STYLE, load_pyplot, save_figure, smooth
from seft_dist.results.run_files import read_lines
from seft_dist.study.plan import RUN
from seft_dist.study.results import Results, Row
from seft_dist.training.metrics import FILE as METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

log = logging.getLogger(__name__)

FOLDER = "figures"
_COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#B8A000")
"""Okabe and Ito's, the yellow a little darker."""
_MARKERS = "osD^vPX*"
_SIZE = (9.0, 4.5)
_AXES = {
    "trainable": "trainable parameters",
    "seconds": "seconds of training",
    "memory": "peak memory, GB",
}
_FAR = 1.0
"""A base whose perplexity is farther from the methods' than so many times their range is named in the legend only."""
_NEAR = 2.0
"""In the figure of methods, a perplexity that differs from the best by more than this factor is written at the edge."""


class _Line(TypedDict):
    step: int
    loss: float
    tokens: int


def write_figures(results: Results, folder: Path) -> list[Path]:
    """Draw methods, quality-trainable, quality-seconds, quality-memory and curves, each .png, into ``figures``.

    A figure for which no run has numbers is left out.

    Args:
        results: Results of the study.
        folder: Folder of the study, with its cells.

    Returns:
        Paths of the files.

    Raises:
        ValueError: matplotlib is not installed.
    """
    plt = load_pyplot("figures")

    paths = []
    with plt.rc_context(STYLE):
        for name in ("methods", *(f"quality-{axis}" for axis in _AXES), "curves"):
            figure, axes = plt.subplots(figsize=_SIZE, layout="constrained")
            if name == "methods":
                drawn = _methods(results, axes)
            elif name == "curves":
                drawn = _curves(results, folder, axes)
            else:
                drawn = _quality(results, name.removeprefix("quality-"), axes)
            if drawn:
                (folder / FOLDER).mkdir(exist_ok=True)
                paths.append(folder / FOLDER / f"{name}.png")
                save_figure(figure, paths[-1])
            plt.close(figure)
    return paths


def _looks(results: Results) -> dict[str, dict[str, Any]]:
    """Choose the colour and marker of each method, the same in all figures."""
    names = [row["method"] for row in results["rows"]]
    return {
        name: {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[(i + i // len(_COLOURS)) % len(_MARKERS)]}
        for i, name in enumerate(names)
    }


def _x_position(row: Row, name: str) -> float:
    """Find the position of a method on the lower axis; it is NaN if that is unknown."""
    if name == "seconds":
        return row["seconds"]["mean"] if row["seconds"] else math.nan
    value = row["trainable"] if name == "trainable" else row["peak_memory_bytes"]
    return math.nan if value is None else value / 1e9 if name == "memory" else value


def _methods(results: Results, axes: "Axes") -> bool:
    """Draw a line for each method, the best first: test perplexity of each seed and their mean; False without any."""
    rows = [(row["test"]["mean"], row) for row in results["rows"] if row["test"]]
    best = min((mean for mean, row in rows if row["tokens"]), default=math.inf)
    if not math.isfinite(best):
        return False
    rows.sort(key=lambda pair: pair[0])
    several = len({row["base"] for _, row in rows if row["tokens"]}) > 1
    labels = []
    for y, (mean, row) in enumerate(rows):
        colour = BLUE if row["tokens"] else GREY
        if not best / _NEAR <= mean <= _NEAR * best:  # drawn where it is, it would squeeze all methods together
            far = _perplexity(mean)
            text, x, side = (f"{far} \u2192", 1, "right") if mean > best else (f"\u2190 {far}", 0, "left")
            axes.annotate(text, (x, y), xycoords=("axes fraction", "data"), ha=side, va="center", fontsize=8)
        else:
            seeds = [run["test"] for run in results["runs"] if run["method"] == row["method"] and run["test"]]
            axes.plot(seeds, [y] * len(seeds), "o", color=colour, markersize=4, alpha=0.45)
            axes.plot(mean, y, "d", color=colour, markersize=8)
            text = _perplexity(mean)
            axes.annotate(text, (mean, y), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8)
        what = f", {_short_count(row['trainable'])}" if row["trainable"] else ""
        where = f" on {row['base']}" if several and row["tokens"] else ""
        label = f"{row['method']}{what}{where}"
        labels.append(label if len(label) <= 60 else f"{label[:57]}...")
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.4, -0.7)
    axes.margins(x=0.08)
    axes.grid(axis="y", visible=False)
    axes.figure.set_size_inches(_SIZE[0], 1.2 + 0.36 * len(rows))  # type: ignore[union-attr]
    axes.set(
        title=f"{results['name']}: methods, with trainable parameters",
        xlabel="test perplexity (lower is better)\nsmall: each seed, large: mean, grey: nothing trained",
    )
    return True


def _perplexity(value: float) -> str:
    """Write a perplexity with two decimals, a large one with four digits."""
    return f"{value:.2f}" if value < 100 else f"{value:,.4g}"


def _short_count(count: float) -> str:
    """Write a number of values with three digits, such as 5.34 M."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= 0.9995 * size:  # not "1e+03 k"
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"


def _quality(results: Results, name: str, axes: "Axes") -> bool:
    """Draw test perplexity against a cost; False if there is nothing to draw."""
    trained = [
        row for row in results["rows"] if row["test"] and row["tokens"] and not math.isnan(_x_position(row, name))
    ]
    if not trained:
        return False
    looks = _looks(results)
    handles: list[Any] = []
    for row in trained:
        assert row["test"] is not None
        x, mean, deviation = _x_position(row, name), row["test"]["mean"], row["test"]["deviation"]
        look = {"linestyle": "none", "markersize": 8, "capsize": 4, "label": row["method"], **looks[row["method"]]}
        handles.append(axes.errorbar(x, mean, yerr=deviation, **look))
    axes.margins(x=0.1, y=0.15)
    if name == "trainable":
        axes.set_xscale("log")
    else:
        axes.set_xlim(0, 1.1 * max(_x_position(row, name) for row in trained))
    means = [row["test"]["mean"] for row in trained if row["test"]]
    range_ = max(means) - min(means) or abs(means[0]) or 1.0
    bases = [row for row in results["rows"] if row["test"] and row["tokens"] == 0]
    for row, dash in zip(bases, itertools.cycle(("--", ":", "-."))):
        value = row["test"]["mean"] if row["test"] else math.nan
        if min(means) - _FAR * range_ <= value <= max(means) + _FAR * range_:
            label = f"{row['method']} (nothing trained)"
            handles.append(axes.axhline(value, color=GREY, linestyle=dash, linewidth=1.5, label=label))
        else:  # a line there would squeeze all methods together
            handles += axes.plot([], [], " ", label=f"{row['method']}: {value:,.4g} (outside)")
    axes.set(
        title=f"{results['name']}: quality and cost",
        xlabel=_AXES[name],
        ylabel="test perplexity (lower is better)",
    )
    axes.figure.legend(handles=handles, loc="outside right upper")
    return True


def _curves(results: Results, folder: Path, axes: "Axes") -> bool:
    """Draw mean training losses over seeds, with bands; False if there is nothing to draw."""
    looks, drawn = _looks(results), False
    for row in results["rows"]:
        curves = list(_losses(results, row["method"], folder))
        if not curves:
            continue
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        losses = [smooth([curve[step][1] for step in steps]) for curve in curves]
        tokens = [curves[0][step][0] for step in steps]
        means = [statistics.fmean(values) for values in zip(*losses, strict=True)]
        colour = looks[row["method"]]["color"]
        axes.plot(
            tokens,
            means,
            color=colour,
            linewidth=1.8,
            label=row["method"],
            linestyle=_dash(list(looks).index(row["method"])),
        )
        if len(losses) > 1:
            band = [statistics.stdev(values) for values in zip(*losses, strict=True)]
            low = [mean - wide for mean, wide in zip(means, band, strict=True)]
            high = [mean + wide for mean, wide in zip(means, band, strict=True)]
            axes.fill_between(tokens, low, high, color=colour, alpha=0.15, linewidth=0)
        drawn = True
    axes.set(
        title=f"{results['name']}: learning curves",
        xlabel="tokens",
        ylabel="training loss, nats per token (running mean)",
    )
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlim(left=0)
    if drawn:
        axes.figure.legend(loc="outside right upper", title="mean ± deviation over seeds")
    return drawn


def _dash(index: int) -> str:
    return "-" if index < len(_COLOURS) else "--"


def _losses(results: Results, method: str, folder: Path) -> Iterator[dict[int, tuple[int, float]]]:
    """Read the tokens and the loss of each step, for every run of a method."""
    for run in results["runs"]:
        path = folder / run["folder"] / RUN / METRICS
        if run["method"] != method or run["status"] != "finished" or run["seed"] is None or not path.is_file():
            continue
        try:
            lines = [line for line in read_lines(path, _Line) if math.isfinite(line["loss"])]
        except ValueError as error:
            log.warning("left out of the learning curves: %s", error)
            continue
        if lines:
            yield {line["step"]: (line["tokens"], line["loss"]) for line in lines}
