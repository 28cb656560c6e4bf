"""Comparison of two runs: their inputs, their steps, layer by layer, and their results.

It reads the files that training wrote: manifest.json always; trace.jsonl, metrics.jsonl, checkpoints and model/ if
present.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from seft_dist.files.writing import write_text
from seft_dist.io.weight_files import SafetensorError, safe_open
from seft_dist.reproduce.comparable import read_comparable, read_metrics
from seft_dist.reproduce.promise import DELTA_RELATIVE, LOSS_RELATIVE, PromiseTerms, layout_name, promise_terms
from seft_dist.reproduce.step_diff import StepDifference, describe_first, step_differences
from seft_dist.reproduce.weights_diff import (
    WeightDifference,
    changed_since_export,
    compare_weights,
    different_tensors,
)
from seft_dist.training.manifest import FILE
from seft_dist.training.run_folder import CHECKPOINTS, DELTA, MODEL
from seft_dist.training.trace import read_trace

EQUAL = "bitwise equal"
WITHIN = "equal within docs/numerics.md"
PARTED = "equal within docs/numerics.md until near-ties part the runs"
DIFFERS = "differs"
UNDECIDED = "cannot be judged"
"""The last of the verdicts: a run is not finished, or its final weights are missing."""


@dataclass
class Comparison:
    """The differences between two runs, and the verdict."""

    first: str
    """Path of the first run."""
    second: str
    """Path of the second run."""
    layouts: tuple[str, str]
    """Layout of each run in words, e.g. "fsdp x 2"."""
    terms: PromiseTerms
    """The promise of docs/numerics.md for these two runs, and the differences of their inputs that it depends on."""
    log_every: tuple[int, int]
    """Number of steps between two lines of the metrics, for each run."""
    steps: int = 0
    """Number of steps that both runs did, and whose losses could be compared."""
    traced: bool = False
    """Both runs have a trace, so layers could be compared in each of these steps."""
    differences: list[StepDifference] = field(default_factory=list)
    """The steps in which anything differs, in order."""
    evolutions: int = 0
    """Number of evolutions that both runs did."""
    first_evolution: int | None = None
    """Step of the first evolution after which masks or supports differ; None if there is none."""
    layers: dict[str, list[str]] = field(default_factory=dict)
    """Layers that differ at the end, and for each what differs by its hash: "support", "mask", "weights"."""
    weights: list[WeightDifference] | None = None
    """Comparison of every exported tensor; None if a model was not exported."""
    supports: dict[str, int] | None = None
    """Number of positions that are in the final support of one run only, by layer; None if it could not be read."""
    problems: list[str] = field(default_factory=list)
    """Findings that prevent a verdict, or that show files which do not belong together."""
    verdict: str = UNDECIDED
    """EQUAL, WITHIN, PARTED, DIFFERS or UNDECIDED."""
    why: str = ""
    """Reason for the verdict, in words."""

    @property
    def held(self) -> bool:
        """The promise of docs/numerics.md is kept: the runs are equal, or as close as their two layouts require."""
        return self.verdict in (EQUAL, WITHIN, PARTED)

    @property
    def sentence(self) -> str:
        """The verdict and its reason."""
        return f"{self.verdict}: {self.why}" if self.why else self.verdict

    def to_json(self) -> dict[str, Any]:
        """Convert the comparison to plain dicts, with only those tensors that differ."""
        content = asdict(self) | {"held": self.held, "promise": self.terms.promise}
        if self.weights is not None:
            content["weights"] = [asdict(row) for row in self.weights if row.different]
        return content


def compare(first: Path, second: Path, *, weights: bool = True) -> Comparison:
    """Compare two runs.

    Args:
        first: Folder of a run, or the path of its manifest alone.
        second: The same of another run.
        weights: Compare the exported models too, which reads every byte of them.

    Raises:
        ValueError: A file cannot be read.
    """
    manifests = read_comparable(first), read_comparable(second)
    # A manifest that was copied elsewhere comes without the other files of its run.
    folders = tuple(path if path.is_dir() else path.parent if path.name == FILE else None for path in (first, second))
    one, two = manifests
    log_every = tuple(run["attempts"][-1]["config"]["log_every"] for run in manifests)
    layouts = (layout_name(one), layout_name(two))
    comparison = Comparison(str(first), str(second), layouts, promise_terms(one, two), log_every)
    _compare_steps(comparison, *folders)
    _compare_evolutions(comparison, one, two)
    if one["final"] and two["final"]:
        _compare_ends(comparison, one["final"]["layers"], two["final"]["layers"])
        if folders[0] is not None and folders[1] is not None:
            comparison.supports = _support_difference(
                folders[0], folders[1], one["final"]["step"], two["final"]["step"]
            )
        if weights:
            _compare_files(comparison, manifests, folders)
    else:
        unfinished = [str(path) for path, run in zip((first, second), manifests, strict=True) if not run["final"]]
        comparison.problems.append(f"not finished: {' and '.join(unfinished)}")
    _set_verdict(comparison, manifests)
    return comparison


def _compare_steps(comparison: Comparison, first: Path | None, second: Path | None) -> None:
    """Compare what both runs recorded of the same steps: traces if both have one, else metrics."""
    if first is None or second is None:
        return
    one, two = list(read_trace(first)), list(read_trace(second))
    comparison.traced = bool(one and two)
    if not comparison.traced:
        one, two = read_metrics(first), read_metrics(second)
        # A loss is the mean since the line before, so losses at different intervals cannot be compared.
        if comparison.log_every[0] != comparison.log_every[1]:
            one, two = ([{**line, "loss": None} for line in lines] for lines in (one, two))
    common = {line["step"] for line in one} & {line["step"] for line in two}
    comparison.steps = len(common)
    comparison.differences = step_differences(one, two)


def _compare_evolutions(comparison: Comparison, first: dict[str, Any], second: dict[str, Any]) -> None:
    """Compare the digests of masks and supports after each evolution that both manifests can know."""
    one, two = ({entry["step"]: entry["digest"] for entry in run["evolutions"]} for run in (first, second))
    until = min(_last_known(first), _last_known(second))
    steps = sorted(step for step in one.keys() | two.keys() if step <= until)
    comparison.evolutions = len(one.keys() & two.keys() & set(steps))
    comparison.first_evolution = next((step for step in steps if one.get(step) != two.get(step)), None)


def _last_known(manifest: dict[str, Any]) -> float:
    """Return the step up to which a manifest has all evolutions; an unfinished run may have done later ones."""
    if manifest["final"]:
        return float("inf")
    return max((entry["step"] for entry in manifest["evolutions"]), default=0)


def _compare_ends(comparison: Comparison, first: dict[str, list[str]], second: dict[str, list[str]]) -> None:
    """Compare the hashes of every layer's final support, mask and weights."""
    for name in dict.fromkeys([*first, *second]):
        one, two = first.get(name), second.get(name)
        if one is None or two is None:
            comparison.layers[name] = ["only in one run"]
        elif one != two:
            kinds = zip(("support", "mask", "weights"), one, two, strict=True)
            comparison.layers[name] = [kind for kind, ours, theirs in kinds if ours != theirs]


