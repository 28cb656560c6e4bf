"""2:4 models: the check names what breaks the pattern; torch's form holds the same bits; no GPU, no silent fallback."""

from math import prod
from pathlib import Path

import pytest
import torch
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)
from transformers import AutoModelForCausalLM

import tests.preload  # noqa: F401
from seft_dist.config import DType, ModelConfig
from seft_dist.export.export import pack_model
from seft_dist.export.semi_structured import check_groups_kept, count_groups, load_semi_structured, pattern_table
from seft_dist.io.source import Source, open_source
from seft_dist.modules.targets import find_targets
from tests.folders import model_folder

SIZES = {"hidden_size": 64, "intermediate_size": 128}
NAME = "model.layers.1.mlp.up_proj"


def opened(folder: Path, dtype: DType = "auto") -> Source:
    return open_source(ModelConfig(path=str(folder), dtype=dtype))


def model_2_4(folder: Path, dtype: torch.dtype = torch.bfloat16, broken: bool = False) -> Path:
    """A tiny Llama with the two largest of every four weights; one group with three if broken."""
    model_folder(folder, dtype, sparsity=0, **SIZES)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for linear in find_targets(model).values():
            groups = linear.weight.view(-1, 4)
            groups.scatter_(1, groups.abs().argsort(dim=1)[:, :2], 0.0)
        if broken:
            model.get_submodule(NAME).weight[5, 8:12] = torch.tensor([1.0, 2.0, 0.0, 3.0])
    model.save_pretrained(folder)
    return folder


def test_the_check_passes_and_counts(tmp_path: Path) -> None:
    source = opened(model_2_4(tmp_path / "m"))
    counts = count_groups(source)
    check_groups_kept(counts, "2:4")
    assert len(counts) == 14 and all(count.broken == 0 and count.first is None for count in counts)
    assert all(count.zeros == 2 * count.groups and 4 * count.groups == prod(count.shape) for count in counts)
    assert all(count.fits_kernel for count in counts)
    pack_model(source, tmp_path / "packed")
    assert count_groups(opened(tmp_path / "packed")) == counts
    assert pattern_table(counts, "2:4").row_count == 8


def test_the_first_broken_group_is_named(tmp_path: Path) -> None:
    counts = count_groups(opened(model_2_4(tmp_path / "m", broken=True)))
    assert {count.name: count.broken for count in counts if count.broken} == {NAME: 1}
    message = f"{NAME}.weight has 3 active weights in row 5, columns 8 to 11, 2 are allowed; 1 such groups in 1 of 14"
    with pytest.raises(ValueError, match=message):
        check_groups_kept(counts, "2:4")
    with pytest.raises(ValueError, match="not a 1:4 model: model.layers.0"):
        check_groups_kept(count_groups(opened(tmp_path / "m"), "1:4"), "1:4")
    check_groups_kept(count_groups(opened(tmp_path / "m"), "3:4"), "3:4")


@pytest.mark.parametrize("pattern", ["2", "4:4", "a:b", "0:4"])
def test_what_is_no_pattern(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"pattern={pattern}"):
        count_groups(opened(model_folder(tmp_path / "m")), pattern)


def test_inputs_that_cannot_be_divided(tmp_path: Path) -> None:
    source = opened(model_folder(tmp_path / "m"))
    with pytest.raises(ValueError, match="has 32 inputs: a pattern of 2:5 needs a multiple of 5"):
        check_groups_kept(count_groups(source, "2:5"), "2:5")


def test_torch_holds_the_same_bits(tmp_path: Path) -> None:
    """The bits that to_sparse_semi_structured stores on a GPU are computed by torch's own reference implementation."""
    source = opened(model_2_4(tmp_path / "m"))
    for count in count_groups(source):
        weight = source.weights.read(f"{count.name}.weight").view(count.shape)
        values, meta = sparse_semi_structured_from_dense_cutlass(weight)
        assert values.shape == (count.shape[0], count.shape[1] // 2)
        assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, meta), weight)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cpu has no 2:4 kernels: .* compute capability 8.0"):
        load_semi_structured(opened(model_2_4(tmp_path / "m")))


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="needs a CUDA GPU of compute capability 8.0 or higher",
)
def test_on_a_gpu_logits_agree(tmp_path: Path) -> None:
    folder = model_2_4(tmp_path / "m")
    ids = torch.arange(64, device="cuda").view(2, 32)
    dense = AutoModelForCausalLM.from_pretrained(folder).cuda()(ids).logits
    sparse = load_semi_structured(opened(folder))(ids).logits
    assert torch.allclose(sparse, dense, atol=2e-2)
    with pytest.raises(ValueError, match="needs model.dtype bfloat16"):
        load_semi_structured(opened(folder, "float32"))
    with pytest.raises(ValueError, match="not a 2:4 model"):
        load_semi_structured(opened(model_2_4(tmp_path / "broken", broken=True)))
