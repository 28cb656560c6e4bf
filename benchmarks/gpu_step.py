"""One training step of SEFT, LoRA, full fine-tuning and the floor on random Llamas; part of benchmarks/gpu.py.

    python benchmarks/gpu_step.py --result DIR/step.json

The floor is a frozen model's forward pass and input gradients (benchmarks/step_methods.py). The methods of a setting
share one model, except for the packed one. Durations are medians of steps that were waited for, and the peak is that of
an ordinary step. For SEFT there is also a step with a window and an evolution, and the average over an interval of 60
steps that contains one. Behind the first setting of 1B, floor and SEFT are repeated under torch.compile.
"""

import dataclasses
import functools
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from gpu_common import Part, begin_peak, free, peak, timed
from gpu_models import checkpointed, packed_llama, random_llama, random_tokens
from step_methods import METHODS

from seft_dist import SeftConfig, SeftOptimizer

INTERVAL = 60
EVERY = 6
"""Number of steps from one evolution to the next in the measurement."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model and a batch."""

    model: str
    sequences: int
    tokens: int
    checkpoint: bool

    @property
    def name(self) -> str:
        """Name of the setting in tables."""
        return f"{self.model}, {self.sequences} x {self.tokens}, checkpointing {'on' if self.checkpoint else 'off'}"

    @property
    def work(self) -> float:
        """Operations of a step, in a unit that is the same for all settings."""
        return {"tiny": 0.001, "1B": 1.1, "7B": 6.7}[self.model] * self.sequences * self.tokens * (3 + self.checkpoint)

    @property
    def about(self) -> dict[str, Any]:
        """Entries of a row about its setting."""
        return {"setting": self.name, "work": self.work} | dataclasses.asdict(self)


SETTINGS = [
    Setting("7B", 1, 2048, True),
    Setting("1B", 4, 2048, False),
    Setting("7B", 4, 2048, True),
    Setting("1B", 1, 2048, False),
    Setting("7B", 1, 2048, False),
    Setting("1B", 4, 2048, True),
]
"""The settings, the most important ones first, since the time may not suffice for all."""
TINY = [Setting("tiny", 2, 32, False)]
RUNS = [("floor", 0.0), ("seft", 0.01), ("seft", 0.05), ("full", 0.0), ("lora", 0.0), ("packed", 0.01)]
"""Methods and densities. LoRA comes last of those that share a model, since it leaves its adapters in it."""
COMPILED = [("seft", "layers"), ("floor", "layers"), ("seft", "model"), ("floor", "model")]
"""What is compiled: each decoder layer, or the whole forward pass."""
COMPILING = {"": 0.0, "layers": 15.0, "model": 60.0}
"""Seconds that the first case of a kind needs at least; assumed."""


class Models:
    """Builds models, and keeps the dense one of a setting for its next method."""

    def __init__(self, device: torch.device) -> None:
        """Args:
        device: The device.
        """
        self._device = device
        self._kept: tuple[Setting, Any] | None = None

    def take(self, setting: Setting, method: str) -> Any:
        """Return the kept model if the method can use it, otherwise a new one. The caller gives it back.

        A model of a case that failed is not given back, and so is not used again.
        """
        kept, self._kept = self._kept, None
        if kept is not None and kept[0] == setting and method != "packed":
            return kept[1]
        del kept  # frees a model before the next one is built
        free(self._device)
        model = (packed_llama if method == "packed" else random_llama)(setting.model, self._device)
        return checkpointed(model) if setting.checkpoint else model

    def give_back(self, setting: Setting, method: str, model: Any) -> None:
        """Keep a model that nothing is installed in any more."""
        model.zero_grad(set_to_none=True)
        if method not in ("lora", "packed"):
            self._kept = (setting, model)


def measure_plain(models: Models, setting: Setting, method: str, device: torch.device, steps: int) -> dict[str, Any]:
    """Measure a method of step_methods.py."""
    model = models.take(setting, method)
    data = random_tokens(model, setting.sequences, setting.tokens, device)
    step = METHODS[method](model, data, 0.0)
    found = {"method": method, **ordinary(step, device, steps)}
    models.give_back(setting, method, model)
    return found


def ordinary(step: Callable[[], Any], device: torch.device, steps: int) -> dict[str, Any]:
    """Measure duration and peak of equal steps, after two for warming up."""
    step(), step()
    free(device)
    begin_peak(device)
    seconds = [timed(step, device)[0] for _ in range(steps)]
    return {"seconds": statistics.median(seconds), "all_seconds": seconds, "peak": peak(device)}


