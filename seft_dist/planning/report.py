"""Output of a plan: tables for the terminal, and JSON for programs."""

import dataclasses
import json
from typing import Any

from rich import box
from rich.console import Group as Renderables
from rich.table import Table
from rich.text import Text

from seft_dist.planning.commands import submit_line, train_options
from seft_dist.planning.plan import ClusterPlan, Estimate
from seft_dist.planning.traffic import Traffic

_GB = 1e9
_SHOWN = 14
"""Largest number of rows in the table of layouts."""


def render(plan: ClusterPlan) -> Renderables:
    """Render all tables of a plan."""
    config, shapes = plan.config, plan.shapes
    kind = "measured here" if plan.rates.measured else f"data sheet x MFU {config.cluster.mfu:g}; never run on a GPU"
    head = (
        f"[bold]{config.model}[/bold]: {shapes.numel / 1e9:.2f} billion parameters, {shapes.target_numel / 1e9:.2f} of "
        f"them in targets, {shapes.budget(config.seft.density) / 1e6:,.1f} million deltas; {config.dtype}, "
        f"{config.sparsity:.0%} pruned; {plan.rates.name} ({kind})"
    )
    parts: list[Any] = [Text.from_markup(head), layout_table(plan)]
    if plan.best is None:
        parts.append(Text("Nothing fits: " + "; ".join(plan.advice) + ".", style="bold red"))
        return Renderables(*parts, memory_table(plan, plan.estimates[0]))
    best = plan.best
    parts += [memory_table(plan, best), traffic_table(best), time_table(best), peer_table(plan)]
    return Renderables(*parts)


def layout_table(plan: ClusterPlan) -> Table:
    """Tabulate the layouts: memory, time, and whether they fit."""
    table = Table(title="Layouts, the recommended one first", box=box.SIMPLE, padding=(0, 0, 0, 1))
    for column in ("layout", "ranks", "GB/rank", "s/step", "tokens/s", "hours", "rank-h", "fits"):
        table.add_column(column, justify="left" if column in ("layout", "fits") else "right", no_wrap=True)
    for estimate in plan.estimates[:_SHOWN]:
        layout, time = estimate.layout, estimate.time
        table.add_row(
            layout.name,
            str(layout.world_size),
            f"{estimate.memory.total / _GB:.1f}",
            f"{time.seconds:.3g}",
            f"{time.tokens_per_second:,.0f}",
            f"{time.hours:.3g}",
            f"{estimate.device_hours:,.4g}",
            "yes" if estimate.fits else "no",
        )
    if len(plan.estimates) > _SHOWN:
        table.caption = f"{len(plan.estimates) - _SHOWN} more in --output"
    return table


def memory_table(plan: ClusterPlan, estimate: Estimate) -> Table:
    """Tabulate every term of the fullest rank's memory."""
    layout, memory = estimate.layout, estimate.memory
    table = Table(title=f"Memory of the fullest rank: {layout.name} on {layout.world_size}, phase '{memory.worst}'")
    table.add_column("what")
    table.add_column("GB", justify="right")
    for name, size in memory.terms().items():
        table.add_row(name, f"{size / _GB:.3f}")
    table.add_section()
    table.add_row(f"all, of {estimate.rates.memory / _GB:.0f}", f"{memory.total / _GB:.3f}")
    for name, size in memory.host.items():
        table.add_row(f"in the node's memory, for each rank: {name}", f"{size / _GB:.3f}")
    phases = {name: sum(terms.values()) + sum(memory.resident.values()) for name, terms in memory.phases.items()}
    by_phase = ", ".join(f"{name} {size / _GB:.1f}" for name, size in phases.items())
    table.caption = (
        f"Tensors by phase: {by_phase}. Target weights of the fullest rank: {layout.skew(plan.shapes):.3f} x the mean; "
        f"ranks without any: {layout.empty_ranks(plan.shapes)} of {layout.owners}"
    )
    return table


def traffic_table(estimate: Estimate) -> Table:
    """Tabulate the bytes that a rank sends."""
    table = Table(title="Sent by a rank; more in a step of a window, more in an evolution")
    for column in ("when", "what", "MB in the node", "MB to others", "s"):
        table.add_column(column, justify="left" if column in ("when", "what") else "right")
    time = estimate.time
    parts = (("step", time.sent_step), ("window", time.sent_window), ("evolution", time.sent_evolution))
    for when, traffic in parts:
        for sent in traffic:
            table.add_row(
                when, sent.what, f"{sent.intra / 1e6:,.1f}", f"{sent.inter / 1e6:,.1f}", f"{sent.seconds:.3g}"
            )
        table.add_section()
    return table


