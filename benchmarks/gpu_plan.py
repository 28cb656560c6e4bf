"""Plans of the measured cases, by measured rates and by the card's data sheet; part of benchmarks/gpu.py.

    python benchmarks/gpu_plan.py --result DIR/plan.json

It measures the card's rates, writes them to DIR/gpu_rates.json (for `seft plan --cluster.gpu DIR/gpu_rates.json`), and
plans every case in DIR/step.json and DIR/70b.json.
"""

import dataclasses
import functools
import json
from typing import Any

import gpu_70b
from gpu_common import Part
from gpu_models import SPARSITY
from gpu_planned import planned, sheet_of

from seft_dist.config import ClusterConfig, PlanConfig, SeftConfig
from seft_dist.planning.hardware import GPUS, Rates, gpu_rates, write_rates
from seft_dist.planning.rates import ProblemSizes, measure_computation, measure_gpu

PLANNED = {"seft": "SEFT", "packed": "SEFT", "lora": "LoRA", "full": "full"}


def measured_rates(part: Part, found: dict[str, Rates]) -> dict[str, Any]:
    """Measure the card's rates for both dtypes, and their ratios to the data sheet."""
    for dtype in ("float32", "bfloat16"):
        if part.device.type == "cuda":
            found[dtype] = measure_gpu(dtype)
        else:
            computed = measure_computation(dtype, part.device, ProblemSizes((16, 64, 96), 32, 1 << 12, 1 << 8))
            found[dtype] = dataclasses.replace(gpu_rates(ClusterConfig(), dtype, 0.01), **computed, measured=True)
    write_rates(str(part.folder / "gpu_rates.json"), found)
    rates, sheet = found["bfloat16"], sheet_of(part.device)
    gpu = GPUS[sheet.gpu]
    return {
        "rates": {dtype: dataclasses.asdict(one) for dtype, one in found.items()},
        "data_sheet": sheet.gpu,
        "mfu_of_products": rates.matmul / gpu.bfloat16,
        "attention_share": rates.attention / gpu.bfloat16,
        "sampled_share": 0.01 * rates.dense / rates.sampled,
        "bandwidth_share": None if rates.moved is None else rates.moved / gpu.bandwidth,
        "decode_share": rates.decode / gpu.bandwidth,
        "host_share": rates.host / gpu.host,
    }


def cases_of(part: Part, name: str) -> list[dict[str, Any]]:
    """Read the rows of another part that can be planned: those measured, and those that did not fit.

    None if it did not run. A row that was stopped or failed later is planned too if it has a duration.
    """
    file = part.folder / f"{name}.json"
    rows = json.loads(file.read_text())["rows"] if file.is_file() else []
    return [row for row in rows if row["status"] == "does not fit" or "seconds" in row]


def compare_step(part: Part, row: dict[str, Any], rates: Rates) -> dict[str, Any]:
    """Plan a case of the part "step"."""
    seft = {"density": row.get("density") or 0.01, "interval": 6, "window": 1, "steps": 60}
    plan = PlanConfig(
        model="later",
        sparsity=SPARSITY,
        activation_checkpointing=row["checkpoint"],
        batch_size=row["sequences"],
        seq_len=row["tokens"],
        global_batch=None,
        steps=60,
        seft=SeftConfig(**seft),
        cluster=sheet_of(part.device),
    )
    packing = "resident" if row["method"] == "packed" else "none"
    return both(part, row, plan, packing, rates, PLANNED[row["method"]])


def compare_largest(part: Part, row: dict[str, Any], rates: Rates) -> dict[str, Any]:
    """Plan a case of the part "70b"."""
    return both(part, row, gpu_70b.plan_of(part), "resident", rates, "SEFT")


def both(part: Part, row: dict[str, Any], plan: PlanConfig, packing: str, rates: Rates, method: str) -> dict[str, Any]:
    """Plan by the data sheet and by measured rates, as ratios to the measured values."""
    by_sheet = planned(part.folder, row["model"], plan, packing, None, method)
    found: dict[str, Any] = {"planned_bytes": by_sheet["bytes"], "bytes_of_device": by_sheet["bytes_of_device"]}
    found |= {"planned_bytes_of_tensors": by_sheet["bytes_of_tensors"], "phase": by_sheet["phase"]}
    if "seconds" not in row:
        return found | {"measured": "does not fit"}
    says = {
        "data sheet": by_sheet,
        "measured rates": planned(part.folder, row["model"], plan, packing, rates, method),
    }
    found |= {key: row[key] for key in ("seconds", "peak", "evolution_step", "evolution_peak") if key in row}
    highest = max(row["peak"], row.get("evolution_peak", 0))
    found["memory_ratio"] = found["planned_bytes_of_tensors"] / highest
    for name, plan_says in says.items():
        found[f"seconds by {name}"] = plan_says["seconds"]
        found[f"ratio by {name}"] = plan_says["seconds"] / row["seconds"]
        if "evolution_step" in row:
            found[f"evolution by {name}"] = plan_says["evolution_step"]
    return found


def main() -> None:
    """Measure the rates, then plan every case, the largest model first."""
    part = Part(__doc__)
    rates: dict[str, Rates] = {}
    part.case("rates of the device", lambda: measured_rates(part, rates))
    cases = [(row, compare_largest) for row in cases_of(part, "70b")]
    cases += [(row, compare_step) for row in cases_of(part, "step") if row.get("method") in PLANNED]
    if not cases:
        part.missing("cases", "neither step.json nor 70b.json with a case to plan is beside the result")
    for row, compare in cases:
        if "bfloat16" in rates:
            part.case(row["case"], functools.partial(compare, part, row, rates["bfloat16"]))
    part.end()


if __name__ == "__main__":
    main()
