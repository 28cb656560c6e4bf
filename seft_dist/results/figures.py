"""Figures of a run: loss, evolutions and perplexity. matplotlib (the extra ``plots``) is imported only here."""

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seft_dist.files.writing import write_bytes
from seft_dist.results.report import FinishedRun
from seft_dist.session.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can distinguish too
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#9A9A9A"
_SIZE = (7.0, 4.0)
STYLE: dict[str, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
    "font.size": 10,
}


def load_pyplot(option: str) -> Any:
    """Import matplotlib.pyplot with a backend that draws into files only.

    Args:
        option: Option of the command line that switches figures off, for the error message.

    Raises:
        ValueError: matplotlib is not installed.
    """
    require("matplotlib", f"--{option}", f", or --{option} false")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as a whole file, in the format that the path ends with."""
    image = io.BytesIO()
    figure.savefig(image, dpi=150, format=path.suffix[1:])
    write_bytes(path, image.getvalue())


def write_run_figures(run: FinishedRun, folder: Path) -> list[Path]:
    """Draw loss, evolutions (if there were any) and perplexity, each as .png and .svg.

    Args:
        run: The run.
        folder: Folder for the files; it is created if needed.

    Returns:
        The paths of the files.

    Raises:
        ValueError: matplotlib is not installed.
    """
    plt = load_pyplot("figures")

    folder.mkdir(parents=True, exist_ok=True)
    drawings = {"loss": _loss, "evolutions": _evolutions, "perplexity": _perplexity}
    if not run.evolutions:
        del drawings["evolutions"]
    paths = []
    with plt.rc_context(STYLE):
        for name, draw in drawings.items():
            figure, axes = plt.subplots(figsize=_SIZE, layout="constrained")
            draw(run, axes)
            for form in ("png", "svg"):
                paths.append(folder / f"{name}.{form}")
                save_figure(figure, paths[-1])
            plt.close(figure)
    return paths


def _loss(run: FinishedRun, axes: "Axes") -> None:
    steps = [line["step"] for line in run.steps]
    losses = [line["loss"] for line in run.steps]
    axes.plot(steps, losses, color=BLUE, alpha=0.35, linewidth=1, label="as recorded")
    axes.plot(steps, smooth(losses), color=BLUE, linewidth=2, label="running mean")
    for i, line in enumerate(run.evolutions):
        axes.axvline(line["step"], color=GREY, linestyle=":", linewidth=1, label="evolution" if i == 0 else None)
    if run.evaluations:
        points = [(line["step"], line["loss"]) for line in run.evaluations]
        best = min(run.evaluations, key=lambda line: line["loss"])
        axes.plot(*zip(*points, strict=True), color=ORANGE, marker="o", markersize=4, label="validation")
        axes.plot(
            best["step"],
            best["loss"],
            color=ORANGE,
            marker="*",
            markersize=13,
            linestyle="",
            label="best",
            clip_on=False,
        )
    title = "Training and validation loss" if run.evaluations else "Training loss"
    axes.set(title=title, xlabel="optimizer step", ylabel="cross-entropy, nats per token")
    axes.set_xlim(left=0, right=run.result["steps"])
    axes.grid(False, axis="x")
    axes.legend()


def smooth(values: list[float], decay: float = 0.8) -> list[float]:
    """Exponential moving average, with the bias correction for its first values that Adam uses."""
    smoothed, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + 1 - decay
        smoothed.append(mean / weight)
    return smoothed


def _evolutions(run: FinishedRun, axes: "Axes") -> None:
    # The first support is grown from nothing, so its bar would make those of the later evolutions invisible
    shown = [line for line in run.evolutions if not line.get("first")] or run.evolutions
    groups = {"dropped": GREY, "grown": BLUE, "reactivated": ORANGE}
    width = 0.8 / len(groups)
    for i, (name, colour) in enumerate(groups.items()):
        positions = [index + (i - 1) * width for index in range(len(shown))]
        label = "reactivated (grown at pruned positions)" if name == "reactivated" else name
        axes.bar(positions, [line[name] for line in shown], width, color=colour, label=label)
    axes.set_xticks(range(len(shown)), [str(line["step"]) for line in shown])
    title = "Entries moved in each evolution"
    if len(shown) < len(run.evolutions):
        first = run.evolutions[0]
        title += f"\n(first support, not shown: {first['grown']:,} grown, {first['reactivated']:,} reactivated)"
    axes.set(title=title, xlabel="optimizer step", ylabel="entries")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(False, axis="x")
    axes.set_ylim(top=1.2 * max(line[name] for line in shown for name in groups) or 1)
    axes.legend(ncols=len(groups), loc="upper left")


def _perplexity(run: FinishedRun, axes: "Axes") -> None:
    heights = [value if math.isfinite(value) else 0.0 for value in run.perplexity.values()]
    bars = axes.bar(list(run.perplexity), heights, 0.6, color=[GREEN, GREY, BLUE])
    axes.bar_label(bars, [f"{value:.1f}" for value in run.perplexity.values()], padding=3, fontsize=12)
    axes.set(title=f"Perplexity on held-out text, {run.name}", ylabel="perplexity (lower is better)")
    axes.set_ylim(top=1.12 * max(heights) or 1)
    axes.grid(False)
