"""The largest Llama that one card trains with packed weights; part of benchmarks/gpu.py.

    python benchmarks/gpu_70b.py --result DIR/70b.json

The model is the largest of 70B, 34B, 13B, 7B and 1B that fits into the card's free memory by `seft plan`; if it does
not fit in fact, the next smaller one is tried. It has random values and 60 % zeros, and is created packed on the
device, one weight after the other. It is trained on one sequence of 2,048 tokens with activation checkpointing,
factored windows and 0.2 % deltas: the first support, two ordinary steps, one evolution. The report has the measured
values beside those of the plan, which uses the card's data sheet.
"""

import functools
import statistics
from typing import Any

import torch
from gpu_common import Part, begin_peak, peak, timed
from gpu_models import SPARSITY, checkpointed, packed_llama, random_tokens
from gpu_planned import planned, sheet_of

from seft_dist import SeftConfig, SeftOptimizer
from seft_dist.backends.packed import packed_of
from seft_dist.config import PlanConfig
from seft_dist.modules.targets import find_targets

NAMES = ("70B", "34B", "13B", "7B", "1B")
TINY = ("tiny", "tinier")
METHOD: dict[str, Any] = {"density": 0.002, "window_store": "factored", "window": 1, "interval": 4, "steps": 6}


def plan_of(part: Part) -> PlanConfig:
    """Configuration of `seft plan` for this training."""
    return PlanConfig(
        model="later",
        sparsity=SPARSITY,
        seq_len=32 if part.tiny else 2048,
        global_batch=None,
        steps=METHOD["steps"],
        seft=SeftConfig(**METHOD),
        cluster=sheet_of(part.device),
    )


def plans(part: Part, names: tuple[str, ...]) -> dict[str, Any]:
    """Plan every model, the largest first."""
    config = plan_of(part)
    found = {name: planned(part.folder, name, config, "resident") for name in names}
    fitting = [name for name in names if found[name]["fits"]]
    if not fitting:
        least = found[names[-1]]
        gb = [f"{least[key] / 1e9:.1f}" for key in ("bytes", "bytes_of_device")]
        raise MemoryError(f"by the plans none fits: {names[-1]} needs {gb[0]} GB, {gb[1]} GB are free")
    return {"plans": found, "fitting": fitting}


def train(part: Part, name: str) -> dict[str, Any]:
    """Create the model and train it. What is known is written after every step."""
    device = part.device
    begin_peak(device)
    seconds_to_create, model = timed(lambda: packed_llama(name, device), device)
    part.note({"seconds_to_create": seconds_to_create, "peak_of_creating": peak(device)})
    packs = [packed_of(target.weight) for target in find_targets(model).values()]
    part.note({"bytes_packed": sum(pack.nbytes for pack in packs if pack is not None)})
    checkpointed(model)
    data = random_tokens(model, 1, 32 if part.tiny else 2048, device)
    seft = SeftOptimizer(model, SeftConfig(**METHOD), lr=1e-4, max_grad_norm=1.0)

    def step() -> float:
        loss = model(**data).loss
        loss.backward()
        seft.step()
        seft.zero_grad()
        return float(loss.detach())

    steps: list[dict[str, Any]] = []
    for _ in range(METHOD["interval"]):
        begin_peak(device)
        seconds, loss = timed(step, device)
        report = seft.evolution
        phases = None if report is None else {key: phase.seconds for key, phase in report.phases.items()}
        steps.append({"seconds": seconds, "loss": loss, "peak": peak(device), "evolution": phases})
        part.note({"deltas": len(seft.sparse_state.columns), **summary(steps)})
    seft.check_last_step()
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in steps), "a loss is not finite"
    reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    return {"evolution_step": steps[-1]["seconds"], "peak_reserved": reserved}


def summary(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarize the steps so far; an ordinary step's duration only if there was one."""
    found: dict[str, Any] = {"steps": steps, "peak": max(row["peak"] for row in steps)}
    usual = [row["seconds"] for row in steps if row["evolution"] is None]
    return found | ({"seconds": statistics.median(usual)} if usual else {})


def main() -> None:
    """Train the largest model, or the next smaller one where it does not fit."""
    part = Part(__doc__)
    names = TINY if part.tiny else NAMES
    found = part.case("plans", lambda: plans(part, names))
    for name in found.get("fitting", ()):
        plan = found["plans"][name]
        run = functools.partial(train, part, name)
        if part.case(f"{name} on one card", run, about={"model": name, "plan": plan})["status"] != "does not fit":
            break
    part.end()


if __name__ == "__main__":
    main()
