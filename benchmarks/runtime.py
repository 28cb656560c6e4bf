"""Latency and size of a pruned model in CPU runtimes, as ratios to its dense original.

    python benchmarks/runtime.py --dense models/SmolLM2-135M-Instruct --pruned models/SmolLM2-135M-Instruct-wanda60 \\
      --work exports/bench --output exports/bench/runtime.json

Forward passes without a key-value cache are measured, of one token (which reads all weights once, as in generation) and
of a prompt. Dense and pruned model alternate, and ratios are those of the medians. "wall" is latency; "cpu" is the
processor time of the process, which with --threads 1 is the latency on an idle machine. Logits are compared with those
of the same model in torch, in float32. Exports that exist in --work are used again.
"""

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from seft_dist.config import DType, ModelConfig
from seft_dist.export.export import pack_model
from seft_dist.export.folders import folder_bytes
from seft_dist.export.runtime import Runner, compare_logits, export_onnx, export_openvino, open_onnx, open_openvino
from seft_dist.io.models import load_model
from seft_dist.io.source import Source, open_source

SHAPES = {"1 token": (1, 1), "32 tokens": (1, 32)}


def source_of(model: str, dtype: DType = "float32") -> Source:
    """Open a model on disk in a dtype."""
    return open_source(ModelConfig(path=model, dtype=dtype))


def torch_runner(model: str, dtype: DType) -> Runner:
    """Make a runner of a model in torch, as transformers runs it."""
    loaded = load_model(source_of(model, dtype)).eval()

    def run(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return loaded(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()

    return run


def exported(model: str, work: Path, kind: str) -> tuple[Path, int]:
    """Export a model if needed; returns its folder, and the bytes that the runtime reads."""
    folder = work / f"{Path(model).name}-{kind}"
    if not folder.exists():
        print(f"exporting {folder}", flush=True)
        source = source_of(model)
        if kind == "onnx":
            export_onnx(source, folder)
        elif kind.startswith("packed"):
            pack_model(source, folder, torch.bfloat16 if kind.endswith("bf16") else None)
        else:
            export_openvino(source, folder, "int8" if kind.endswith("int8") else "float32")
    patterns = {"onnx": "model.onnx*", "packed": "packed-*.safetensors"}
    return folder, folder_bytes(folder, patterns.get(kind.split("-")[0], "openvino_model.*"))


def variants(work: Path, threads: int) -> dict[str, Callable[[str], tuple[Runner, int]]]:
    """Functions from a model to its runner and the bytes of its files, by the name of the variant."""

    def in_torch(model: str, dtype: DType) -> tuple[Runner, int]:
        source = source_of(model)
        size = 4 if dtype == "float32" else 2
        return torch_runner(model, dtype), sum(info.numel * size for info in source.weights.tensors.values())

    def in_onnx(model: str) -> tuple[Runner, int]:
        folder, size = exported(model, work, "onnx")
        return open_onnx(folder, threads=threads), size

    def in_openvino(model: str, kind: str, precision: str, rate: float | None) -> tuple[Runner, int]:
        folder, size = exported(model, work, kind)
        return open_openvino(folder, threads=threads, precision=precision, sparse_rate=rate), size

    return {
        "torch, float32": lambda model: in_torch(model, "float32"),
        "torch, bfloat16": lambda model: in_torch(model, "bfloat16"),
        "ONNX Runtime, float32": in_onnx,
        "OpenVINO, float32": lambda model: in_openvino(model, "openvino", "f32", None),
        "OpenVINO, float32, sparse rate 0.5": lambda model: in_openvino(model, "openvino", "f32", 0.5),
        "OpenVINO, bfloat16": lambda model: in_openvino(model, "openvino", "bf16", None),
        "OpenVINO, int8": lambda model: in_openvino(model, "openvino-int8", "f32", None),
        "OpenVINO, int8, sparse rate 0.5": lambda model: in_openvino(model, "openvino-int8", "f32", 0.5),
    }


def latencies(runners: dict[str, Runner], shape: tuple[int, int], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Measure the models alternately; returns durations in seconds by clock and model."""
    ids = torch.randint(0, 1000, shape, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    times: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in runners} for clock in ("wall", "cpu")}
    for i in range(rounds + 1):
        for name in list(runners)[:: 1 if i % 2 else -1]:
            wall, cpu = time.perf_counter(), time.process_time()
            runners[name](ids, mask)
            if i:  # the first run is for warming up
                times["wall"][name].append(time.perf_counter() - wall)
                times["cpu"][name].append(time.process_time() - cpu)
    return times


def measure(
    name: str, make: Callable[[str], tuple[Runner, int]], models: dict[str, str], rounds: int, reference: Any
) -> dict[str, Any]:
    """Measure dense and pruned model in one runtime; ``reference`` is the pruned model in torch, in float32."""
    made = {key: make(path) for key, path in models.items()}
    row: dict[str, Any] = {"what": name, "bytes": {key: size for key, (_, size) in made.items()}}
    for title, shape in SHAPES.items():
        row[title] = {}
        times = latencies({key: runner for key, (runner, _) in made.items()}, shape, rounds)
        for clock, found in times.items():
            medians = {key: statistics.median(values) for key, values in found.items()}
            row[title][clock] = {"median": medians, "ratio": medians["pruned"] / medians["dense"], "seconds": found}
    report = compare_logits(reference, made["pruned"][0], 0)
    row["logits"] = {"difference": report.max_difference, "largest": report.largest_logit, "same": report.same_choice}
    return row


def print_row(row: dict[str, Any]) -> None:
    """Print one line of the tables in docs/exports.md."""
    cells = [row["what"]]
    for title in SHAPES:
        for clock in ("cpu", "wall"):
            found = row[title][clock]
            medians = found["median"]
            cells.append(f"{1e3 * medians['dense']:.0f} / {1e3 * medians['pruned']:.0f}, {found['ratio']:.2f}")
    cells.append(f"{row['bytes']['dense'] / 1e6:.0f} / {row['bytes']['pruned'] / 1e6:.0f}")
    cells.append(
        f"{row['logits']['difference']:.2g} of {row['logits']['largest']:.0f}, {100 * row['logits']['same']:.0f} %"
    )
    print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", required=True)
    parser.add_argument("--pruned", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="measure only what has this in its name")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    models = {"dense": options.dense, "pruned": options.pruned}
    versions = {name: version(name) for name in ("torch", "transformers", "openvino", "onnxruntime")}
    print(f"{platform.platform()}, {options.threads} threads, {versions}")
    for kind in ("packed", "packed-bf16"):
        sizes = [exported(model, options.work, kind)[1] for model in models.values()]
        print(f"{kind}: {sizes[0] / 1e6:.1f} / {sizes[1] / 1e6:.1f} MB, {sizes[1] / sizes[0]:.3f}")
    rows = []
    reference = load_model(source_of(options.pruned)).eval()
    for name, make in variants(options.work, options.threads).items():
        if options.only in name:
            rows.append(measure(name, make, models, options.rounds, reference))
            print_row(rows[-1])
            gc.collect()
    if options.output is not None:
        options.output.write_text(json.dumps({"versions": versions, "threads": options.threads, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
