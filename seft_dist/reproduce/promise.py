"""What docs/numerics.md promises about two runs, as numbers and as a decision. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from seft_dist.training.manifest import lasting_attempts

LOSS_RELATIVE = 1e-5
"""Loss of each step, on another layout."""
WEIGHT_RELATIVE, WEIGHT_ABSOLUTE = 1e-4, 2e-6
"""A final weight may be off by the sum of the two: this share of it, and this much."""
DELTA_RELATIVE = 1e-2
"""Deltas of a layer, as a vector, until near-ties part the runs: Adam magnifies rounding where a gradient is almost 0."""

Promise = Literal["bits", "tolerance", "none"]

# Options that change no result, or whose effect the fingerprints show.
_FREE = (
    *("output", "trace", "timeout", "log_every", "save_every", "export", "trackers", "keep", "seft.selection"),
    *("model.path", "model.tokenizer", "model.dtype", "data.", "global_batch", "seft.steps", "teacher.path"),
)
# Options that say how the work is divided; the layout shows what came of them.
_LAYOUT = (
    *("backend", "deepspeed", "replicas", "offload", "packing", "batch_size", "threads"),
    "model.activation_checkpointing",
)
# What of the layout changes no bit
_EXACT = ("packing",)
# Keys of a ds_config that are looked at elsewhere
_DERIVED = ("scheduler", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_DS = "ds_config "
_UPDATE = ("lr", "betas", "eps", "weight_decay", "max_grad_norm")


@dataclass(frozen=True)
class Difference:
    """Something that was given to two runs, and was not the same."""

    key: str
    first: Any
    second: Any

    def __str__(self) -> str:
        return f"{self.key}: {_short(self.first)} against {_short(self.second)}"


@dataclass(frozen=True)
class Terms:
    """What two runs have in common, and what therefore is promised."""

    promise: Promise
    """"bits": all bits are equal; "tolerance": the table of docs/numerics.md; "none": they are different runs."""
    inputs: list[Difference]
    """Settings, model or data: with any of these, nothing is promised."""
    layout: list[Difference]
    """How the work was divided."""
    environment: list[Difference]
    """Versions, machines, code."""
    note: str = ""
    """Why nothing is promised although the inputs are the same."""

    @property
    def reasons(self) -> list[str]:
        """Why not all bits are promised to be equal, as text."""
        decisive = self.inputs or [*self.layout, *self.environment]
        return [str(difference) for difference in decisive]

    @property
    def same_run(self) -> bool:
        """Whether both were given the same, so that they may be held against the tolerances, promised or not."""
        return not self.inputs


def terms(first: dict[str, Any], second: dict[str, Any]) -> Terms:
    """What is promised about two runs.

    Args:
        first: A manifest.
        second: Another.
    """
    inputs = list(_differences(_inputs(first), _inputs(second)))
    layout = list(_differences(_per_attempt(first, _layout), _per_attempt(second, _layout)))
    if any(difference.key == "backend" for difference in layout):
        layout = [difference for difference in layout if not difference.key.startswith(_DS)]  # only one of them has any
    environment = list(_differences(_per_attempt(first, _environment), _per_attempt(second, _environment)))
    if inputs:
        return Terms("none", inputs, layout, environment)
    if not environment and all(difference.key in _EXACT for difference in layout):
        return Terms("bits", inputs, layout, environment)
    note = ""
    if first["dtype"] != "float32":
        note = f"for {first['dtype']} weights on another layout; check layouts with --model.dtype float32"
    elif first["dropout"] and layout:
        note = (
            "for a model with dropout on another layout: each rank draws its own; set its rates to 0 to check layouts"
        )
    return Terms("none" if note else "tolerance", inputs, layout, environment, note)


def layout_name(manifest: dict[str, Any]) -> str:
    """A run's layout in a few words, e.g. "fsdp x 2"."""
    names = []
    for attempt in lasting_attempts(manifest):
        layout = attempt["layout"]
        names.append(f"{layout['backend']} x {layout['world_size']}")
    return ", then ".join(dict.fromkeys(names))


def _inputs(manifest: dict[str, Any]) -> dict[str, Any]:
    """What decides about the result."""
    attempt = manifest["attempts"][-1]
    config = attempt["config"]
    if not config.get("teacher", {}).get("path"):  # its other options say nothing; earlier versions had none of them
        config = {key: value for key, value in config.items() if key != "teacher"}
    found = {
        key: value
        for key, value in flat(config).items()
        if not key.startswith(_FREE) and key not in _LAYOUT and key.removeprefix("optim.") not in _UPDATE
    }
    update = attempt["optimizer"] or config["optim"]  # a ds_config's block takes the place of optim
    found |= {f"optim.{key}": _plain(update[key]) for key in _UPDATE}
    found["scheduler of the ds_config"] = (attempt["layout"]["deepspeed"] or {}).get("scheduler")
    found |= {"model": manifest["model"], "data": manifest["data"]["fingerprint"], "dtype": manifest["dtype"]}
    return found | {"global_batch": manifest["data"]["global_batch"], "teacher": manifest.get("teacher")}


def _layout(attempt: dict[str, Any]) -> dict[str, Any]:
    layout = dict(attempt["layout"])
    ds = dict(layout.pop("deepspeed") or {})
    for key in _DERIVED:
        ds.pop(key, None)
    return layout | {f"{_DS}{key}": value for key, value in flat(ds).items()}


def _environment(attempt: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = dict(attempt["versions"]) | attempt["numerics"] | {"code": attempt["code"]["source"]}
    for kind in ("device", "cpu", "kernels"):
        found[kind] = ", ".join(sorted({str(host.get(kind)) for host in attempt["hosts"]}))
    return found


def _per_attempt(manifest: dict[str, Any], facts: Any) -> dict[str, Any]:
    """Facts of all attempts that lasted; one that changed between them is a list."""
    every = [facts(attempt) for attempt in lasting_attempts(manifest)]
    joined = {}
    for key in dict.fromkeys(key for one in every for key in one):
        values = [one.get(key) for one in every]
        joined[key] = values[0] if all(value == values[0] for value in values) else values
    return joined


def _differences(first: dict[str, Any], second: dict[str, Any]) -> Iterator[Difference]:
    for key in dict.fromkeys([*first, *second]):
        if first.get(key) != second.get(key):
            yield Difference(key, first.get(key), second.get(key))


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one with dotted names."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
