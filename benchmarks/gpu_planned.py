"""Plans of `seft plan` for one card, for comparison with the measurements of benchmarks/gpu.py."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from seft_dist.config import ClusterConfig, PlanConfig
from seft_dist.planning.hardware import GPUS, Rates
from seft_dist.planning.plan import estimate, make_plan


def sheet_of(device: torch.device) -> ClusterConfig:
    """Describe the card by the data sheet with the nearest name (an H100's if unknown) and its actual memory."""
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
    """Plan one case; returns bytes and seconds.

    Args:
        folder: Folder for the model's config.json.
        name: Name of the model.
        content: Content of its config.json.
        config: Training settings and cluster; its model is that file.
        packing: Packing of the weights.
        rates: Measured rates; None: those of the data sheet.
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