def _support_difference(first: Path, second: Path, *steps: int) -> dict[str, int] | None:
    """Count the positions in only one of two final supports, by layer, from the last checkpoints."""
    if steps[0] != steps[1]:
        return None
    supports = [_final_supports(folder, step) for folder, step in zip((first, second), steps, strict=True)]
    one, two = supports
    if one is None or two is None:
        return None
    return {name: len(one[name] ^ two.get(name, set())) for name in one}


def _final_supports(folder: Path, step: int) -> dict[str, set[int]] | None:
    """Read the support of every layer from all ranks' files of a checkpoint; None if it cannot be read."""
    supports: dict[str, set[int]] = {}
    try:
        for file in sorted((folder / CHECKPOINTS / f"step-{step:08d}").glob("rank-*.safetensors")):
            with safe_open(file, framework="np") as handle:
                for key in handle.keys():  # noqa: SIM118  # not a dict
                    if key.endswith(".indices"):
                        positions = handle.get_tensor(key).tolist()
                        supports.setdefault(key.removesuffix(".indices"), set()).update(positions)
    except (OSError, SafetensorError):
        return None
    return supports or None


def _compare_files(comparison: Comparison, manifests: tuple[Any, Any], folders: tuple[Path | None, ...]) -> None:
    """Compare the exported models and delta files with each other, and each model with its run's own hashes."""
    exported = [folder for folder in folders if folder is not None and (folder / MODEL / "config.json").is_file()]
    for folder, manifest in zip(folders, manifests, strict=True):
        if folder in exported and folder is not None:
            changed = changed_since_export(folder / MODEL, manifest)
            if changed:
                comparison.problems.append(
                    f"{folder / MODEL} is not what its run ended with: {changed[0]} ({len(changed)} layers) was "
                    "changed later"
                )
    if len(exported) < 2:
        return
    comparison.weights = compare_weights(exported[0] / MODEL, exported[1] / MODEL)
    deltas = [folder / DELTA for folder in exported]
    if not any(row.different for row in comparison.weights) and all(path.is_file() for path in deltas):
        different = different_tensors(*deltas)
        if different:
            comparison.problems.append(
                f"{different[0]} differs between {deltas[0]} and {deltas[1]}, although the models are equal"
            )


