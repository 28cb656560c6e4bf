"""Plans of `seft plan` for one card, for comparison with the measurements of benchmarks/gpu.py."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import torch
from gpu_models import content_of

from seft_dist.config import ClusterConfig, PlanConfig
from seft_dist.planning.hardware import GPUS, Rates, gpu_rates
from seft_dist.planning.plan import ClusterPlan, estimate, make_plan


def sheet_of(device: torch.device) -> ClusterConfig:
    """Describe the card by the data sheet with the nearest name (an H100's if unknown) and the memory that is free.

    Other processes may hold a part of the card. What this process holds counts as free: it is given back.
    """
    if device.type != "cuda":
        return ClusterConfig(nodes=1, gpus_per_node=1)
    free, memory = torch.cuda.mem_get_info(device)
    name = torch.cuda.get_device_name(device)
    kinds = [kind for kind in GPUS if kind.split("-")[0] in name]
    kind = min(kinds or ["H100-80GB"], key=lambda kind: abs(GPUS[kind].memory - memory))
    usable = free + torch.cuda.memory_reserved(device)
    return ClusterConfig(gpu=kind, nodes=1, gpus_per_node=1, memory_gb=usable / 1e9)


@functools.cache
def traced(folder: Path, name: str, sequences: int, tokens: int, checkpoint: bool) -> ClusterPlan:
    """Make a plan whose costs of a pass serve every method, density and rate of this model and batch.

    Tracing the passes takes most of a plan's time. The device has any amount of memory here, so that no advice is
    sought for a model that does not fit.
    """
    file = folder / f"{name}.json"
    file.write_text(json.dumps(content_of(name), indent=1) + "\n")
    config = PlanConfig(
        model=str(file),
        batch_size=sequences,
        seq_len=tokens,
        activation_checkpointing=checkpoint,
        global_batch=None,
        cluster=ClusterConfig(nodes=1, gpus_per_node=1, memory_gb=1e6),
    )
    return make_plan(config)


def planned(
    folder: Path, name: str, config: PlanConfig, packing: str, rates: Rates | None = None, method: str = "SEFT"
) -> dict[str, Any]:
    """Plan one case; returns bytes and seconds.

    Args:
        folder: Folder for the model's config.json.
        name: Name of the model's shape.
        config: Training settings and cluster, whatever its model.
        packing: Packing of the weights.
        rates: Measured rates; None: those of the data sheet.
        method: "SEFT", "LoRA" or "full".
    """
    base = traced(folder, name, config.batch_size, config.seq_len, config.activation_checkpointing)
    rates = rates or gpu_rates(config.cluster, config.dtype, config.seft.density)
    plan = dataclasses.replace(base, config=dataclasses.replace(config, model=base.config.model), rates=rates)
    chosen = estimate(plan, "single", 1, method, packing=packing)  # type: ignore[arg-type]
    memory, time = chosen.memory, chosen.time
    return {
        "device": plan.rates.name,
        "bytes": memory.total,
        "bytes_of_device": rates.memory,
        "bytes_of_tensors": memory.tensors,
        "phase": memory.worst,
        "terms": memory.terms(),
        "fits": chosen.fits,
        "seconds": time.seconds,
        "seconds_of": time.step,
        "evolution_step": time.seconds + time.window + time.evolution,
    }
