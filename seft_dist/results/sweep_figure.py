"""The figure of a sweep: perplexity or loss over a varied setting."""

import statistics
from pathlib import Path

from seft_dist.results.figures import load_pyplot, save_figure
from seft_dist.results.run_files import list_differences
from seft_dist.results.sweep import SEEDS, Sweep, SweepRun, measured_values, not_averageable


def draw(sweep: Sweep) -> Path:
    """Draw sweep.png, with one line for each combination of the settings that are not on the horizontal axis.

    The axis is the density if it varies, otherwise the setting with the most values. Perplexities are drawn if all runs
    have one and all were measured under the same conditions, otherwise losses. Runs that must not be averaged are drawn
    as separate points.

    Args:
        sweep: A sweep with at least one finished run.

    Returns:
        The path of the file.

    Raises:
        ValueError: matplotlib is not installed.
    """
    plt = load_pyplot("figure")

    others = [name for name in sweep.varied if name not in SEEDS]
    groups = sweep.groups()
    axis = max(
        range(len(others)), key=lambda i: (others[i] == "seft.density", len({key[i] for key in groups})), default=None
    )
    measure = _measure([run for group in groups.values() for run in group])
    lines: dict[str, list[tuple[str, list[float]]]] = {}
    for key, group in groups.items():
        label = ", ".join(f"{others[i]} {value}" for i, value in enumerate(key) if i != axis)
        x = "all" if axis is None else key[axis]
        parts = [[run] for run in group] if measure in not_averageable(group) else [group]
        lines.setdefault(label, []).extend((x, measured_values(part, measure)) for part in parts)
    figure, axes = plt.subplots(figsize=(7.0, 4.0), layout="constrained")
    for label, points in lines.items():
        means = [statistics.mean(values) for _, values in points]
        deviations = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in points]
        axes.errorbar([x for x, _ in points], means, yerr=deviations, marker="o", capsize=3, label=label or None)
    axes.set(title=f"Sweep {sweep.folder.name}", xlabel="" if axis is None else others[axis], ylabel=measure)
    axes.grid(axis="y", color="#E6E6E6")
    if any(lines):
        axes.legend(frameon=False)
    path = sweep.folder / "sweep.png"
    save_figure(figure, path)
    plt.close(figure)
    return path


def _measure(runs: list[SweepRun]) -> str:
    measured = all("perplexity" in run.measured for run in runs)
    return "perplexity" if measured and not list_differences({run.name: run.evaluated for run in runs}) else "loss"
