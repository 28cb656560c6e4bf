"""One training step of SEFT, LoRA, full fine-tuning and the floor on random Llamas; part of benchmarks/gpu.py.

    python benchmarks/gpu_step.py --result DIR/step.json

The floor is a frozen model's forward pass and input gradients (benchmarks/step_methods.py). Each method gets its own
model. Durations are medians of steps that were waited for, and the peak is that of an ordinary step. For SEFT there is
also a step with a window and an evolution, and the average over an interval of 60 steps that contains one.
"""

import functools
import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu_common import Part, begin_peak, checkpointed, free, packed_llama, peak, random_llama, random_tokens, timed
from step_methods import METHODS

from seft_dist import SeftConfig, SeftOptimizer

INTERVAL = 60
EVERY = 6
"""Number of steps from one evolution to the next in the measurement."""


@dataclass(frozen=True)
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


SETTINGS = [
    Setting("7B", 1, 2048, True),
    Setting("1B", 4, 2048, False),
    Setting("7B", 4, 2048, True),
    Setting("1B", 1, 2048, False),
    Setting("7B", 1, 2048, False),
    Setting("1B", 4, 2048, True),
]
"""The settings, the most important ones first, since the time may not suffice for all."""
TINY = [Setting("tiny", 2, 32, True)]
RUNS = [("floor", 0.0), ("seft", 0.01), ("lora", 0.0), ("full", 0.0), ("seft", 0.05), ("packed", 0.01)]


def build(setting: Setting, method: str, device: torch.device) -> Any:
    """Build the model of a setting, with packed weights for method "packed"."""
    model = (packed_llama if method == "packed" else random_llama)(setting.model, device)
    return checkpointed(model) if setting.checkpoint else model


def measure_plain(setting: Setting, method: str, device: torch.device, steps: int) -> dict[str, Any]:
    """Measure a method of step_methods.py."""
    model = build(setting, method, device)
    data = random_tokens(model, setting.sequences, setting.tokens, device)
    step = METHODS[method](model, data, 0.0)
    return {"method": method, **ordinary(step, device, steps)}


def ordinary(step: Callable[[], Any], device: torch.device, steps: int) -> dict[str, Any]:
    """Measure duration and peak of equal steps, after two for warming up."""
    step(), step()
    free(device)
    begin_peak(device)
    seconds = [timed(step, device)[0] for _ in range(steps)]
    return {"seconds": statistics.median(seconds), "all_seconds": seconds, "peak": peak(device)}


def measure_seft(setting: Setting, method: str, density: float, device: torch.device, steps: int) -> dict[str, Any]:
    """Measure SEFT with dense or packed weights: ordinary steps, then one with an evolution."""
    model = build(setting, method, device)
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
    return {
        "method": method,
        "density": density,
        "seconds": usual,
        "all_seconds": seconds,
        "peak": plain_peak,
        "first_step": first,
        "evolution_step": evolving,
        "evolution_phases": {name: phase.seconds for name, phase in report.phases.items()},
        "evolution_peak": peak(device),
        "average": ((INTERVAL - 1) * usual + evolving) / INTERVAL,
    }


def measure_compiled(setting: Setting, method: str, device: torch.device, steps: int) -> dict[str, Any]:
    """Measure SEFT with every decoder layer compiled."""
    model = build(setting, method, device)
    for layer in model.model.layers:
        layer.compile(dynamic=False)
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
    return {"method": f"{method}, layers compiled", "first_step": compiling, **ordinary(step, device, steps)}


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


def main() -> None:
    """Measure every method in every setting."""
    part = Part(__doc__)
    device, steps = part.device, 2 if part.tiny else 5
    has_peft = importlib.util.find_spec("peft") is not None
    if not has_peft:
        part.missing("lora", "peft is not installed")
    for setting in TINY if part.tiny else SETTINGS:
        about = {"setting": setting.name, "model": setting.model, "sequences": setting.sequences}
        about |= {"tokens": setting.tokens, "checkpoint": setting.checkpoint}
        for method, density in RUNS:
            if method == "lora" and not has_peft:
                continue
            run = functools.partial(measure_plain, setting, method, device, steps)
            if density:
                run = functools.partial(measure_seft, setting, method, density, device, steps)
            name = f"{setting.name}: {method}{f' {density:.0%}' if density else ''}"
            part.case(name, run, 0 if part.tiny else 4, about)
            add_ratios(part.rows)
    compiled = Setting("tiny", 2, 32, False) if part.tiny else Setting("1B", 1, 2048, False)
    for method in () if part.tiny else ("floor", "seft"):
        run = functools.partial(measure_compiled, compiled, method, device, steps)
        part.case(f"{compiled.name}: {method}, layers compiled", run, 25, {"setting": compiled.name})
    add_ratios(part.rows)
    part.end()


if __name__ == "__main__":
    main()