def time_table(estimate: Estimate) -> Table:
    """Tabulate the parts of a step's time, and the time of the run."""
    time = estimate.time
    table = Table(title="Seconds")
    table.add_column("what")
    table.add_column("s", justify="right")
    for name, seconds in time.step.items():
        table.add_row(name, f"{seconds:.3g}")
    table.add_section()
    table.add_row("a step", f"{time.seconds:.3g}")
    table.add_row(f"more in a step of a window ({time.windows} of {time.steps})", f"{time.window:.3g}")
    table.add_row(f"more in an evolution ({time.evolutions})", f"{time.evolution:.3g}")
    table.add_section()
    table.add_row(f"the run: {time.steps} steps of {time.tokens:,} tokens, hours", f"{time.hours:.3g}")
    return table


def peer_table(plan: ClusterPlan) -> Table:
    """Tabulate SEFT and the other methods, each on its own recommended layout."""
    table = Table(
        title="Methods, each on its own recommended layout", caption="merged LoRA and full fine-tuning lose the zeros"
    )
    for column in ("method", "layout", "ranks", "GB/rank", "s/step", "tokens/s", "hours", "rank-h"):
        left = column in ("method", "layout")
        table.add_column(column, justify="left" if left else "right", no_wrap=column != "method")
    labels = {
        "SEFT": "SEFT",
        "LoRA": f"LoRA r={plan.config.lora_rank}",
        "full": "full, AdamW",
    }
    for name, estimate in plan.peers.items():
        if estimate is None:
            table.add_row(labels[name], "fits nowhere", *[""] * 6)
            continue
        time = estimate.time
        table.add_row(
            labels[name],
            estimate.layout.name,
            str(estimate.layout.world_size),
            f"{estimate.memory.total / _GB:.1f}",
            f"{time.seconds:.3g}",
            f"{time.tokens_per_second:,.0f}",
            f"{time.hours:.3g}",
            f"{estimate.device_hours:,.4g}",
        )
    return table


def to_json(plan: ClusterPlan) -> str:
    """Convert a plan to JSON, with every term in bytes and seconds."""
    content = {
        "config": dataclasses.asdict(plan.config),
        "model": {
            "parameters": plan.shapes.numel,
            "targets": plan.shapes.target_numel,
            "deltas": plan.shapes.budget(plan.config.seft.density),
        },
        "rates": dataclasses.asdict(plan.rates),
        "recommended": None if plan.best is None else _estimate(plan, plan.best),
        "advice": plan.advice,
        "layouts": [_estimate(plan, estimate) for estimate in plan.estimates],
        "methods": {name: estimate and _estimate(plan, estimate) for name, estimate in plan.peers.items()},
    }
    return json.dumps(content, indent=2) + "\n"


def _estimate(plan: ClusterPlan, estimate: Estimate) -> dict[str, Any]:
    """Convert an estimate to plain dicts, for JSON."""
    layout, memory, time = estimate.layout, estimate.memory, estimate.time

    def sent(rows: list[Traffic]) -> list[dict[str, Any]]:
        return [dataclasses.asdict(row) for row in rows]

    return {
        "layout": dataclasses.asdict(layout),
        "fits": estimate.fits,
        "memory": {
            "total": memory.total,
            "worst_phase": memory.worst,
            "resident": memory.resident,
            "phases": memory.phases,
            "host": memory.host,
        },
        "skew": layout.skew(plan.shapes),
        "empty_ranks": layout.empty_ranks(plan.shapes),
        "seconds": {"step": time.step, "window": time.window, "evolution": time.evolution},
        "tokens_per_second": time.tokens_per_second,
        "hours": time.hours,
        "device_hours": estimate.device_hours,
        "sent": {
            "step": sent(time.sent_step),
            "window": sent(time.sent_window),
            "evolution": sent(time.sent_evolution),
        },
        "train_options": train_options(plan.config, layout),
        "command": submit_line(plan.config, layout),
    }
