"""Two runs, compared: what they were given, what they did step by step and layer by layer, where they ended.

Reads what training wrote: manifest.json always; trace.jsonl, metrics.jsonl, checkpoints and model/ if they are there.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from seft_dist.files.writing import write_text
from seft_dist.io.weight_files import SafetensorError, safe_open
from seft_dist.reproduce.promise import DELTA_RELATIVE, LOSS_RELATIVE, Terms, layout_name, terms
from seft_dist.reproduce.step_diff import StepDifference, first_of, metrics_of, step_differences
from seft_dist.reproduce.weights_diff import WeightDifference, compare_weights, tampered, unlike_tensors
from seft_dist.training.manifest import FILE, read_manifest
from seft_dist.training.run_folder import CHECKPOINTS, DELTA, MODEL
from seft_dist.training.trace import read_trace

EQUAL, WITHIN, DIFFERS, OPEN = "bitwise equal", "equal within docs/numerics.md", "differs", "cannot be judged"
PARTED = "equal within docs/numerics.md until near-ties part the runs"


@dataclass
class Comparison:
    """What was found about two runs."""

    first: str
    second: str
    layouts: tuple[str, str]
    terms: Terms
    log_every: tuple[int, int]
    steps: int = 0
    """Steps that both runs did, and whose losses could be compared."""
    traced: bool = False
    """Whether both runs have a trace, so that layers could be compared in each of these steps."""
    differences: list[StepDifference] = field(default_factory=list)
    """The steps that differ in anything, in order."""
    evolutions: int = 0
    """Evolutions that both runs did."""
    first_evolution: int | None = None
    """Step of the first one after which masks or supports differ; None: none."""
    layers: dict[str, list[str]] = field(default_factory=dict)
    """Layers that differ at the end, each with what differs: "support", "mask", "weights" (by hash)."""
    weights: list[WeightDifference] | None = None
    """Every exported tensor; None if the two models are not there."""
    supports: dict[str, int] | None = None
    """Positions that are in the support of one run only, by layer; None if it could not be read."""
    problems: list[str] = field(default_factory=list)
    """What stands in the way of a judgement, or does not belong together."""
    verdict: str = OPEN
    why: str = ""
    """The verdict's reason, in words."""

    @property
    def held(self) -> bool:
        """Whether docs/numerics.md is kept: the runs are equal, or as close as two layouts have to be."""
        return self.verdict in (EQUAL, WITHIN, PARTED)

    @property
    def sentence(self) -> str:
        """The verdict and its reason."""
        return f"{self.verdict}: {self.why}" if self.why else self.verdict

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain dicts; of the weights, only tensors that differ."""
        content = asdict(self) | {"held": self.held, "promise": self.terms.promise}
        if self.weights is not None:
            content["weights"] = [asdict(row) for row in self.weights if row.different]
        return content


def compare(first: Path, second: Path, *, weights: bool = True) -> Comparison:
    """Compare two runs.

    Args:
        first: Folder of a run, or its manifest alone.
        second: Another.
        weights: False: leave out the exported models, of which every byte would be read.

    Raises:
        ValueError: Something cannot be read.
    """
    manifests = read_manifest(first), read_manifest(second)
    folders = tuple(path if path.is_dir() else path.parent if path.name == FILE else None for path in (first, second))
    one, two = manifests
    log_every = tuple(run["attempts"][-1]["config"]["log_every"] for run in manifests)
    found = Comparison(str(first), str(second), (layout_name(one), layout_name(two)), terms(one, two), log_every)
    _compare_steps(found, *folders)
    _compare_evolutions(found, one, two)
    if one["final"] and two["final"]:
        _compare_ends(found, one["final"]["layers"], two["final"]["layers"])
        if folders[0] is not None and folders[1] is not None:
            found.supports = _support_difference(folders[0], folders[1], one["final"]["step"], two["final"]["step"])
        if weights:
            _compare_files(found, manifests, folders)
    else:
        which = " and ".join(
            str(path) for path, run in zip((first, second), manifests, strict=True) if not run["final"]
        )
        found.problems.append(f"not finished: {which}")
    _judge(found, manifests)
    return found


def _compare_steps(found: Comparison, first: Path | None, second: Path | None) -> None:
    if first is None or second is None:
        return
    one, two = list(read_trace(first)), list(read_trace(second))
    found.traced = bool(one and two)
    if not found.traced:
        one, two = metrics_of(first), metrics_of(second)
        if found.log_every[0] != found.log_every[1]:  # a line's loss is the mean since the line before
            one, two = ([{**line, "loss": None} for line in lines] for lines in (one, two))
    common = {line["step"] for line in one} & {line["step"] for line in two}
    found.steps = len(common)
    found.differences = step_differences(one, two)


def _compare_evolutions(found: Comparison, first: dict[str, Any], second: dict[str, Any]) -> None:
    one, two = ({entry["step"]: entry["digest"] for entry in run["evolutions"]} for run in (first, second))
    until = min(_last_known(first), _last_known(second))
    steps = sorted(step for step in one.keys() | two.keys() if step <= until)
    found.evolutions = len(one.keys() & two.keys() & set(steps))
    found.first_evolution = next((step for step in steps if one.get(step) != two.get(step)), None)


def _last_known(manifest: dict[str, Any]) -> float:
    """Step up to which a manifest surely names every evolution."""
    if manifest["final"]:
        return float("inf")
    return max((entry["step"] for entry in manifest["evolutions"]), default=0)


def _compare_ends(found: Comparison, first: dict[str, list[str]], second: dict[str, list[str]]) -> None:
    for name in dict.fromkeys([*first, *second]):
        one, two = first.get(name), second.get(name)
        if one is None or two is None:
            found.layers[name] = ["only in one run"]
        elif one != two:
            kinds = zip(("support", "mask", "weights"), one, two, strict=True)
            found.layers[name] = [kind for kind, ours, theirs in kinds if ours != theirs]


def _support_difference(first: Path, second: Path, *steps: int) -> dict[str, int] | None:
    """Positions in one final support only, by layer, from the last checkpoints."""
    if steps[0] != steps[1]:
        return None
    supports = [_final_supports(folder, step) for folder, step in zip((first, second), steps, strict=True)]
    one, two = supports
    if one is None or two is None:
        return None
    return {name: len(one[name] ^ two.get(name, set())) for name in one}


def _final_supports(folder: Path, step: int) -> dict[str, set[int]] | None:
    found: dict[str, set[int]] = {}
    try:
        for file in sorted((folder / CHECKPOINTS / f"step-{step:08d}").glob("rank-*.safetensors")):
            with safe_open(file, framework="np") as handle:
                for key in handle.keys():  # noqa: SIM118  # not a dict
                    if key.endswith(".indices"):
                        found.setdefault(key.removesuffix(".indices"), set()).update(handle.get_tensor(key).tolist())
    except (OSError, SafetensorError):
        return None
    return found or None


def _compare_files(found: Comparison, manifests: tuple[Any, Any], folders: tuple[Path | None, ...]) -> None:
    """The exported models and delta files, also against what the runs say of themselves."""
    there = [folder for folder in folders if folder is not None and (folder / MODEL / "config.json").is_file()]
    for folder, manifest in zip(folders, manifests, strict=True):
        if folder in there and folder is not None:
            wrong = tampered(folder / MODEL, manifest)
            if wrong:
                found.problems.append(
                    f"{folder / MODEL} is not what its run ended with: {wrong[0]} ({len(wrong)} layers) was changed later"
                )
    if len(there) < 2:
        return
    found.weights = compare_weights(there[0] / MODEL, there[1] / MODEL)
    deltas = [folder / DELTA for folder in there]
    if not any(row.different for row in found.weights) and all(path.is_file() for path in deltas):
        odd = unlike_tensors(*deltas)
        if odd:
            found.problems.append(
                f"{odd[0]} differs between {deltas[0]} and {deltas[1]}, although the models are equal"
            )


def _judge(found: Comparison, manifests: tuple[Any, Any]) -> None:
    changed = [row for row in found.weights or [] if row.different]
    ended = bool(manifests[0]["final"] and manifests[1]["final"])
    alike = found.first_evolution is None and not found.differences and not found.layers and not changed
    if ended and found.log_every[0] == found.log_every[1]:
        alike = alike and manifests[0]["final"]["loss"] == manifests[1]["final"]["loss"]
    if alike and not found.problems:
        found.verdict = EQUAL
        if found.terms.reasons:
            found.why = "although these differ: " + "; ".join(found.terms.reasons[:3])
        return
    if alike and not changed and not ended:
        found.why = f"no difference so far, but {found.problems[0]}"
        return
    outside = _outside(found, changed)
    elsewhere = found.terms.same_run and found.terms.promise != "bits"
    if found.terms.promise == "tolerance" and not found.problems and (parted := _parted_by_near_ties(found)):
        found.verdict, found.why = PARTED, parted
        return
    if elsewhere and not outside and not found.problems:
        if found.weights is None:
            found.why = "final weights differ in bits, and were not written: repeat the runs with --export true"
            return
        found.verdict, found.why = WITHIN, _within(found)
        return
    found.verdict = DIFFERS
    found.why = (outside or "; ".join(found.problems) if elsewhere else "") or _where(found, changed)
    if elsewhere and found.terms.promise == "none":
        found.why += f". Nothing is promised {found.terms.note}"
    elif found.terms.promise == "none":
        cause = "; ".join(found.terms.reasons[:3])
        found.why += f". Nothing is promised, for these differ: {cause}"


def _outside(found: Comparison, changed: list[WeightDifference]) -> str:
    """The first thing beyond the tolerance of another layout, in words; empty if there is none."""
    step = found.first_evolution
    loss = next((d for d in found.differences if d.loss_relative > LOSS_RELATIVE), None)
    if step is not None and (loss is None or step <= loss.step):
        layers = next((d.moved for d in found.differences if d.step == step), [])
        more = f"; {len(layers)} layers" if len(layers) > 1 else ""
        return f"first at step {step}" + (f", layer {layers[0]}{more}" if layers else ": masks or supports")
    if loss is not None:
        return (
            f"first at step {loss.step}: loss off by {loss.loss_relative:.1e} of itself, {LOSS_RELATIVE:.0e} is allowed"
        )
    moved = [name for name, kinds in found.layers.items() if {"support", "mask", "only in one run"} & set(kinds)]
    if moved:
        return f"at the end, layer {moved[0]}: {' and '.join(found.layers[moved[0]])} ({len(moved)} layers)"
    worst = max(changed, key=lambda row: row.outside, default=None)
    if worst is not None and worst.outside:
        total = sum(row.outside for row in changed)
        return f"final weights: {total:,} values beyond the tolerance, most in {worst.name} (by {worst.largest:.1e})"
    return ""


def _parted_by_near_ties(found: Comparison) -> str:
    """Why the first difference of masks and supports is one that rounding can make, in words; empty if it is not."""
    if not found.traced or not found.differences:
        return ""
    first = next((d for d in found.differences if d.moved), None)
    if first is None or first.step != found.first_evolution or not all(layer.by_near_ties for layer in first.moved):
        return ""
    until = [d for d in found.differences if d.step <= first.step]
    if any({"batch", "lr"} & d.values.keys() or d.loss_relative > LOSS_RELATIVE for d in until):
        return ""
    if any(layer.delta_relative > DELTA_RELATIVE for d in until for layer in d.layers if layer not in first.moved):
        return ""
    moved = sum((layer.support_positions or 0) + (layer.mask_positions or 0) for layer in first.moved)
    ties = sum(layer.near_ties or 0 for layer in first.moved)
    last = found.differences[-1]
    return (
        f"at step {first.step} about {moved} positions of {len(first.moved)} layers fall the other way (supports and masks; "
        f"{ties} candidates there are within rounding of a border). From then on they are two runs of equal standing: loss off "
        f"by {last.loss_relative:.1e} of itself at step {last.step}"
    )


def _within(found: Comparison) -> str:
    largest = max((row.largest for row in found.weights or []), default=0.0)
    loss = max((d.loss_relative for d in found.differences), default=0.0)
    same = f"masks and supports identical in {found.evolutions} evolutions"
    return f"{same}; loss within {loss:.1e} of itself in {found.steps} steps, final weights within {largest:.1e}"


def _where(found: Comparison, changed: list[WeightDifference]) -> str:
    """The first difference of any bit, in words."""
    if found.differences:
        return first_of(found.differences)
    if found.first_evolution is not None:
        return f"first at step {found.first_evolution}: masks or supports; no trace says in which layer"
    if found.layers:
        name = next(iter(found.layers))
        numbers = next((row for row in changed if row.name == f"{name}.weight"), None)
        size = f", by up to {numbers.largest:.1e}" if numbers else ""
        return f"at the end, layer {name}: {' and '.join(found.layers[name])}{size} ({len(found.layers)} layers)"
    if changed:
        row = max(changed, key=lambda row: row.largest)
        where = f"position {row.at}, by {row.largest:.1e} ({row.different:,} values there, {len(changed)} tensors)"
        said = f"in the exported models only: {row.name}, {where}"
        return f"{said}; {'; '.join(found.problems)}" if found.problems else said
    return "; ".join(found.problems) or "final loss"


def write_json(found: Comparison, path: Path) -> None:
    """Write everything that was found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(found.to_json(), indent=1, default=str) + "\n")
