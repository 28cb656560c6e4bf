"""Masks and weights against llm-compressor's functions on the same tensors. Optional: it pins an older transformers, so use a
venv of its own: `pip install --no-deps llmcompressor compressed-tensors loguru` beside this project's packages."""

import pytest
import torch
from torch import nn

from seft_dist.backends.group import Group
from seft_dist.pruning.masks import Ranking, choose
from seft_dist.pruning.sparsegpt import inverse_factor, sparsegpt
from seft_dist.pruning.wanda import wanda_scores
from tests import pruning_reference as reference

REASON = "llm-compressor is not installed (see the docstring)"
published = pytest.importorskip("llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify", reason=REASON)
wanda = pytest.importorskip("llmcompressor.modifiers.pruning.wanda.wanda_sparsify", reason=REASON)
pytestmark = pytest.mark.slow


def tensors() -> tuple[nn.Linear, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    linear = nn.Linear(320, 192, bias=False)
    linear.weight.data = torch.randn(192, 320, generator=generator)
    mixed = torch.randn(320, 320, generator=generator) / 18 + torch.eye(320)
    return linear, [torch.randn(96, 320, generator=generator) @ mixed for _ in range(8)]


@pytest.mark.parametrize("kind", ["layer", "2:4", "4:8"])
def test_sparsegpt(kind: str) -> None:
    linear, inputs = tensors()
    hessian = reference.hessian_of(inputs)
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
    linear, inputs = tensors()
    squares = torch.cat(inputs).square().sum(0)
    weight = linear.weight.detach().clone()
    gone = choose(wanda_scores(weight, squares.sqrt()), weight, Ranking(kind, 0.5), Group(None))
    pattern = (0, 0) if kind == "row" else (2, 4)
    theirs = wanda.sparsify_weight(linear, {linear: squares / 8}, 0.5, *pattern)
    assert torch.equal(weight.masked_fill(gone, 0), theirs)
