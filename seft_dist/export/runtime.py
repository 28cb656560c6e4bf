"""Export for the CPU runtimes OpenVINO and ONNX Runtime. An export is kept only if its logits agree with torch's.

The exported function is a forward pass without a key-value cache, from input_ids and attention_mask (int64
[batch, tokens], padded on the right) to logits (fp32 [batch, tokens, vocabulary]). Batch and tokens may be of any size.
It needs ``pip install seft_dist[runtime]``.
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
from seft_dist.session.extras import install_line

OPENVINO_FILE, ONNX_FILE = "openvino_model.xml", "model.onnx"
MAX_DIFFERENCE = 1e-3
"""Largest accepted difference of float32 logits, as a share of the largest logit."""
WeightFormat = Literal["float32", "float16", "int8"]
Runner = Callable[[Tensor, Tensor], Tensor]
"""Function from input_ids and attention_mask to logits."""


@dataclass(frozen=True)
class RuntimeReport:
    """Comparison of an exported model with torch's model in float32, on the same tokens."""

    bytes: int
    """Size of the files that the runtime reads."""
    max_difference: float
    """Largest absolute difference of a logit."""
    largest_logit: float
    """Largest absolute value of torch's logits."""
    same_choice: float
    """Share of positions at which both models give the highest logit to the same token."""


def export_openvino(source: Source, output: Path, weights: WeightFormat = "float32") -> RuntimeReport:
    """Write a model for OpenVINO, run it and compare its logits.

    Args:
        source: The model, plain or packed; it is computed in float32.
        output: Folder to create; it must not exist.
        weights: Format in which weights are stored. "int8": the weights of all linears as 8-bit numbers with one scale
            for each output, so that a zero stays exactly 0, and everything else as float32.

    Returns:
        The comparison.

    Raises:
        ValueError: OpenVINO is not installed, or the logits of the exported model differ. No files are left behind.
    """
    ov = _import_package("openvino")
    model = load_model(source).eval()
    with new_folder(output) as folder:
        exported = ov.convert_model(_trace(model))
        for node, name in zip(exported.inputs, ("input_ids", "attention_mask"), strict=True):
            node.get_tensor().set_names({name})
        exported.outputs[0].get_tensor().set_names({"logits"})
        if weights == "int8":
            _to_int8(exported)
        ov.save_model(exported, folder / OPENVINO_FILE, compress_to_fp16=weights == "float16")
        del exported
        save_settings(folder, source, None)
        report = compare_logits(model, open_openvino(folder), folder_bytes(folder, "openvino_model.*"))
        _check_difference(report, weights == "float32")
    return report


