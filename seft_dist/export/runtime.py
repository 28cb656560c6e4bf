"""A model for CPU runtimes, OpenVINO and ONNX Runtime: exported, then run and compared with torch before it is kept.

One forward pass without a key-value cache: input_ids and attention_mask [batch, tokens], int64, padding on the right, give
logits [batch, tokens, vocabulary], fp32. Batch and tokens may be of any size. Needs ``pip install seft_dist[runtime]``.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from seft_dist.export.folders import folder_bytes, new_folder, save_settings
from seft_dist.io.models import load_model
from seft_dist.io.source import Source

OPENVINO_FILE, ONNX_FILE = "openvino_model.xml", "model.onnx"
MAX_DIFFERENCE = 1e-3
"""Largest difference of float32 logits that is accepted, as a share of the largest logit."""
Weight = Literal["float32", "float16", "int8"]
Runner = Callable[[Tensor, Tensor], Tensor]
"""input_ids and attention_mask to logits."""


@dataclass(frozen=True)
class RuntimeReport:
    """An exported model against torch's in float32, on the same tokens."""

    bytes: int
    """Of the files that the runtime reads."""
    max_difference: float
    """Largest absolute difference of a logit."""
    largest_logit: float
    """Largest absolute logit of torch's."""
    same_choice: float
    """Share of positions at which the most likely token is the same."""


def export_openvino(source: Source, output: Path, weights: Weight = "float32") -> RuntimeReport:
    """Write a model for OpenVINO, run it and compare its logits.

    Args:
        source: The model, plain or packed; it is computed in float32.
        output: Folder to make; it must not exist.
        weights: How weights are stored. "int8": those of all linears as 8-bit numbers with one scale for each output (a
            zero stays exactly 0), the rest as float32.

    Returns:
        The comparison.

    Raises:
        ValueError: OpenVINO is not installed, or the exported model computes something else; nothing is left behind.
    """
    ov = _load("openvino")
    model = load_model(source).eval()
    with new_folder(output) as folder:
        made = ov.convert_model(_trace(model))
        for node, name in zip(made.inputs, ("input_ids", "attention_mask"), strict=True):
            node.get_tensor().set_names({name})
        made.outputs[0].get_tensor().set_names({"logits"})
        if weights == "int8":
            _to_int8(made)
        ov.save_model(made, folder / OPENVINO_FILE, compress_to_fp16=weights == "float16")
        del made
        save_settings(folder, source, None)
        report = compare(model, open_openvino(folder), folder_bytes(folder, "openvino_model.*"))
        _accept(report, weights == "float32")
    return report


