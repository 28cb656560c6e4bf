"""Masks and weights against maintained implementations on the same tensors. Optional: install them to a folder,

    pip install --no-deps --target OTHERS llmcompressor==0.14.0.1 compressed-tensors==0.20.0 loguru \\
        nvidia-modelopt==0.47.0 omegaconf antlr4-python3-runtime==4.9.3 pulp
    PYTHONPATH=OTHERS python -m pytest tests/test_pruning_maintained.py

(llm-compressor pins an older transformers, so it cannot be a dependency.) docs/pruning.md says when this was run last.
"""

from typing import Any

import pytest
import torch
from torch import nn

from seft_dist.backends.group import Group
from seft_dist.pruning.magnitude import magnitude_scores
from seft_dist.pruning.masks import Ranking, select_pruned
from seft_dist.pruning.sparsegpt import inverse_factor, sparsegpt
from seft_dist.pruning.wanda import wanda_scores
from tests import pruning_reference as reference

pytestmark = pytest.mark.slow
LLM_COMPRESSOR = "llmcompressor.modifiers.pruning"
MODEL_OPT = "modelopt.torch.sparsity.weight_sparsity"


def maintained(module: str) -> Any:
    return pytest.importorskip(module, reason=f"{module.partition('.')[0]} is not installed (see the file's docstring)")


def tensors() -> tuple[nn.Linear, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    linear = nn.Linear(320, 192, bias=False)
    linear.weight.data = torch.randn(192, 320, generator=generator)
    mixed = torch.randn(320, 320, generator=generator) / 18 + torch.eye(320)
    return linear, [torch.randn(96, 320, generator=generator) @ mixed for _ in range(8)]


@pytest.mark.parametrize("kind", ["layer", "2:4", "4:8"])
def test_sparsegpt(kind: str) -> None:
    published = maintained(f"{LLM_COMPRESSOR}.sparsegpt.sgpt_sparsify")
    linear, inputs = tensors()
    hessian = reference.hessian_of(inputs).float()
    factor, dead = inverse_factor(hessian.double(), 0.01, "w")
    # unstructured, theirs prunes all up to a threshold: one weight more in each of the three blocks
    sparsity = 0.5 + 1.01 / (192 * 128) if kind == "layer" else 0.5
    ours = sparsegpt(linear.weight.detach(), factor, dead, Ranking(kind, sparsity), Group(None))
    pattern = (0, 0) if kind == "layer" else tuple(int(part) for part in kind.split(":"))
    with torch.no_grad():
        _, theirs = published.sparsify_weight(linear, {linear: hessian}, 0.5, *pattern, 128, 0.01, False)
    assert torch.equal(ours == 0, theirs == 0)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-3


@pytest.mark.parametrize("kind", ["row", "2:4"])
def test_wanda(kind: str) -> None:
    wanda = maintained(f"{LLM_COMPRESSOR}.wanda.wanda_sparsify")
    linear, inputs = tensors()
    squares = torch.cat(inputs).square().sum(0)
    weight = linear.weight.detach().clone()
    gone = select_pruned(wanda_scores(weight, squares.sqrt()), weight, Ranking(kind, 0.5), Group(None))
    pattern = (0, 0) if kind == "row" else (2, 4)
    theirs = wanda.sparsify_weight(linear, {linear: squares / 8}, 0.5, *pattern)
    assert torch.equal(weight.masked_fill(gone, 0), theirs)


def test_sparsegpt_masks_of_another_library() -> None:
    """ModelOpt: 2:4, masks alone (it gives no weights)."""
    published = maintained(f"{MODEL_OPT}.sparsegpt")
    linear, inputs = tensors()
    hessian = reference.hessian_of(inputs).float()
    factor, dead = inverse_factor(hessian.double(), 0.1, "w")
    ours = sparsegpt(linear.weight.detach(), factor, dead, Ranking("2:4", 0.5), Group(None))
    settings = {"pattern": "2:4 sparsity", "col_block_size": 128, "row_block_size": -1, "hessian_damp": 0.1}
    assert torch.equal(ours != 0, published.create_sgpt_mask(linear.weight.detach(), hessian, settings))


def test_magnitude_masks_of_another_library() -> None:
    published = maintained(f"{MODEL_OPT}.magnitude")
    weight = tensors()[0].weight.detach()
    gone = select_pruned(magnitude_scores(weight), weight, Ranking("2:4", 0.5), Group(None))
    assert torch.equal(~gone, published.create_asp_mask(weight, "2:4 sparsity"))