def _set_verdict(comparison: Comparison, manifests: tuple[Any, Any]) -> None:
    """Decide on the verdict: equal; unfinished; parted by near-ties; within the tolerances; otherwise different.

    The order matters: a run that parted at a near-tie is outside the tolerances afterwards, so it is recognized before
    they are applied. Tolerances are applied only to runs with the same inputs on different layouts or machines.
    """
    changed = [row for row in comparison.weights or [] if row.different]  # tensors
    ended = bool(manifests[0]["final"] and manifests[1]["final"])
    alike = comparison.first_evolution is None and not comparison.differences and not comparison.layers and not changed
    if ended and comparison.log_every[0] == comparison.log_every[1]:
        alike = alike and manifests[0]["final"]["loss"] == manifests[1]["final"]["loss"]
    if alike and not comparison.problems:
        comparison.verdict = EQUAL
        if comparison.terms.reasons:
            comparison.why = "although these differ: " + "; ".join(comparison.terms.reasons[:3])
        return
    if alike and not changed and not ended:
        comparison.why = f"no difference so far, but {comparison.problems[0]}"
        return
    outside = _first_beyond_tolerance(comparison, changed)
    terms, problems = comparison.terms, comparison.problems
    other_layout = terms.same_run and terms.promise != "bits"
    parted = _parted_by_near_ties(comparison) if terms.promise == "tolerance" and not problems else ""
    if parted:
        comparison.verdict, comparison.why = PARTED, parted
        return
    if other_layout and not outside and not problems:
        if comparison.weights is None:
            comparison.why = "final weights differ in bits, and were not written: repeat the runs with --export true"
            return
        comparison.verdict, comparison.why = WITHIN, _describe_agreement(comparison)
        return
    comparison.verdict = DIFFERS
    why = outside or "; ".join(problems) if other_layout else ""
    comparison.why = why or _first_difference(comparison, changed)
    if other_layout and terms.promise == "none":
        comparison.why += f". Nothing is promised {terms.note}"
    elif terms.promise == "none":
        comparison.why += f". Nothing is promised, for these differ: {'; '.join(terms.reasons[:3])}"


