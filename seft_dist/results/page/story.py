"""A run described in a paragraph, and its most important numbers."""

import math
from dataclasses import dataclass
from typing import Any

from seft_dist.config import paths_of
from seft_dist.results.page.record import VALIDATION, RunRecord, number, whole
from seft_dist.results.page.words import decimal, duration, join, model_name, percent, plural


@dataclass(frozen=True)
class Tile:
    """A number that is shown large."""

    label: str
    value: str
    note: str = ""


def state_of(run: RunRecord) -> str:
    """Describe whether a run is finished, and how far it is."""
    of = f" of {run.steps:,}" if run.steps else ""
    if run.is_finished and run.steps and run.step < run.steps:
        return f"finished early, after {run.step:,}{of} steps"
    if run.is_finished:
        return f"finished after {plural(run.step, 'step')}"
    if not run.lines:
        return "not finished: no step is recorded yet"
    return f"not finished: {run.step:,}{of} steps are recorded"


def story_of(run: RunRecord) -> str:
    """Describe in a paragraph what a run did."""
    sentences = [_setting(run), *_moves(run), *_losses(run), *_qualities(run), *_zeros(run)]
    return " ".join(sentences)


def _setting(run: RunRecord) -> str:
    model = run.setting("model.path")
    text = f"{model_name(model) if model else 'A model'} was trained with {_method(run)}"
    data = run.setting("data")
    paths = paths_of(data if isinstance(data, dict) else {})
    text += f" on {join([model_name(path) for path in paths])}" if paths else ""
    length, batch = run.setting("data.seq_len"), run.setting("global_batch") or run.setting("batch_size")
    of = f" of {run.steps:,}" if run.steps and not run.is_finished else ""
    text += f": {run.step:,}{of} {'step' if run.step == 1 and not of else 'steps'}"
    text += f" of {batch} x {length} tokens" if batch and length else ""
    layout = run.layout
    if layout:
        ranks = "one process" if run.world_size == 1 else f"{run.world_size} ranks"
        how = [str(layout[key]) for key in ("backend", "device") if layout.get(key) not in (None, "single")]
        text += f", in {ranks} ({', '.join(how)})" if how else f", in {ranks}"
    seconds = number(run.result, "seconds") or (number(run.lines[-1], "seconds") if run.lines else None)
    return text + (f", in {duration(seconds)}." if seconds else ".")


def _method(run: RunRecord) -> str:
    trained = whole(run.result, "trainable") or (whole(run.evolutions[-1], "support") if run.evolutions else None)
    if not run.is_seft:
        return f"method {run.method}" + (f" ({trained:,} trainable parameters)" if trained else "")
    density = run.setting("seft.density")
    share = f"up to {100 * density:g} % of the weights" if isinstance(density, (int, float)) else "some of the weights"
    name = "SEFT" if run.method == "seft" else f"SEFT ({run.method})"
    return f"{name}, deltas on {share}" + (f" ({trained:,})" if trained else "")


def _moves(run: RunRecord) -> list[str]:
    later = run.later_evolutions
    if not later:
        return []
    grown, reactivated = (sum(whole(e, key) or 0 for e in later) for key in ("grown", "reactivated"))
    every = sum(whole(e, "reactivated") or 0 for e in run.evolutions)
    text = f"In {plural(len(later), 'evolution')} {plural(grown, 'delta')} moved"
    if run.setting("seft.swap_fraction"):
        return [text + f", and {plural(reactivated, 'pruned position')} came back with the parent's value."]
    text += f", {reactivated:,} of them to pruned positions" if every else "; the mask stayed as it was"
    if every > reactivated:
        text += f" (with the first support {every:,} pruned positions were reactivated)"
    return [text + "."]


def _losses(run: RunRecord) -> list[str]:
    steps, losses = run.series("loss")
    if len(losses) < 2:
        return []
    few = max(1, min(10, len(losses) // 4))
    begin, end = (sum(part) / few for part in (losses[:few], losses[-few:]))
    text = f"The training loss went from {decimal(begin)} to {decimal(end)} nats per token"
    text += f" (means of the first and last {few} records)" if few > 1 else ""
    steps, validation = run.series(VALIDATION)
    if validation:
        best = min(range(len(validation)), key=validation.__getitem__)
        text += f", the validation loss to {decimal(validation[-1])}"
        text += f" (best {decimal(validation[best])} at step {steps[best]})" if best < len(steps) - 1 else ""
    return [text + "."]


def perplexities(run: RunRecord) -> dict[str, float]:
    """Return the perplexities of eval.json by the names of the models."""
    models = run.evaluations["models"] if run.evaluations else {}
    return {name: float(entry["perplexity"]) for name, entry in models.items() if "perplexity" in entry}


def _qualities(run: RunRecord) -> list[str]:
    found = perplexities(run)
    if not found:
        return []
    texts = [f"{name} {decimal(value)}" for name, value in found.items()]
    return [f"Perplexity on the evaluation's text: {join(texts)}."]


def _zeros(run: RunRecord) -> list[str]:
    sparsity = run.result.get("sparsity")
    if not isinstance(sparsity, dict):
        return []
    final, off = number(sparsity, "final"), whole(sparsity, "layers_off_target")
    text = f"{percent(final)} of the target weights are 0 at the end"
    if off is not None:
        whose = "the model as a whole" if _moves_between_layers(run) else "every target"
        text += f", and {whose} has as many zeros as before" if not off else f"; {plural(off, 'target')} changed"
    return [text + "."]


def _moves_between_layers(run: RunRecord) -> bool:
    """Tell whether targets may end with other numbers of zeros than they had."""
    moved = any(whole(evolution, "reactivated") for evolution in run.evolutions)
    return moved and run.setting("seft.scope") == "global"


def tiles_of(run: RunRecord) -> list[Tile]:
    """Choose the numbers of a run that are shown large."""
    found, tiles = perplexities(run), []
    if "repaired" in found:
        rest = [f"{name} {decimal(value)}" for name, value in found.items() if name != "repaired"]
        tiles.append(Tile("perplexity, repaired", decimal(found["repaired"]), join(rest)))
    _, validation = run.series(VALIDATION)
    if validation:
        tiles.append(Tile("validation loss", decimal(validation[-1], 4), f"best {decimal(min(validation), 4)}"))
    _, losses = run.series("loss")
    if losses:
        tiles.append(Tile("training loss", decimal(losses[-1]), f"first {decimal(losses[0])}"))
    sparsity: Any = run.result.get("sparsity")
    if isinstance(sparsity, dict):
        off = whole(sparsity, "layers_off_target")
        whose = "the model" if _moves_between_layers(run) else "every target"
        note = f"{plural(off, 'target')} changed" if off else f"{whose} as before"
        tiles.append(Tile("zeros", percent(number(sparsity, "final")), note))
    if run.evolutions:
        kept = [move.kept for move in run.layers.moves[-1].values()] if run.layers.moves else []
        active = sum(run.layers.active.values())
        if kept and active and None not in kept:
            share = sum(count for count in kept if count is not None) / active
            tiles.append(
                Tile("of the mask is as before", percent(share), plural(len(run.later_evolutions), "evolution"))
            )
    seconds = number(run.result, "seconds") or (number(run.lines[-1], "seconds") if run.lines else None)
    if seconds and math.isfinite(seconds):
        tiles.append(Tile("time", duration(seconds), f"{run.step:,} steps"))
    return tiles
