"""The promises of docs/numerics.md: the tolerances, and which promise applies to two runs. It reads no files."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from seft_dist.config.training import OPTIONS_WITHOUT_EFFECT
from seft_dist.training.manifest import lasting_attempts

LOSS_RELATIVE = 1e-5
"""Largest relative difference of a step's loss on another layout."""
WEIGHT_RELATIVE, WEIGHT_ABSOLUTE = 1e-4, 2e-6
"""A final weight may differ by the sum of the two: this share of itself, and this absolute amount."""
DELTA_RELATIVE = 1e-2
"""Largest relative difference of a layer's deltas, as a vector, until near-ties part the runs.

It is large because Adam magnifies rounding errors where a gradient is almost 0.
"""

Promise = Literal["bits", "tolerance", "none"]

_NOT_INPUTS = (
    *OPTIONS_WITHOUT_EFFECT,
    "eval.",
    "epochs",
    "export",
    "seft.selection",
    "model.path",
    "model.tokenizer",
    "model.dtype",
    "data.",
    "global_batch",
    "seft.steps",
    "teacher.path",
    "parent",
)
"""Prefixes of options that change no result, or whose effect is in a fingerprint or another field of the manifest."""
_LAYOUT_OPTIONS = (
    "backend",
    "deepspeed",
    "replicas",
    "offload",
    "packing",
    "batch_size",
    "threads",
    "model.activation_checkpointing",
)
"""Options that choose the layout. The manifest's layout, which results from them, is compared instead."""
_EXACT = ("packing",)
"""Parts of the layout that do not change a single bit of the results."""
_DERIVED = ("scheduler", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
"""Keys of a ds_config that are compared elsewhere."""
_DS = "ds_config "
_UPDATE = ("lr", "betas", "eps", "weight_decay", "max_grad_norm")


@dataclass(frozen=True)
class ConditionDifference:
    """A setting, a part of the layout or a part of the environment that differs between two runs."""

    key: str
    """Dotted name of what differs."""
    first: Any
    """Its value in the first run."""
    second: Any
    """Its value in the second run."""

    def __str__(self) -> str:
        return f"{self.key}: {_short(self.first)} against {_short(self.second)}"


@dataclass(frozen=True)
class PromiseTerms:
    """The promise that applies to two runs, and the differences between them that it follows from."""

    promise: Promise
    """"bits": all bits are equal; "tolerance": the table of docs/numerics.md; "none": no promise."""
    inputs: list[ConditionDifference]
    """Differences of settings, model or data. If there is any, nothing is promised."""
    layout: list[ConditionDifference]
    """Differences in how the work was divided."""
    environment: list[ConditionDifference]
    """Differences of versions, machines and code."""
    note: str = ""
    """Reason why nothing is promised although the inputs are the same."""

    @property
    def reasons(self) -> list[str]:
        """The differences because of which equal bits are not promised, as text."""
        decisive = self.inputs or [*self.layout, *self.environment]
        return [str(difference) for difference in decisive]

    @property
    def same_run(self) -> bool:
        """Both runs have the same inputs, so the tolerances can be applied to them, promised or not."""
        return not self.inputs


def promise_terms(first: dict[str, Any], second: dict[str, Any]) -> PromiseTerms:
    """Determine which promise applies to two runs.

    Args:
        first: Manifest of a run.
        second: Manifest of another run.
    """
    inputs = list(_differences(_inputs(first), _inputs(second)))
    layout = list(_differences(_per_attempt(first, _layout), _per_attempt(second, _layout)))
    if any(difference.key == "backend" for difference in layout):
        # Only a run of DeepSpeed has a ds_config, so all of its keys would differ
        layout = [difference for difference in layout if not difference.key.startswith(_DS)]
    environment = list(_differences(_per_attempt(first, _environment), _per_attempt(second, _environment)))
    if inputs:
        return PromiseTerms("none", inputs, layout, environment)
    if not environment and all(difference.key in _EXACT for difference in layout):
        return PromiseTerms("bits", inputs, layout, environment)
    note = ""
    if first["dtype"] != "float32":
        note = f"for {first['dtype']} weights on another layout; check layouts with --model.dtype float32"
    elif first["dropout"] and layout:
        note = (
            "for a model with dropout on another layout: each rank draws its own; set its rates to 0 to check layouts"
        )
    return PromiseTerms("none" if note else "tolerance", inputs, layout, environment, note)


def layout_name(manifest: dict[str, Any]) -> str:
    """Describe a run's layout in a few words, e.g. "fsdp x 2"; a run that changed it has several."""
    names = []
    for attempt in lasting_attempts(manifest):
        layout = attempt["layout"]
        names.append(f"{layout['backend']} x {layout['world_size']}")
    return ", then ".join(dict.fromkeys(names))


def _inputs(manifest: dict[str, Any]) -> dict[str, Any]:
    """Collect the inputs of a run: everything that its result depends on, except layout and environment."""
    attempt = manifest["attempts"][-1]
    config = attempt["config"]
    # Without a teacher its other options have no effect, and manifests of earlier versions have none of them
    if not config.get("teacher", {}).get("path"):
        config = {key: value for key, value in config.items() if key != "teacher"}
    if isinstance(config.get("seft"), dict):  # without swaps, which manifests of earlier versions do not mention
        seft = {"swap_fraction": 0.0, "swap_end": None} | config["seft"]
        config = config | {"seft": seft if seft["swap_fraction"] else seft | {"swap_end": None}}
    inputs = {
        key: value
        for key, value in flatten(config).items()
        if not key.startswith(_NOT_INPUTS) and key not in _LAYOUT_OPTIONS and key.removeprefix("optim.") not in _UPDATE
    }
    update = attempt["optimizer"] or config["optim"]  # the optimizer block of a ds_config replaces optim
    inputs |= {f"optim.{key}": _plain(update[key]) for key in _UPDATE}
    inputs["scheduler of the ds_config"] = (attempt["layout"]["deepspeed"] or {}).get("scheduler")
    inputs |= {"model": manifest["model"], "data": manifest["data"]["fingerprint"], "dtype": manifest["dtype"]}
    inputs |= {kind: manifest.get(kind) for kind in ("teacher", "parent")}
    return inputs | {"global_batch": manifest["data"]["global_batch"]}


def _layout(attempt: dict[str, Any]) -> dict[str, Any]:
    layout = dict(attempt["layout"])
    ds = dict(layout.pop("deepspeed") or {})
    for key in _DERIVED:
        ds.pop(key, None)
    return layout | {f"{_DS}{key}": value for key, value in flatten(ds).items()}


def _environment(attempt: dict[str, Any]) -> dict[str, Any]:
    environment: dict[str, Any] = dict(attempt["versions"]) | attempt["numerics"]
    environment["code"] = attempt["code"]["source"]
    for kind in ("device", "cpu", "kernels"):
        environment[kind] = ", ".join(sorted({str(host.get(kind)) for host in attempt["hosts"]}))
    return environment


def _per_attempt(manifest: dict[str, Any], facts: Any) -> dict[str, Any]:
    """Collect facts over all attempts whose steps are part of the result; a fact that changed becomes a list.

    Args:
        manifest: The run's manifest.
        facts: Function from an attempt to its facts.
    """
    every = [facts(attempt) for attempt in lasting_attempts(manifest)]
    joined = {}
    for key in dict.fromkeys(key for one in every for key in one):
        values = [one.get(key) for one in every]
        joined[key] = values[0] if all(value == values[0] for value in values) else values
    return joined


def _differences(first: dict[str, Any], second: dict[str, Any]) -> Iterator[ConditionDifference]:
    for key in dict.fromkeys([*first, *second]):
        if first.get(key) != second.get(key):
            yield ConditionDifference(key, first.get(key), second.get(key))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts to one with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
