"""What launch/plan.py says of one card, for the parts of benchmarks/gpu.py that set it beside what they measured."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from seft_dist.config import ClusterConfig, PlanConfig
from seft_dist.planning.hardware import GPUS, Rates
from seft_dist.planning.plan import estimate, make_plan


def sheet_of(device: torch.device) -> ClusterConfig:
    """One card by the data sheet that fits its name best, with the memory it has; an H100's for a card that is not known."""
    if device.type != "cuda":
        return ClusterConfig(nodes=1, gpus_per_node=1)
    memory = torch.cuda.mem_get_info(device)[1]
    name = torch.cuda.get_device_name(device)
    kinds = [kind for kind in GPUS if kind.split("-")[0] in name]
    kind = min(kinds or ["H100-80GB"], key=lambda kind: abs(GPUS[kind].memory - memory))
    return ClusterConfig(gpu=kind, nodes=1, gpus_per_node=1, memory_gb=memory / 1e9)


def planned(
    folder: Path,
    name: str,
    content: dict[str, Any],
    config: PlanConfig,
    packing: str,
    rates: Rates | None = None,
    method: str = "SEFT",
) -> dict[str, Any]:
    """Bytes and seconds that a plan says.

    Args:
        folder: Where the model's config.json is written.
        name: Of the model.
        content: Of its config.json.
        config: Recipe and cluster; its model is that file.
        packing: Of the weights at rest.
        rates: Measured ones; None: by the data sheet.
        method: "SEFT", "LoRA" or "full".
    """
    file = folder / f"{name}.json"
    file.write_text(json.dumps(content, indent=1) + "\n")
    plan = make_plan(dataclasses.replace(config, model=str(file)), rates)
    chosen = estimate(plan, "single", 1, method, packing=packing)  # type: ignore[arg-type]
    memory, time = chosen.memory, chosen.time
    return {
        "device": plan.rates.name,
        "bytes": memory.total,
        "bytes_of_tensors": memory.tensors,
        "phase": memory.worst,
        "terms": memory.terms(),
        "fits": chosen.fits,
        "seconds": time.seconds,
        "seconds_of": time.step,
        "evolution_step": time.seconds + time.window + time.evolution,
    }