def export_onnx(source: Source, output: Path) -> RuntimeReport:
    """Write a model as ONNX, run it in ONNX Runtime and compare its logits.

    Args:
        source: The model, plain or packed; it is computed and stored in float32.
        output: Folder to create; it must not exist.

    Returns:
        The comparison.

    Raises:
        ValueError: A package is missing, or the logits of the exported model differ. No files are left behind.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        _import_package(name)
    model = load_model(source).eval()
    with new_folder(output) as folder:
        program = torch.onnx.export(
            _trace(model), dynamo=True, verbose=False, input_names=list(_NAMES), output_names=["logits"]
        )
        assert program is not None
        program.save(folder / ONNX_FILE, external_data=True)
        del program
        save_settings(folder, source, None)
        report = compare_logits(model, open_onnx(folder), folder_bytes(folder, "model.onnx*"))
        _check_difference(report, True)
    return report


def open_openvino(
    folder: Path, *, threads: int | None = None, precision: str = "f32", sparse_rate: float | None = None
) -> Runner:
    """Load an exported model in OpenVINO.

    Args:
        folder: Folder written by ``export_openvino``.
        threads: Number of CPU threads; None: OpenVINO's default.
        precision: Dtype of the computation, "f32" or "bf16".
        sparse_rate: Share of zeros from which OpenVINO keeps weights compressed, if the CPU plugin supports it (int8
            weights and activations on CPUs with AMX); None: never.

    Raises:
        ValueError: OpenVINO is not installed, or there is no such model.
    """
    ov = _import_package("openvino")
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    if sparse_rate is not None:
        options["CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"] = sparse_rate
    try:
        compiled = ov.Core().compile_model(_existing(folder, OPENVINO_FILE), "CPU", options)
    except RuntimeError as error:
        raise ValueError(
            f"{folder / OPENVINO_FILE} cannot be loaded by OpenVINO ({_last_line(error)}): export it again"
        ) from error

    def run(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.from_numpy(compiled([input_ids.numpy(), attention_mask.numpy()])[0])

    return run


def open_onnx(folder: Path, *, threads: int | None = None) -> Runner:
    """Load an exported model in ONNX Runtime.

    Args:
        folder: Folder written by ``export_onnx``.
        threads: Number of CPU threads; None: ONNX Runtime's default.

    Raises:
        ValueError: ONNX Runtime is not installed, or there is no such model.
    """
    ort = _import_package("onnxruntime")
    options = ort.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    file = _existing(folder, ONNX_FILE)
    try:
        session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors have no common public type
        raise ValueError(f"{file} cannot be loaded by ONNX Runtime ({_last_line(error)}): export it again") from error

    def run(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        values = (input_ids.numpy(), attention_mask.numpy())
        return torch.from_numpy(session.run(None, dict(zip(_NAMES, values, strict=True)))[0])

    return run


@torch.no_grad()
def compare_logits(model: nn.Module, run: Runner, size: int) -> RuntimeReport:
    """Run torch's model and an exported one on the same random tokens, in batches of several shapes, one padded.

    Args:
        model: The causal LM that was exported.
        run: The exported model.
        size: Size of the exported files in bytes.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    worst = largest = 0.0
    same = total = 0
    for batch, tokens, padding in ((1, 1, 0), (1, 24, 0), (3, 17, 5)):
        ids = torch.randint(0, vocabulary, (batch, tokens), generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, tokens - padding :] = 0
        attended = mask.bool()
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[attended]
        actual = run(ids, mask)[attended]
        # torch's max() propagates NaN, Python's may not
        worst = float(torch.tensor([worst, float((actual - expected).abs().max())]).max())
        largest = max(largest, float(expected.abs().max()))
        same += int((actual.argmax(-1) == expected.argmax(-1)).sum())
        total += int(attended.sum())
    return RuntimeReport(size, worst, largest, same / total)


_NAMES = ("input_ids", "attention_mask")


class _Logits(nn.Module):
    """A causal LM as a function from two tensors to one, the form that the exporters need."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


def _trace(model: nn.Module) -> torch.export.ExportedProgram:
    """Capture the model with dynamic numbers of sequences and tokens."""
    ids = torch.ones(2, 16, dtype=torch.int64)
    free = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    with torch.no_grad(), _quiet():
        return torch.export.export(_Logits(model).eval(), (ids, torch.ones_like(ids)), dynamic_shapes=(free, free))


def _to_int8(exported: Any) -> None:
    """Replace the weights of all matrix products by 8-bit constants, a conversion and a scale for each output.

    Rounding to a multiple of the scale, without a zero point, keeps zeros exact.
    """
    ops = import_module("openvino.opset13")
    for node in exported.get_ops():
        if node.get_type_name() != "MatMul" or node.input_value(1).get_node().get_type_name() != "Constant":
            continue
        value = torch.from_numpy(node.input_value(1).get_node().get_data().copy())
        if value.dim() != 2 or value.dtype != torch.float32:
            continue
        inputs = 1 if node.get_attributes()["transpose_b"] else 0
        scale = value.abs().amax(inputs, keepdim=True) / 127
        scale[scale == 0] = 1
        quantized = (value / scale).round().to(torch.int8)
        product = ops.multiply(ops.convert(ops.constant(quantized.numpy()), "f32"), ops.constant(scale.numpy()))
        node.input(1).replace_source_output(product.output(0))


def _check_difference(report: RuntimeReport, exact: bool) -> None:
    """Raise a ValueError if logits are not finite or, with ``exact``, differ by more than ``MAX_DIFFERENCE``."""
    limit = MAX_DIFFERENCE * report.largest_logit if exact else float("inf")
    if not report.max_difference <= limit or report.max_difference == float("inf"):
        raise ValueError(
            f"the exported model's logits differ from torch's by {report.max_difference} (largest logit "
            f"{report.largest_logit}): it was not kept; needs a model that torch.export captures"
        )


def _import_package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(f"this export needs {name}, which is not installed: {install_line(name)}") from error


def _existing(folder: Path, name: str) -> str:
    if not (folder / name).is_file():
        raise ValueError(f"{folder} has no {name}: needs a folder made by seft export openvino or onnx")
    return str(folder / name)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings about packages that are not needed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
