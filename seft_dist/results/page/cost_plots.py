"""Drawings of what runs cost: tokens a second, seconds of each part of an evolution, and tables of memory and bytes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from seft_dist.results.page.plots import finish, keys_of, line_style
from seft_dist.results.page.record import RunRecord, number, whole
from seft_dist.results.page.svg import HEIGHT, SERIES, WIDTH, Figure, Key, Table, draw_svg, printable, thin_out
from seft_dist.results.page.words import decimal, duration, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BYTES_OF_A_GRADIENT = 4


def speed_figure(runs: Sequence[RunRecord], draws: bool) -> Figure | None:
    """Draw the tokens a second of each recorded step; None if no run has recorded them."""
    if not any(run.series("tokens_per_second")[0] for run in runs):
        return None

    def draw(axes: "Axes") -> None:
        for i, run in enumerate(runs):
            axes.plot(*thin_out(*run.series("tokens_per_second")), gid=f"run-{i}-0", **line_style(i))
        finish(axes, runs, "tokens a second", starts_at_zero=True)

    rows, sentences = [], []
    for run in runs:
        _, speeds = run.series("tokens_per_second")
        if speeds:
            middle = sorted(speeds)[len(speeds) // 2]
            rows.append([run.label, *map(decimal, (min(speeds), middle, max(speeds)))])
            sentences.append(f"{printable(run.label)}: {decimal(middle)} in the median.")
    title, alt = "Tokens a second", " ".join(["Tokens a second.", *sentences])
    svg = draw_svg("speed", title, alt, draw) if draws else Markup()
    table = Table(["run", "slowest", "median", "fastest"], rows)
    return Figure("speed", title, alt, table, legend=keys_of(runs), note="All ranks together.", svg=svg)


def phases_figure(runs: Sequence[RunRecord], draws: bool) -> Figure | None:
    """Draw the mean seconds of each part of an evolution; None if no run had one."""
    means = [(run, _mean_phases(run)) for run in runs]
    means = [(run, phases) for run, phases in means if phases]
    if not means:
        return None
    names = list(dict.fromkeys(name for _, phases in means for name in phases))
    labels = [printable(run.label, 30) for run, _ in means]

    def draw(axes: "Axes") -> None:
        for row, (_, phases) in enumerate(means):
            begin = 0.0
            for k, name in enumerate(names):
                seconds = phases.get(name, (0.0, 0.0))[0]
                axes.barh(row, seconds, 0.6, left=begin, color=SERIES[k % len(SERIES)])
                begin += seconds
        axes.set_yticks(range(len(means)), labels if len(runs) > 1 else [""])
        axes.invert_yaxis()
        axes.set(xlabel="seconds")
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)

    rows = [
        [run.label, name, decimal(seconds), size(sent)]
        for run, phases in means
        for name, (seconds, sent) in phases.items()
    ]
    totals = [(run, sum(seconds for seconds, _ in phases.values())) for run, phases in means]
    alt = "Mean seconds of an evolution. " + " ".join(f"{printable(run.label)}: {decimal(s)}." for run, s in totals)
    title = "Parts of an evolution, mean"
    height = max(0.75 + 0.35 * len(means), HEIGHT / 2.4)
    svg = draw_svg("phases", title, alt, draw, width=WIDTH, height=height) if draws else Markup()
    legend = [Key(name, SERIES[k % len(SERIES)], "block") for k, name in enumerate(names)]
    note = "The window is that of all its steps. Bytes are those that one rank sent."
    table = Table(["run", "part", "seconds", "sent by a rank"], rows)
    return Figure("phases", title, alt, table, legend=legend, note=note, svg=svg)


def _mean_phases(run: RunRecord) -> dict[str, tuple[float, float]]:
    """Compute mean seconds and bytes of each part of the evolutions."""
    means: dict[str, tuple[float, float]] = {}
    evolutions = run.later_evolutions or run.evolutions
    for evolution in evolutions:
        phases = evolution.get("phases")
        for name, cost in phases.items() if isinstance(phases, dict) else ():
            if isinstance(cost, dict):
                seconds, sent = means.get(str(name), (0.0, 0.0))
                seconds += (number(cost, "seconds") or 0.0) / len(evolutions)
                means[str(name)] = (seconds, sent + (number(cost, "bytes_sent") or 0.0) / len(evolutions))
    return means


def cost_table(runs: Sequence[RunRecord]) -> Table:
    """Tabulate time, memory and bytes of runs, one column for each."""
    entries: list[dict[str, str]] = [_costs(run) for run in runs]
    names = list(dict.fromkeys(name for costs in entries for name in costs))
    rows = [[name, *(costs.get(name, "-") for costs in entries)] for name in names]
    return Table(["", *(run.label for run in runs)], rows)


def _costs(run: RunRecord) -> dict[str, str]:
    """Collect what a run took, as text by its name; what is not known is left out."""
    last: dict[str, Any] = run.lines[-1] if run.lines else {}
    seconds = number(run.result, "seconds") or number(last, "seconds")
    tokens = whole(run.result, "tokens") or whole(last, "tokens")
    costs = {"time": duration(seconds)}
    if tokens:
        costs["tokens"] = f"{tokens:,}"
        if seconds:
            costs["tokens a second, mean"] = decimal(tokens / seconds)
    if run.evolutions:
        spent = sum(cost for e in run.evolutions for cost in (number(e, "seconds"),) if cost)
        costs["time in evolutions"] = duration(spent)
        costs["sent by a rank in evolutions"] = size(sum(number(e, "bytes_sent") or 0 for e in run.evolutions))
    costs["peak memory of the fullest rank"] = size(whole(run.result, "peak_memory_bytes"))
    trainable = whole(run.result, "trainable") or (whole(run.evolutions[-1], "support") if run.evolutions else None)
    if trainable:
        costs["trainable parameters"] = f"{trainable:,}"
        if run.world_size > 1 and run.is_seft:
            costs["gradients sent in a step, before they are added up"] = size(_BYTES_OF_A_GRADIENT * trainable)
    return costs | {f"on disk: {name}": size(count) for name, count in run.sizes.items()}
