"""Write a model in another form, e.g. packed, as a delta file or for a CPU runtime.

    seft export hf --run runs/r1 --output exports/r1                # plain Hugging Face folder with a model card
    seft export pack --model exports/r1 --output exports/r1-packed
    seft export unpack --model exports/r1-packed --output exports/r1-again
    seft export plain --model models/fp8 --output models/plain      # from quantized to plain weights
    seft export card --model runs/r1/model --run runs/r1            # README.md with method, recipe and results
    seft export delta apply --base models/pruned --delta runs/r1/delta.safetensors --output models/repaired
    seft export delta remove --model models/repaired --delta runs/r1/delta.safetensors --output models/pruned-again
    seft export delta inspect --delta runs/r1/delta.safetensors
    seft export delta make --base models/pruned --model models/repaired --output delta.safetensors
    seft export check --model exports/r1 --pattern 2:4
    seft export openvino --model exports/r1 --output exports/r1-openvino
    seft export onnx --model exports/r1 --output exports/r1-onnx

docs/exports.md describes each form. An --output that exists is refused.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from seft_dist.config import DType
from seft_dist.session.cli import call
from seft_dist.session.cli import run as run_command

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from seft_dist.export.runtime import RuntimeReport
    from seft_dist.io.source import Source


def hf(
    output: Path,
    run: Path | None = None,
    model: str | None = None,
    dtype: DType = "auto",
    shard_gb: float = 5.0,
    base_model: str | None = None,
) -> None:
    """Write a plain Hugging Face folder, zeros stored, in files of limited size, with a model card.

    Args:
        output: Folder to make; it must not exist.
        run: Folder of a finished run: its model is exported and its records go into the card.
        model: Folder or hub name of the model instead; with --run, of that run's model.
        dtype: Type of the weights; "auto": as they are.
        shard_gb: Largest file, in 10^9 bytes.
        base_model: Hub name for the card; by default what the run's files say.
    """
    from seft_dist.export.card import write_card
    from seft_dist.export.export import write_model

    if run is None and model is None:
        raise ValueError("nothing to export: needs --run or --model")
    source = _open(model or str(_model_of(run)))
    finish = lambda folder: write_card(folder, source, run, base_model)  # noqa: E731
    write_model(source, output, _dtype(dtype), _bytes(shard_gb), finish=finish)
    print(f"The model is in {output}; its card is README.md")


def pack(model: str, output: Path, run: Path | None = None, dtype: DType = "auto", shard_gb: float = 5.0) -> None:
    """Write the packed form: one bit for each position, and the values of those that are not 0.

    Args:
        model: Folder or hub name of the model.
        output: Folder to make; it must not exist.
        run: Folder of the run that made the model, for the card.
        dtype: Type of the weights; "auto": as they are, every bit.
        shard_gb: Largest file, in 10^9 bytes.
    """
    from seft_dist.export.card import write_card
    from seft_dist.export.export import pack_model

    source = _open(model)
    finish = lambda folder: write_card(folder, source, run)  # noqa: E731
    size = pack_model(source, output, _dtype(dtype), _bytes(shard_gb), finish=finish)
    share = size.packed_bytes / size.dense_bytes if size.dense_bytes else 1.0
    print(
        f"{output}: {size.packed_bytes:,} bytes instead of {size.dense_bytes:,} ({100 * share:.1f} %); "
        f"{size.bytes_a_weight:.3f} bytes a weight in the {size.sparse_weights:,} weights for which packing pays"
    )


def plain(model: str, output: Path, dtype: Literal["float32", "bfloat16"] = "bfloat16", shard_gb: float = 5.0) -> None:
    """Write a quantized model that transformers can unpack (FP8, compressed-tensors, MXFP4, GGUF) as a plain folder.

    Args:
        model: Folder or hub name of the model, or a .gguf file; all of it is held in memory.
        output: Folder to make; it must not exist.
        dtype: Type of the weights.
        shard_gb: Largest file, in 10^9 bytes.
    """
    from seft_dist.export.convert import convert

    chosen = _dtype(dtype)
    assert chosen is not None
    convert(model, output, chosen, _bytes(shard_gb))
    print(f"The model is in {output}")


def unpack(model: str, output: Path, shard_gb: float = 5.0) -> None:
    """Write a packed model as a plain Hugging Face folder again, every bit as it was.

    Args:
        model: Folder of the packed model.
        output: Folder to make; it must not exist.
        shard_gb: Largest file, in 10^9 bytes.
    """
    from seft_dist.export.export import write_model
    from seft_dist.io.packed import PackedFiles

    source = _open(model)
    if not isinstance(source.weights, PackedFiles):
        raise ValueError(f"{model} is not packed: needs a folder made by seft export pack")
    write_model(source, output, None, _bytes(shard_gb))
    print(f"The model is in {output}")


def card(model: str, run: Path | None = None, base_model: str | None = None) -> None:
    """Write the model card (README.md) into a model's folder, in place of the one that is there.

    Args:
        model: The folder.
        run: Folder of the run that made it.
        base_model: Hub name for the card; by default what the run's files say.
    """
    from seft_dist.export.card import write_card

    if not Path(model).is_dir():
        raise ValueError(f"model={model} is not a folder: needs the folder of a model")
    write_card(Path(model), _open(model), run, base_model)
    print(f"The card is {Path(model) / 'README.md'}")


def apply(base: str, delta: Path, output: Path) -> None:
    """Make the repaired model from the pruned one and the delta file of a run, bit for bit as it was trained.

    Args:
        base: The pruned model's folder or hub name: model.path of the run.
        delta: delta.safetensors of the run.
        output: Folder to make; it must not exist.
    """
    from seft_dist.export.delta import apply_delta

    apply_delta(_open(base), delta, output)
    print(f"The repaired model is in {output}")


def remove(model: str, delta: Path, output: Path) -> None:
    """Make the pruned model from the repaired one and its delta file, bit for bit in the repaired model's type.

    Args:
        model: The repaired model's folder or hub name.
        delta: The file that was applied.
        output: Folder to make; it must not exist.
    """
    from seft_dist.export.delta import remove_delta

    remove_delta(_open(model), delta, output)
    print(f"The pruned model is in {output}")


def inspect(delta: Path) -> None:
    """Show what a delta file changes: layers, entries, reactivated and pruned ones, and which models it belongs to.

    Args:
        delta: The file.
    """
    from seft_dist.export.delta import delta_table, read_delta

    _print(delta_table(read_delta(delta)))


def make(base: str, model: str, output: Path) -> None:
    """Write the delta file between two models on disk.

    Args:
        base: The pruned model's folder or hub name.
        model: The repaired model's folder or hub name.
        output: File to make; it must not exist.
    """
    from seft_dist.export.delta import delta_table, make_delta, read_delta

    make_delta(_open(base), _open(model, "auto"), output)
    _print(delta_table(read_delta(output)))


def check(model: str, pattern: str = "2:4", targets: str = "all-linear") -> None:
    """Check that a model keeps an N:M pattern; exit status 2 if it does not.

    Args:
        model: Folder or hub name of the model, plain or packed.
        pattern: N:M.
        targets: Linears to check, chosen as by seft.targets.
    """
    from seft_dist.export.semi_structured import check_groups_kept, count_groups, pattern_table

    counts = count_groups(_open(model), pattern, targets)
    _print(pattern_table(counts, pattern))
    check_groups_kept(counts, pattern)


def openvino(model: str, output: Path, weights: Literal["float32", "float16", "int8"] = "float32") -> None:
    """Export for OpenVINO, run it and compare its logits with torch's.

    Args:
        model: Folder or hub name of the model, plain or packed.
        output: Folder to make; it must not exist.
        weights: Format in which weights are stored.
    """
    from seft_dist.export.runtime import export_openvino

    _report(output, export_openvino(_open(model), output, weights))


def onnx(model: str, output: Path) -> None:
    """Export as ONNX, run it in ONNX Runtime and compare its logits with torch's.

    Args:
        model: Folder or hub name of the model, plain or packed.
        output: Folder to make; it must not exist.
    """
    from seft_dist.export.runtime import export_onnx

    _report(output, export_onnx(_open(model), output))


def _open(model: str, dtype: DType = "float32") -> "Source":
    """Open a model that is computed with in ``dtype``; exports that only copy weights read them as they are stored."""
    from seft_dist.config import ModelConfig
    from seft_dist.io.source import open_source

    return open_source(ModelConfig(path=model, dtype=dtype))


def _model_of(run: Path | None) -> Path:
    assert run is not None
    if not (run / "model").is_dir():
        raise ValueError(f"{run} has no model: needs the folder of a finished run of seft train with export: true")
    return run / "model"


def _dtype(name: DType) -> "torch.dtype | None":
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(name)


def _bytes(shard_gb: float) -> int:
    if not 0 < shard_gb <= 1e6:  # also false for nan
        raise ValueError(f"shard_gb={shard_gb}: needs a size above 0 and at most 1e6, in 10^9 bytes")
    return max(1, int(shard_gb * 1e9))


def _print(table: "Table") -> None:
    from rich.console import Console

    Console().print(table)


def _report(output: Path, report: "RuntimeReport") -> None:
    print(
        f"{output}: {report.bytes:,} bytes; logits differ from torch's by at most {report.max_difference:.2g} (largest "
        f"{report.largest_logit:.3g}), the most likely token is the same at {100 * report.same_choice:.1f} % of "
        "positions"
    )


ACTIONS: Any = {
    "hf": hf,
    "pack": pack,
    "unpack": unpack,
    "plain": plain,
    "card": card,
    "delta": {
        "_help": "Delta files: apply, remove, inspect or make the difference between pruned and repaired model.",
        "apply": apply,
        "remove": remove,
        "inspect": inspect,
        "make": make,
    },
    "check": check,
    "openvino": openvino,
    "onnx": onnx,
}


def main() -> None:
    """Export as the command line says."""
    run_command(_export)


def _export() -> None:
    arguments = sys.argv[1:]
    # Before the command had actions it only applied delta files, with these options: such calls still work.
    if arguments and arguments[0].split("=")[0] in ("--base", "--delta", "--output"):
        arguments = ["delta", "apply", *arguments]
    call(ACTIONS, __doc__, arguments, as_positional=False)
