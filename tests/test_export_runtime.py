"""OpenVINO and ONNX Runtime: exported from plain and packed folders, run, compared; wrong inputs are refused."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import tests.preload  # noqa: F401
from seft_dist.config import ModelConfig
from seft_dist.export import runtime
from seft_dist.export.export import pack_model
from seft_dist.io.models import load_model
from seft_dist.io.source import Source, open_source
from tests.folders import model_folder


def opened(folder: Path) -> Source:
    return open_source(ModelConfig(path=str(folder), dtype="float32"))


def agree(folder: Path, run: runtime.Runner, tolerance: float) -> None:
    """Other tokens and shapes than the export itself compares."""
    ids = torch.arange(44).view(4, 11) % 128
    mask = torch.ones_like(ids)
    mask[2, 6:] = 0
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    assert float((run(ids, mask)[mask.bool()] - wanted).abs().max()) < tolerance * float(wanted.abs().max())


@pytest.mark.slow
def test_openvino(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    pruned = model_folder(tmp_path / "pruned", torch.bfloat16)
    pack_model(opened(pruned), tmp_path / "packed")
    report = runtime.export_openvino(opened(tmp_path / "packed"), tmp_path / "ov")
    assert report.max_difference < 1e-5 and report.same_choice == 1
    assert (tmp_path / "ov" / "tokenizer.json").is_file()
    agree(pruned, runtime.open_openvino(tmp_path / "ov", threads=1), 1e-5)
    agree(pruned, runtime.open_openvino(tmp_path / "ov", sparse_rate=0.5), 1e-5)
    report = runtime.export_openvino(opened(pruned), tmp_path / "int8", "int8")
    assert 1e-5 < report.max_difference < 0.1 * report.largest_logit
    agree(pruned, runtime.open_openvino(tmp_path / "int8"), 0.1)
    (tmp_path / "ov" / "openvino_model.bin").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"openvino_model.xml cannot be loaded by OpenVINO"):
        runtime.open_openvino(tmp_path / "ov")


@pytest.mark.slow
@pytest.mark.long
def test_onnx(tmp_path: Path) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    pruned = model_folder(tmp_path / "pruned", tie_word_embeddings=True)
    report = runtime.export_onnx(opened(pruned), tmp_path / "onnx")
    assert report.max_difference < 1e-5 and report.same_choice == 1
    agree(pruned, runtime.open_onnx(tmp_path / "onnx", threads=1), 1e-5)
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"model.onnx cannot be loaded by ONNX Runtime"):
        runtime.open_onnx(tmp_path / "onnx")


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened(model_folder(tmp_path / "m"))
    for name in ("openvino", "onnx"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    for act in (runtime.export_openvino, runtime.export_onnx):
        with pytest.raises(ValueError, match=r"is not installed: pip install 'seft_dist\[runtime\]'"):
            act(source, tmp_path / "out")
    monkeypatch.undo()
    pytest.importorskip("openvino")
    with pytest.raises(ValueError, match=r"has no openvino_model.xml"):
        runtime.open_openvino(tmp_path / "m")
    assert not (tmp_path / "out").exists()


def test_another_computation_is_not_accepted(tmp_path: Path) -> None:
    """The comparison sees a small error, one of padding only, and NaN."""
    model = load_model(opened(model_folder(tmp_path / "m"))).eval()

    def right(ids: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask).logits

    runtime._check_difference(runtime.compare_logits(model, right, 0), True)
    for wrong in (
        lambda i, m: right(i, m) * 1.01,
        lambda i, m: right(i.flip(1), m),
        lambda i, m: right(i, m) * torch.nan,
    ):
        with pytest.raises(ValueError, match="logits differ from torch's"):
            runtime._check_difference(runtime.compare_logits(model, wrong, 0), True)
    with pytest.raises(ValueError, match="logits differ from torch's by nan"):
        runtime._check_difference(runtime.compare_logits(model, lambda i, m: right(i, m) * torch.nan, 0), False)
