"""The largest Llama that one card trains with packed weights; part of benchmarks/gpu.py.

    python benchmarks/gpu_70b.py --result DIR/70b.json

The model is the largest of 70B, 34B, 13B, 7B and 1B that fits by `seft plan`. It has random values and 60 % zeros,
and is created packed on the device, one weight after the other. It is trained on one sequence of 2,048 tokens with
activation checkpointing, factored windows and 0.2 % deltas: the first support, two ordinary steps, one evolution. The
report has the measured values beside those of the plan, which uses the card's data sheet.
"""

import statistics
from typing import Any

import torch
from gpu_common import SPARSITY, Part, begin_peak, checkpointed, content_of, packed_llama, peak, random_tokens, timed
from gpu_planned import planned, sheet_of

from seft_dist import SeftConfig, SeftOptimizer
from seft_dist.backends.packed import packed_of
from seft_dist.config import PlanConfig
from seft_dist.modules.targets import find_targets

NAMES = ("70B", "34B", "13B", "7B", "1B")
METHOD: dict[str, Any] = {"density": 0.002, "window_store": "factored", "window": 1, "interval": 4, "steps": 6}


def plan_of(part: Part, name: str) -> PlanConfig:
    """Configuration of `seft plan` for this training."""
    return PlanConfig(
        model=str(part.folder / f"{name}.json"),
        sparsity=SPARSITY,
        seq_len=32 if part.tiny else 2048,
        global_batch=None,
        steps=METHOD["steps"],
        seft=SeftConfig(**METHOD),
        cluster=sheet_of(part.device),
    )


def largest(part: Part) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """Find the largest model that fits the card; returns its name, its plan, and all plans that were made."""
    looked_at = []
    for name in ("tiny",) if part.tiny else NAMES:
        plan = planned(part.folder, name, content_of(name), plan_of(part, name), "resident")
        looked_at.append({"model": name, "bytes": plan["bytes"], "fits": plan["fits"]})
        if plan["fits"]:
            return name, plan, looked_at
    raise RuntimeError(f"no model fits this card: {looked_at}")


def train(part: Part) -> dict[str, Any]:
    """Create the model and train it."""
    name, plan, looked_at = largest(part)
    device = part.device
    begin_peak(device)
    seconds_to_create, model = timed(lambda: packed_llama(name, device), device)
    created = peak(device)
    packs = [packed_of(target.weight) for target in find_targets(model).values()]
    held = sum(pack.nbytes for pack in packs if pack is not None)
    checkpointed(model)
    data = random_tokens(model, 1, 32 if part.tiny else 2048, device)
    seft = SeftOptimizer(model, SeftConfig(**METHOD), lr=1e-4, max_grad_norm=1.0)
    found: dict[str, Any] = {
        "model": name,
        "looked_at": looked_at,
        "plan": plan,
        "seconds_to_create": seconds_to_create,
        "peak_of_creating": created,
        "bytes_packed": held,
        "steps": [],
    }

    def step() -> float:
        loss = model(**data).loss
        loss.backward()
        seft.step()
        seft.zero_grad()
        return float(loss.detach())

    for _ in range(METHOD["interval"]):
        begin_peak(device)
        seconds, loss = timed(step, device)
        report = seft.evolution
        phases = None if report is None else {key: phase.seconds for key, phase in report.phases.items()}
        found["steps"].append({"seconds": seconds, "loss": loss, "peak": peak(device), "evolution": phases})
        print(found["steps"][-1], flush=True)
    seft.check_last_step()
    usual = [row["seconds"] for row in found["steps"] if row["evolution"] is None]
    found["seconds"] = statistics.median(usual)
    found["evolution_step"] = found["steps"][-1]["seconds"]
    found["peak"] = max(row["peak"] for row in found["steps"])
    found["peak_reserved"] = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    found["deltas"] = len(seft.sparse_state.columns)
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in found["steps"]), "a loss is not finite"
    return found


def main() -> None:
    """Run the only case of this part."""
    part = Part(__doc__)
    part.case("the largest model on one card", lambda: train(part))
    part.end()


if __name__ == "__main__":
    main()
