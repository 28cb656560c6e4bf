"""Warnings for readers of a page, and what the page lacks."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from seft_dist.results.page.record import METRICS, VALIDATION, RunRecord, number, whole
from seft_dist.results.page.story import perplexities
from seft_dist.results.page.words import decimal, percent, plural
from seft_dist.results.run_files import list_differences, measurement_of

_OFTEN = 0.5  # share of steps that are clipped, or of attempts
_RISE = 1.02
"""Factor between the best and the last validation loss from which on the model got worse."""


@dataclass(frozen=True)
class Finding:
    """A warning, or a remark that only explains."""

    runs: str
    """Labels of the runs that it is about; empty: all."""
    text: str
    is_warning: bool = True


def findings_of(runs: Sequence[RunRecord]) -> list[Finding]:
    """Find what a reader should know, warnings first."""
    about: dict[tuple[str, bool], list[str]] = {}
    for run in runs:
        for text in [*run.problems, *_errors(run), *_losses(run), *_zeros(run), *_quality(run)]:
            about.setdefault((text, True), []).append(run.label)
        for text in _remarks(run):
            about.setdefault((text, False), []).append(run.label)
    found = [Finding("", text) for text in _not_comparable(runs)]
    for (text, is_warning), labels in about.items():
        found.append(Finding(", ".join(labels) if len(labels) < len(runs) else "", text, is_warning))
    return sorted(found, key=lambda finding: not finding.is_warning)


def _errors(run: RunRecord) -> list[str]:
    """Look for what stopped the run, and for files that were put aside."""
    texts = []
    reports = sorted((run.folder / "diagnosis").glob("step-*.json"))
    if reports and not run.is_finished:
        try:
            error = json.loads(reports[-1].read_text(encoding="utf-8"))["error"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            error = "an error that cannot be read"
        texts.append(f"An error stopped the run: {str(error)[:500]} (diagnosis/{reports[-1].name})")
    damaged = sorted(path.name for path in [*run.folder.glob("damaged-*"), *run.folder.glob("checkpoints/damaged-*")])
    if damaged:
        texts.append(f"Damaged files were put aside: {', '.join(damaged[:4])}{' ...' if len(damaged) > 4 else ''}")
    return texts


def _losses(run: RunRecord) -> list[str]:
    """Find losses that are not finite or rise, and gradients that are all 0."""
    texts = []
    bad = [line["step"] for line in run.lines if not math.isfinite(number(line, "loss") or 0.0)]
    if bad:
        texts.append(f"The loss is not finite at {plural(len(bad), 'recorded step')}, first at step {bad[0]}")
    steps, validation = run.series(VALIDATION)
    if validation:
        best = min(range(len(validation)), key=validation.__getitem__)
        if validation[-1] > _RISE * validation[best]:
            texts.append(
                f"The validation loss was best at step {steps[best]} ({decimal(validation[best])}) and is "
                f"{decimal(validation[-1])} at step {steps[-1]}: the model learns its training text by heart, or the "
                "learning rate is too high"
            )
    _, norms = run.series("grad_norm")
    if norms and not any(norms):
        texts.append("Every recorded gradient is 0: nothing was trained")
    _, losses = run.series("loss")
    if len(losses) >= 8:
        quarter = len(losses) // 4
        begin, end = sum(losses[:quarter]) / quarter, sum(losses[-quarter:]) / quarter
        if end > begin:
            texts.append(f"The training loss rose: {decimal(begin)} in the first quarter, {decimal(end)} in the last")
    return texts


def _zeros(run: RunRecord) -> list[str]:
    texts = []
    sparsity: Any = run.result.get("sparsity")
    off = whole(sparsity, "layers_off_target") if isinstance(sparsity, dict) else 0
    if off:
        named = f", such as {', '.join(run.layers.off_target[:3])}" if run.layers.off_target else ""
        have = "has" if off == 1 else "have"
        texts.append(f"{plural(off, 'target')} {have} another number of zeros than before{named}")
    if run.setting("seft.adapt") == "none" and run.later_evolutions:
        texts.append("seft.adapt is none: what was reactivated was not pruned elsewhere, so zeros were lost")
    if run.method == "seft" and not run.setting("seft.static") and run.is_finished and not run.later_evolutions:
        interval = run.setting("seft.interval")
        texts.append(f"There was no evolution: seft.interval is {interval}, the run has {plural(run.step, 'step')}")
    return texts


def _quality(run: RunRecord) -> list[str]:
    found, texts = perplexities(run), []
    if "pruned" in found and "repaired" in found and found["repaired"] > found["pruned"]:
        texts.append(
            f"The repaired model's perplexity ({decimal(found['repaired'])}) is higher than the pruned one's "
            f"({decimal(found['pruned'])})"
        )
    if run.evaluations:
        evaluations = run.evaluations
        measured = {name: measurement_of(evaluations, name) for name in found}
        texts += [f"Its perplexities cannot be compared: {text}" for text in list_differences(measured)]
    return texts


def _remarks(run: RunRecord) -> list[str]:
    texts = []
    _, norms = run.series("grad_norm")
    limit = run.setting("optim.max_grad_norm")
    if norms and isinstance(limit, (int, float)):
        share = sum(norm > limit for norm in norms) / len(norms)
        if share > _OFTEN:
            texts.append(f"{percent(share, 0)} of the recorded gradients were clipped to max_grad_norm={limit:g}")
    if len(run.attempts) > 1:
        steps = ", ".join(str(attempt.get("first_step")) for attempt in run.attempts[1:6])
        texts.append(f"The run was started {len(run.attempts)} times; later attempts began with step {steps}")
    if any(isinstance(a.get("code"), dict) and a["code"].get("dirty") for a in run.attempts):
        texts.append("The code had changes that no commit has; they are in code-*.diff beside the manifest")
    if run.layers.since:
        texts.append(f"The record of movements begins after step {run.layers.since}: an older version began the run")
    return texts


def _not_comparable(runs: Sequence[RunRecord]) -> list[str]:
    measured = {
        run.label: measurement_of(run.evaluations, "repaired")
        for run in runs
        if run.evaluations and "repaired" in perplexities(run)
    }
    texts = [f"Perplexities of these runs cannot be compared: {text}" for text in list_differences(measured)]
    data, models = {}, {}
    for run in runs:
        if isinstance(run.manifest.get("data"), dict):
            data[run.label] = {"fingerprint of the training data": run.manifest["data"].get("fingerprint")}
        if "model" in run.manifest:
            models[run.label] = {"fingerprint of the pruned model": run.manifest["model"]}
    texts += [f"Losses of these runs cannot be compared: {text}" for text in list_differences(data)]
    texts += [f"These runs began with different models: {text}" for text in list_differences(models)]
    return texts


def missing_of(run: RunRecord) -> list[tuple[str, str]]:
    """List what the page could not show of a run: what, and how to get it."""
    missing = []
    if not run.lines:
        missing.append(("losses", f"no line of {METRICS} can be read; the first step writes one"))
    if not run.is_finished:
        missing.append(("the result", "the run has not ended; the command that began it goes on"))
    if not perplexities(run):
        missing.append(("perplexities", f"seft evaluate with --output {run.folder / 'eval.json'}"))
    if not run.series(VALIDATION)[0]:
        missing.append(("validation loss", "seft train with validation data records it"))
    if not run.layers.numel:
        missing.append(("numbers by layer", "layers.json, topology.jsonl and a checkpoint are not there"))
    if run.is_seft and run.evolutions and run.layers.source != "topology.jsonl":
        why = "topology.jsonl is not there: an older version trained"
        why += "; what the movements add up to is from delta.safetensors" if run.layers.moves else ""
        missing.append(("where masks moved, over time", why))
    if run.is_seft and run.deltas is None and run.evolutions:
        missing.append(("sizes of the deltas", "no checkpoint is there any more, or none yet"))
    if not run.manifest:
        missing.append(("the manifest", "manifest.json is not there"))
    return missing
