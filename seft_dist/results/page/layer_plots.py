"""Drawings by layer: zeros, where masks moved, and the sizes of the deltas."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from markupsafe import Markup

from seft_dist.results.figures import load_pyplot
from seft_dist.results.page.layers import QUANTILES, Layers, TargetLocation
from seft_dist.results.page.plots import finish, keys_of, line_style, logarithmic, over_layers
from seft_dist.results.page.record import RunRecord
from seft_dist.results.page.svg import INK, MUTED, SERIES, Figure, Key, Table, draw_svg, printable
from seft_dist.results.page.words import decimal, percent, plural, spread_out

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_MAPS = 4
"""Runs whose heat maps are drawn."""
_MOST_ROWS = 40
_MOST_NAMED = 10  # layers with a number at the axis


def sparsity_figure(runs: Sequence[RunRecord], draws: bool) -> Figure | None:
    """Draw the share of zeros in each layer; None if no run tells."""
    tables = [(i, run, _zeros_by_layer(run.layers)) for i, run in enumerate(runs)]
    tables = [(i, run, table) for i, run, table in tables if table]
    if not tables:
        return None

    def draw(axes: "Axes") -> None:
        for i, _, table in tables:
            layers, style = list(table), line_style(i)
            mean, low, high = ([100 * row[k] for row in table.values()] for k in range(3))
            axes.fill_between(layers, low, high, color=style["color"], alpha=0.18, linewidth=0, gid=f"run-{i}-0")
            axes.plot(layers, mean, marker="o", markersize=2.5, gid=f"run-{i}-1", **style)
        over_layers(axes, "zeros, %")
        bottom, top = axes.get_ylim()
        middle = (bottom + top) / 2
        axes.set_ylim(max(0.0, min(bottom, middle - 2)), min(100.0, max(top, middle + 2)))

    alt = " ".join(
        f"{printable(run.label)}: {percent(min(row[0] for row in table.values()))} to "
        f"{percent(max(row[0] for row in table.values()))} zeros in a layer."
        for _, run, table in tables
    )
    head = ["layer", *(run.label if len(runs) > 1 else "zeros" for _, run, _ in tables)]
    chosen = spread_out(sorted({layer for *_, table in tables for layer in table}), _MOST_ROWS)
    rows = [[str(n), *(percent(t[n][0], 3) if n in t else "-" for *_, t in tables)] for n in chosen]
    title = "Zeros in each layer"
    svg = draw_svg("zeros", title, alt, draw) if draws else Markup()
    alone = [Key("mean of the layer's targets"), Key("smallest to largest", SERIES[0], "band")]
    legend = keys_of(runs) or alone
    return Figure("zeros", title, alt, Table(head, rows), legend=legend, svg=svg)


def _zeros_by_layer(layers: Layers) -> dict[int, tuple[float, float, float]]:
    """Compute the share of zeros of each layer, and the smallest and largest of one of its targets."""
    shares: dict[int, list[tuple[int, int]]] = {}
    for location, names in layers.by_location.items():
        if location.layer is not None:
            counts = [(layers.zeros[name], layers.numel[name]) for name in names if name in layers.zeros]
            shares.setdefault(location.layer, []).extend(counts)
    found = {}
    for layer, counts in sorted(shares.items()):
        if counts and all(numel for _, numel in counts):
            single = [zeros / numel for zeros, numel in counts]
            found[layer] = (sum(z for z, _ in counts) / sum(n for _, n in counts), min(single), max(single))
    return found


_TITLES = {
    "dropped": "Deltas that were dropped for others",
    "reactivated": "Pruned positions that were reactivated",
    "pruned": "Active weights that were pruned",
}


def heat_maps(runs: Sequence[RunRecord], draws: bool) -> Iterator[Figure]:
    """Yield for each run where deltas moved, pruned positions were reactivated, and active ones were pruned.

    Maps of one kind have one scale of colours. A kind of which nothing moved in any run has none, and neither have
    deltas if all targets dropped the same share, as they do unless the scope is global.
    """
    shown = [(i, run) for i, run in enumerate(runs) if run.layers.moves and run.layers.active][:MOST_MAPS]
    maps = {kind: [_counts(run.layers, kind) for _, run in shown] for kind in _TITLES}
    for k, (i, run) in enumerate(shown):
        named = f", {run.label}" if len(runs) > 1 else ""
        for kind, title in _TITLES.items():
            largest = _largest(maps[kind])
            if largest and not (kind == "dropped" and _is_flat(maps[kind][k])):
                yield _heat_map(f"{kind}-{i}", f"{title}{named}", maps[kind][k], largest, draws)


_Counts = dict[TargetLocation, tuple[int, int]]
"""Positions that moved, and those that could have moved, at each location."""


def _counts(layers: Layers, kind: str) -> _Counts:
    """Count what moved in a run and what could have moved, at each location.

    Args:
        layers: The run's counts.
        kind: A key of ``_TITLES``.
    """
    moves, counts = layers.moves[-1], {}
    for location, names in layers.by_location.items():
        known = [name for name in names if name in layers.active and name in moves]
        active = sum(layers.active[name] for name in known)
        if kind == "dropped":
            of = sum(layers.trained.get(name, 0) for name in known)
        else:
            of = active if kind == "pruned" else sum(layers.numel[name] for name in known) - active
        counts[location] = (sum(getattr(moves[name], kind) for name in known), of)
    return counts


def _is_flat(counts: _Counts) -> bool:
    shares = [moved / of for moved, of in counts.values() if of]
    return not shares or max(shares) - min(shares) < 0.02 * max(shares)


def _largest(maps: Sequence[_Counts]) -> float:
    return max((moved / of for counts in maps for moved, of in counts.values() if of), default=0.0)


def _heat_map(name: str, title: str, locations: _Counts, largest: float, draws: bool) -> Figure:
    """Draw a share for each layer and module as colours.

    Args:
        name: Id of the figure.
        title: Its title.
        locations: The numbers.
        largest: Share at the upper end of the scale.
        draws: False: the table only.
    """
    shares = {location: moved / of for location, (moved, of) in locations.items() if of}
    modules = list(dict.fromkeys(location.module for location in locations))
    tips = [
        f"{_where(location)}, {printable(location.module, 60)}: "
        f"{percent(share, 3)} ({locations[location][0]:,} of {locations[location][1]:,})"
        for location, share in shares.items()
    ]
    most = max(shares, key=shares.__getitem__, default=None)
    alt = f"{title}: layers from left to right, modules from top to bottom. "
    if most is not None and shares[most] > 0:
        alt += f"Most in {_where(most)}, {printable(most.module, 60)}: {percent(shares[most], 3)}."
    else:
        alt += "Nothing moved."
    table = _module_table(locations, modules)
    height = 1.15 + 0.2 * len(modules)
    draw = partial(_draw_map, shares=shares, modules=modules, largest=largest)
    svg = draw_svg(name, title, alt, draw, height=height, tips=tips) if draws else Markup()
    return Figure(name, title, alt, table, svg=svg)


def _where(location: TargetLocation) -> str:
    return "outside the layers" if location.layer is None else f"layer {location.layer}"


def _draw_map(axes: "Axes", shares: dict[TargetLocation, float], modules: list[str], largest: float) -> None:
    """Draw one coloured cell for each layer and module, with a scale above."""
    plt = load_pyplot("figures")
    rows = sorted({-1 if location.layer is None else location.layer for location in shares})
    short = _short_names(modules)
    colours, scale = plt.get_cmap("cividis").resampled(24), plt.Normalize(0, 100 * largest or 1)
    for k, (location, share) in enumerate(shares.items()):
        x, y = rows.index(-1 if location.layer is None else location.layer), modules.index(location.module)
        cell = plt.Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colours(scale(100 * share)), linewidth=0)
        cell.set_gid(f"tip-{k}")
        axes.add_patch(cell)
    axes.set_xlim(-0.5, len(rows) - 0.5)
    axes.set_ylim(len(modules) - 0.5, -0.5)
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, len(rows)) if len(rows) <= n * _MOST_NAMED)
    named = [k for k, row in enumerate(rows) if row < 0 or row % every == 0]
    axes.set_xticks(named, ["-" if rows[k] < 0 else str(rows[k]) for k in named])
    axes.set_yticks(range(len(modules)), [short[module] for module in modules])
    axes.set(xlabel="layer")
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = axes.figure.colorbar(plt.cm.ScalarMappable(scale, colours), ax=axes, location="top", aspect=40, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("% of them", size=8)
    bar.ax.tick_params(length=0, labelsize=8)


def _module_table(locations: dict[TargetLocation, tuple[int, int]], modules: list[str]) -> Table:
    rows = []
    for module in modules:
        parts = {location: counts for location, counts in locations.items() if location.module == module and counts[1]}
        if not parts:
            continue
        moved, of = sum(a for a, _ in parts.values()), sum(b for _, b in parts.values())
        most = max(parts, key=lambda location: parts[location][0] / parts[location][1])
        share = parts[most][0] / parts[most][1]
        where = "-" if most.layer is None else str(most.layer)
        rows.append([module, f"{moved:,}", percent(moved / of, 3), f"{percent(share, 3)} (layer {where})"])
    moved, of = sum(a for a, _ in locations.values()), sum(b for _, b in locations.values())
    rows.append(["all", f"{moved:,}", percent(moved / of if of else 0.0, 3), ""])
    return Table(["module", "positions", "share", "most in a layer"], rows)


def _short_names(modules: Sequence[str]) -> dict[str, str]:
    """Shorten names to their last parts, where these tell them apart."""
    last = [module.rpartition(".")[2] for module in modules]
    names = modules if len(set(last)) < len(modules) else last
    return {module: printable(name, 28) for module, name in zip(modules, names, strict=True)}


def overlap_figure(runs: Sequence[RunRecord], draws: bool) -> Figure | None:
    """Draw which share of the pruned model's active positions is still active; None if no run has recorded it."""
    curves = [(i, run, _overlap(run.layers)) for i, run in enumerate(runs)]
    curves = [(i, run, curve) for i, run, curve in curves if curve]
    if not curves:
        return None

    def draw(axes: "Axes") -> None:
        for i, run, curve in curves:
            begin = [] if run.layers.since else [(0, 1.0, 1.0, 1.0)]
            points = [*begin, *curve, (run.step, *curve[-1][1:])]
            steps, style = [step for step, *_ in points], line_style(i)
            mean, low, high = ([100 * point[k] for point in points] for k in (1, 2, 3))
            band = {"color": style["color"], "alpha": 0.18, "linewidth": 0, "gid": f"run-{i}-0"}
            axes.fill_between(steps, low, high, step="post", **band)
            axes.plot(steps, mean, drawstyle="steps-post", gid=f"run-{i}-1", **style)
        finish(axes, runs, "still active, %")
        bottom, top = axes.get_ylim()
        axes.set_ylim(min(bottom, 98.0), min(top, 100.2))  # of a mask that stays: a line at the top

    alt = "Share of the pruned model's active weights that are still active. " + " ".join(
        f"{printable(run.label)}: {percent(curve[-1][1])} at step {curve[-1][0]}, in the target that moved most "
        f"{percent(curve[-1][2])}."
        for _, run, curve in curves
    )
    rows = [
        [run.label, str(step), percent(mean, 3), percent(low, 3), percent(high, 3)]
        for _, run, curve in curves
        for step, mean, low, high in spread_out(curve, max(2, _MOST_ROWS // len(curves)))
    ]
    table = Table(["run", "step", "all targets", "least in a target", "most in a target"], rows)
    title = "Overlap with the pruned model's mask"
    svg = draw_svg("overlap", title, alt, draw) if draws else Markup()
    legend = keys_of(runs) or [Key("all targets"), Key("least to most in a target", SERIES[0], "band")]
    return Figure("overlap", title, alt, table, legend=legend, svg=svg)


def _overlap(layers: Layers) -> list[tuple[int, float, float, float]]:
    """Compute, for each step that is known, the overlap of all targets, and the least and most of one."""
    found = []
    for step, moves in zip(layers.steps, layers.moves, strict=True):
        kept = [(move.kept, layers.active[name]) for name, move in moves.items() if layers.active.get(name)]
        known = [(count, active) for count, active in kept if count is not None]
        if known:
            shares = [count / active for count, active in known]
            total = sum(count for count, _ in known) / sum(active for _, active in known)
            found.append((step, total, min(shares), max(shares)))
    return found


def evolutions_figure(runs: Sequence[RunRecord], draws: bool) -> Figure | None:
    """Draw what each evolution after the first support moved; None if there were none."""
    if not any(run.later_evolutions for run in runs):
        return None
    alone = len(runs) == 1
    kinds = {"grown": "-", "reactivated": "--"}

    def draw(axes: "Axes") -> None:
        for i, run in enumerate(runs):
            moved = run.later_evolutions
            steps = [evolution["step"] for evolution in moved]
            for k, (kind, dashes) in enumerate(kinds.items()):
                style = line_style(i) | ({"color": SERIES[k]} if alone else {"linestyle": dashes})
                shares = [100 * _share(evolution, kind) for evolution in moved]
                axes.plot(steps, shares, marker="o", markersize=3, gid=f"run-{i}-{k}", **style)
        finish(axes, runs, "% of all deltas", starts_at_zero=True)

    alt = "Deltas that each evolution grew elsewhere. " + " ".join(
        f"{printable(run.label)}: {plural(len(run.later_evolutions), 'evolution')}, the last grew "
        f"{percent(_share(run.later_evolutions[-1], 'grown'))} of all deltas."
        for run in runs
        if run.later_evolutions
    )
    names = ("dropped", "grown", "reactivated", "pruned", "support")
    rows = [
        [run.label, str(e["step"]), *(f"{e[name]:,}" if isinstance(e.get(name), int) else "-" for name in names)]
        for run in runs
        for e in spread_out(run.evolutions, max(3, _MOST_ROWS // len(runs)))
    ]
    table = Table(["run", "step", "dropped", "grown", "reactivated", "pruned", "deltas after it"], rows)
    title = "Deltas moved in each evolution"
    if alone:
        legend = [Key("grown elsewhere", SERIES[0], "dots"), Key("of these on pruned positions", SERIES[1], "dots")]
    else:
        legend = [*keys_of(runs), Key("grown", INK, "line"), Key("of these on pruned positions", MUTED, "dashes")]
    svg = draw_svg("evolutions", title, alt, draw) if draws else Markup()
    note = "The choice of the first support is in the numbers, not in the drawing."
    return Figure("evolutions", title, alt, table, legend=legend, note=note, svg=svg)


def _share(evolution: dict[str, object], kind: str) -> float:
    moved, support = evolution.get(kind), evolution.get("support")
    known = isinstance(moved, int) and isinstance(support, int) and support > 0
    return moved / support if known else 0.0  # type: ignore[operator]


def deltas_figure(runs: Sequence[RunRecord], draws: bool) -> Figure | None:
    """Draw the sizes of the deltas in each layer; None if no run has a checkpoint with deltas."""
    known = [(i, run, run.deltas) for i, run in enumerate(runs) if run.deltas and run.deltas.by_layer]
    if not known:
        return None

    def draw(axes: "Axes") -> None:
        for i, _, deltas in known:
            layers, style = list(deltas.by_layer), line_style(i)
            columns = list(zip(*deltas.by_layer.values(), strict=True))
            if len(runs) == 1:
                axes.fill_between(layers, columns[0], columns[4], color=style["color"], alpha=0.15, linewidth=0)
            axes.fill_between(
                layers, columns[1], columns[3], color=style["color"], alpha=0.25, linewidth=0, gid=f"run-{i}-0"
            )
            axes.plot(layers, columns[2], marker="o", markersize=2.5, gid=f"run-{i}-1", **style)
        logarithmic(axes)
        over_layers(axes, "absolute value of a delta")

    alt = "Sizes of the deltas by layer. " + " ".join(
        f"{printable(run.label)}: medians from {decimal(min(row[2] for row in deltas.by_layer.values()))} to "
        f"{decimal(max(row[2] for row in deltas.by_layer.values()))}."
        for _, run, deltas in known
    )
    head = ["run", "module", *(f"{100 * q:.0f} %" for q in QUANTILES)]
    rows = [
        [run.label, module, *map(decimal, row)] for _, run, deltas in known for module, row in deltas.by_module.items()
    ]
    table = Table(head, rows[: 2 * _MOST_ROWS], "sizes below which so many of the deltas of a module are")
    alone = [Key("median"), Key("middle half", SERIES[0], "band"), Key("90 % of them", SERIES[0], "faint")]
    legend = keys_of(runs) or alone
    steps = sorted({deltas.step for *_, deltas in known})
    at = f"at step {steps[0]}" if len(steps) == 1 else f"at steps {steps[0]} to {steps[-1]}"
    note = f"Absolute values in the newest checkpoint, {at}; deltas that are still exactly 0 are left out."
    exported = {
        run.label: run.exported_step for _, run, deltas in known if run.exported_step not in (None, deltas.step)
    }
    note += "".join(
        f" The exported model of {printable(name)} is that of step {step}." for name, step in exported.items()
    )
    title = "Sizes of the deltas in each layer"
    svg = draw_svg("deltas", title, alt, draw) if draws else Markup()
    return Figure("deltas", title, alt, table, legend=legend, note=note, svg=svg)