def export_onnx(source: Source, output: Path) -> RuntimeReport:
    """Write a model as ONNX, run it in ONNX Runtime and compare its logits.

    Args:
        source: The model, plain or packed; it is computed and stored in float32.
        output: Folder to make; it must not exist.

    Returns:
        The comparison.

    Raises:
        ValueError: A package is missing, or the exported model computes something else; nothing is left behind.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        _load(name)
    model = load_model(source).eval()
    with new_folder(output) as folder:
        program = torch.onnx.export(
            _trace(model), dynamo=True, verbose=False, input_names=list(_NAMES), output_names=["logits"]
        )
        assert program is not None
        program.save(folder / ONNX_FILE, external_data=True)
        del program
        save_settings(folder, source, None)
        report = compare(model, open_onnx(folder), folder_bytes(folder, "model.onnx*"))
        _accept(report, True)
    return report


def open_openvino(
    folder: Path, *, threads: int | None = None, precision: str = "f32", sparse_rate: float | None = None
) -> Runner:
    """Load an exported model in OpenVINO.

    Args:
        folder: From ``export_openvino``.
        threads: CPU threads; None: OpenVINO's choice.
        precision: Type in which it computes: "f32" or "bf16".
        sparse_rate: OpenVINO keeps weights with at least this share of zeros compressed, where the CPU plugin can (int8
            weights and activations on CPUs with AMX); None: never.

    Raises:
        ValueError: OpenVINO is not installed, or there is no such model.
    """
    ov = _load("openvino")
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    if sparse_rate is not None:
        options["CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"] = sparse_rate
    try:
        compiled = ov.Core().compile_model(_present(folder, OPENVINO_FILE), "CPU", options)
    except RuntimeError as error:
        raise ValueError(
            f"{folder / OPENVINO_FILE} cannot be loaded by OpenVINO ({_first(error)}): export it again"
        ) from error

    def run(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.from_numpy(compiled([input_ids.numpy(), attention_mask.numpy()])[0])

    return run


def open_onnx(folder: Path, *, threads: int | None = None) -> Runner:
    """Load an exported model in ONNX Runtime.

    Args:
        folder: From ``export_onnx``.
        threads: CPU threads; None: ONNX Runtime's choice.

    Raises:
        ValueError: ONNX Runtime is not installed, or there is no such model.
    """
    ort = _load("onnxruntime")
    options = ort.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    file = _present(folder, ONNX_FILE)
    try:
        session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common public type
        raise ValueError(f"{file} cannot be loaded by ONNX Runtime ({_first(error)}): export it again") from error

    def run(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        values = (input_ids.numpy(), attention_mask.numpy())
        return torch.from_numpy(session.run(None, dict(zip(_NAMES, values, strict=True)))[0])

    return run


@torch.no_grad()
def compare(model: nn.Module, run: Runner, size: int) -> RuntimeReport:
    """Run torch's model and an exported one on the same tokens, of several shapes, padded ones among them.

    Args:
        model: The causal LM that was exported.
        run: The exported model.
        size: Bytes of the exported files.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    worst = largest = 0.0
    same = total = 0
    for batch, tokens, padding in ((1, 1, 0), (1, 24, 0), (3, 17, 5)):
        ids = torch.randint(0, vocabulary, (batch, tokens), generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, tokens - padding :] = 0
        seen = mask.bool()
        wanted, found = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[seen], run(ids, mask)[seen]
        # max() of torch passes NaN on, that of Python may not
        worst = float(torch.tensor([worst, float((found - wanted).abs().max())]).max())
        largest = max(largest, float(wanted.abs().max()))
        same += int((found.argmax(-1) == wanted.argmax(-1)).sum())
        total += int(seen.sum())
    return RuntimeReport(size, worst, largest, same / total)


_NAMES = ("input_ids", "attention_mask")


class _Logits(nn.Module):
    """A causal LM as a function of two tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


def _trace(model: nn.Module) -> torch.export.ExportedProgram:
    ids = torch.ones(2, 16, dtype=torch.int64)
    free = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    with torch.no_grad(), _quiet():
        return torch.export.export(_Logits(model).eval(), (ids, torch.ones_like(ids)), dynamic_shapes=(free, free))


def _to_int8(made: Any) -> None:
    """Store the weights of all matrix products with 8 bits, as constant, conversion and scale."""
    ops = import_module("openvino.opset13")
    for node in made.get_ops():
        if node.get_type_name() != "MatMul" or node.input_value(1).get_node().get_type_name() != "Constant":
            continue
        value = torch.from_numpy(node.input_value(1).get_node().get_data().copy())
        if value.dim() != 2 or value.dtype != torch.float32:
            continue
        inputs = 1 if node.get_attributes()["transpose_b"] else 0
        scale = value.abs().amax(inputs, keepdim=True) / 127
        scale[scale == 0] = 1
        small = (value / scale).round().to(torch.int8)
        whole = ops.multiply(ops.convert(ops.constant(small.numpy()), "f32"), ops.constant(scale.numpy()))
        node.input(1).replace_source_output(whole.output(0))


def _accept(report: RuntimeReport, exact: bool) -> None:
    limit = MAX_DIFFERENCE * report.largest_logit if exact else float("inf")
    if not report.max_difference <= limit or report.max_difference == float("inf"):
        raise ValueError(
            f"the exported model's logits differ from torch's by {report.max_difference} (largest logit "
            f"{report.largest_logit}): it was not kept; needs a model that torch.export captures"
        )


def _load(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(
            f"this export needs {name}, which is not installed: pip install 'seft_dist[runtime]'"
        ) from error


def _present(folder: Path, name: str) -> str:
    if not (folder / name).is_file():
        raise ValueError(f"{folder} has no {name}: needs a folder made by launch/export.py openvino or onnx")
    return str(folder / name)


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks about packages that are not needed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