def _first_beyond_tolerance(comparison: Comparison, changed: list[WeightDifference]) -> str:
    """Describe the first difference beyond the tolerances for another layout; empty if there is none."""
    step = comparison.first_evolution
    loss = next((d for d in comparison.differences if d.loss_relative > LOSS_RELATIVE), None)
    if step is not None and (loss is None or step <= loss.step):
        layers = next((d.moved for d in comparison.differences if d.step == step), [])
        more = f"; {len(layers)} layers" if len(layers) > 1 else ""
        return f"first at step {step}" + (f", layer {layers[0]}{more}" if layers else ": masks or supports")
    if loss is not None:
        return (
            f"first at step {loss.step}: loss off by {loss.loss_relative:.1e} of itself, {LOSS_RELATIVE:.0e} is allowed"
        )
    moved = [name for name, kinds in comparison.layers.items() if {"support", "mask", "only in one run"} & set(kinds)]
    if moved:
        return f"at the end, layer {moved[0]}: {' and '.join(comparison.layers[moved[0]])} ({len(moved)} layers)"
    worst = max(changed, key=lambda row: row.outside, default=None)
    if worst is not None and worst.outside:
        total = sum(row.outside for row in changed)
        return f"final weights: {total:,} values beyond the tolerance, most in {worst.name} (by {worst.largest:.1e})"
    return ""


def _parted_by_near_ties(comparison: Comparison) -> str:
    """Explain that rounding can have caused the first difference of masks and supports; empty if it cannot.

    Until that step all else must agree: the batches and learning rates exactly, the losses and the deltas of the other
    layers within tolerances. In that step, every layer that moved must have enough candidates within rounding of the
    border of its selection.
    """
    if not comparison.traced or not comparison.differences:
        return ""
    first = next((d for d in comparison.differences if d.moved), None)
    if first is None or first.step != comparison.first_evolution:
        return ""
    if not all(layer.by_near_ties for layer in first.moved):
        return ""
    until = [d for d in comparison.differences if d.step <= first.step]
    if any({"batch", "lr"} & d.values.keys() or d.loss_relative > LOSS_RELATIVE for d in until):
        return ""
    if any(layer.delta_relative > DELTA_RELATIVE for d in until for layer in d.layers if layer not in first.moved):
        return ""
    moved = sum((layer.support_positions or 0) + (layer.mask_positions or 0) for layer in first.moved)
    ties = sum(layer.near_ties or 0 for layer in first.moved)
    last = comparison.differences[-1]
    return (
        f"at step {first.step} about {moved} positions of {len(first.moved)} layers fall the other way (supports and "
        f"masks; {ties} candidates there are within rounding of a border). From then on they are two runs of equal "
        f"standing: loss off by {last.loss_relative:.1e} of itself at step {last.step}"
    )


def _describe_agreement(comparison: Comparison) -> str:
    largest = max((row.largest for row in comparison.weights or []), default=0.0)
    loss = max((d.loss_relative for d in comparison.differences), default=0.0)
    same = f"masks and supports identical in {comparison.evolutions} evolutions"
    return f"{same}; loss within {loss:.1e} of itself in {comparison.steps} steps, final weights within {largest:.1e}"


def _first_difference(comparison: Comparison, changed: list[WeightDifference]) -> str:
    """Describe the first difference of any bit."""
    if comparison.differences:
        return describe_first(comparison.differences)
    if comparison.first_evolution is not None:
        return f"first at step {comparison.first_evolution}: masks or supports; no trace says in which layer"
    if comparison.layers:
        name = next(iter(comparison.layers))
        numbers = next((row for row in changed if row.name == f"{name}.weight"), None)
        size = f", by up to {numbers.largest:.1e}" if numbers else ""
        return (
            f"at the end, layer {name}: {' and '.join(comparison.layers[name])}{size} ({len(comparison.layers)} layers)"
        )
    if changed:
        row = max(changed, key=lambda row: row.largest)
        where = f"position {row.at}, by {row.largest:.1e} ({row.different:,} values there, {len(changed)} tensors)"
        text = f"in the exported models only: {row.name}, {where}"
        return f"{text}; {'; '.join(comparison.problems)}" if comparison.problems else text
    return "; ".join(comparison.problems) or "final loss"


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write a comparison as JSON; missing folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(comparison.to_json(), indent=1, default=str) + "\n")