def measure_seft(
    models: Models, setting: Setting, method: str, density: float, device: torch.device, steps: int
) -> dict[str, Any]:
    """Measure SEFT with dense or packed weights: ordinary steps, then one with an evolution."""
    model = models.take(setting, method)
    data = random_tokens(model, setting.sequences, setting.tokens, device)
    config = SeftConfig(density=density, interval=EVERY, window=1, steps=10 * EVERY)
    seft = SeftOptimizer(model, config, lr=1e-4, max_grad_norm=1.0)

    def step() -> Any:
        model(**data).loss.backward()
        seft.step()
        seft.zero_grad()
        return seft.evolution

    first, report = timed(step, device)
    assert report is not None and report.first
    free(device)
    step()
    begin_peak(device)
    seconds = [timed(step, device)[0] for _ in range(min(steps, EVERY - 3))]
    plain_peak = peak(device)
    while seft.num_steps < EVERY - 1:
        step()
    begin_peak(device)
    evolving, report = timed(step, device)
    assert report is not None and not report.first, "no evolution where one was due"
    usual = statistics.median(seconds)
    highest = peak(device)
    seft.detach()
    models.give_back(setting, method, model)
    return {
        "method": method,
        "density": density,
        "seconds": usual,
        "all_seconds": seconds,
        "peak": plain_peak,
        "first_step": first,
        "evolution_step": evolving,
        "evolution_phases": {name: phase.seconds for name, phase in report.phases.items()},
        "evolution_peak": highest,
        "average": ((INTERVAL - 1) * usual + evolving) / INTERVAL,
    }


def measure_compiled(
    models: Models, setting: Setting, method: str, what: str, device: torch.device, steps: int
) -> dict[str, Any]:
    """Measure the floor or SEFT with ``model.forward`` or every decoder layer compiled."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = models.take(setting, method)  # not given back: it stays compiled
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    for module in model.model.layers if what == "layers" else [model]:
        module.compile(dynamic=False, backend=backend)
    data = random_tokens(model, setting.sequences, setting.tokens, device)
    step: Callable[[], Any]
    if method == "floor":
        step = METHODS[method](model, data, 0.0)
    else:
        seft = SeftOptimizer(model, SeftConfig(density=0.01, init="random", interval=10**6), lr=1e-4, max_grad_norm=1.0)

        def step() -> None:
            model(**data).loss.backward()
            seft.step()
            seft.zero_grad()

    compiling, _ = timed(step, device)
    found = {"method": f"{method}, {what} compiled", "first_step": compiling, **ordinary(step, device, steps)}
    breaks = sum(counters["graph_break"].values())
    return found | {"graphs": counters["stats"]["unique_graphs"], "graph_breaks": breaks}


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Add ratios to the floor of the same setting, if the floor could be measured."""
    floors = {row["setting"]: row for row in rows if row.get("method") == "floor"}
    for row in rows:
        floor = floors.get(row.get("setting"))
        if floor is None or "seconds" not in row:
            continue
        for key in ("seconds", "peak", "average", "evolution_step"):
            if key in row:
                row[f"{key}_x_floor"] = row[key] / floor["seconds" if key != "peak" else "peak"]


def seconds_needed(part: Part, setting: Setting, compiled: str) -> float:
    """Estimate the seconds of a case from the last one of its kind that ended, by the operations of their steps.

    Args:
        part: The part, with the rows so far.
        setting: The setting of the case.
        compiled: What is compiled in it, see ``COMPILING``.
    """
    for row in reversed(part.rows):
        if row["status"] == "ok" and row.get("compiled") == compiled:
            return float(row["case_seconds"] * setting.work / row["work"])
    return 0.0 if part.tiny else COMPILING[compiled]


def measure_setting(part: Part, models: Models, setting: Setting, has_peft: bool, compiles: bool) -> None:
    """Measure every method in one setting."""
    device, steps = part.device, 2 if part.tiny else 5

    def case(name: str, run: Callable[[], dict[str, Any]], **more: Any) -> None:
        needs = seconds_needed(part, setting, more["compiled"])
        part.case(f"{setting.name}: {name}", run, needs, setting.about | more)
        add_ratios(part.rows)

    for method, density in RUNS:
        if method == "lora" and not has_peft:
            continue
        run = functools.partial(measure_plain, models, setting, method, device, steps)
        if density:
            run = functools.partial(measure_seft, models, setting, method, density, device, steps)
        more = {"density": density} if density else {}
        case(f"{method}{f' {density:.0%}' if density else ''}", run, method=method, compiled="", **more)
    if not compiles:
        return
    for method, what in COMPILED[1:3] if part.tiny else COMPILED:
        run = functools.partial(measure_compiled, models, setting, method, what, device, steps)
        case(f"{method}, {what} compiled", run, method=f"{method}, {what} compiled", compiled=what)


def main() -> None:
    """Measure every method in every setting."""
    part = Part(__doc__)
    has_peft = importlib.util.find_spec("peft") is not None
    if not has_peft:
        part.missing("lora", "peft is not installed")
    models = Models(part.device)
    compiles = True
    for setting in TINY if part.tiny else SETTINGS:
        here = compiles and setting.model in ("tiny", "1B")
        measure_setting(part, models, setting, has_peft, here)
        compiles = compiles and not here
    part.end()


if __name__ == "__main__":
    main()
