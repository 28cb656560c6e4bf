"""Weights that stay make up for those that are pruned: the normal equations, bad Hessians, each method."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from seft_dist.modules.targets import find_targets
from seft_dist.pruning.compensate import compensated, scaled_hessian
from seft_dist.pruning.prune import prune_folder
from seft_dist.sparsity.casts import has_negative_zeros
from tests import pruning_reference as reference
from tests.pruning_models import configure, write_dense
from tests.texts import text_jsonl

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("dense"))


def test_weights_that_stay_are_the_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(70, 300, generator=generator)
    weight[3], weight[:, 7] = 0.0, 0.0
    inputs = torch.randn(500, 300, generator=generator) @ torch.randn(300, 300, generator=generator)
    inputs[:, 20] *= 100  # an outlier, and an input that is always 0
    inputs[:, 5] = 0
    hessian = reference.hessian_of([inputs])
    gone = torch.rand(70, 300, generator=generator) < 0.6
    gone[4], gone[6] = False, True
    gone |= weight == 0
    new = compensated(weight, gone, *scaled_hessian(hessian.clone(), 0.01))
    assert torch.equal(new == 0, gone)
    assert torch.equal(new[4], weight[4]) and not has_negative_zeros(new)
    best = reference.least_squares(weight, hessian, gone)
    dampened = reference.dampened(hessian, 0.01)

    def loss(values: Tensor) -> Tensor:
        away = values.double() - weight
        return (away @ dampened * away).sum(1)

    plain = loss(weight.masked_fill(gone, 0.0))
    assert bool((loss(new) <= 1.01 * loss(best) + 1e-6 * plain).all())
    assert bool((loss(new) <= (1 + 1e-5) * plain).all())
    assert float(loss(new).sum()) < 0.8 * float(plain.sum())


@pytest.mark.parametrize("dampening", [1e-2, 1e-4, 1e-6, 1e-8])
def test_a_hessian_of_few_tokens_never_makes_a_row_worse(dampening: float) -> None:
    """Its curvature is rounding in most directions, in which a step could have any length."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(256, 96, generator=generator)
    gone = torch.rand(256, 96, generator=generator) < 0.6
    for tokens in (1, 4, 24):
        hessian = reference.hessian_of([torch.randn(tokens, 96, generator=generator)])
        new = compensated(weight, gone, *scaled_hessian(hessian.clone(), dampening)).double()
        losses = [
            ((values - weight) @ reference.dampened(hessian, dampening) * (values - weight)).sum(1)
            for values in (new, weight.double().masked_fill(gone, 0.0))
        ]
        assert bool((losses[0] <= losses[1] * (1 + 1e-5)).all()), tokens


@pytest.mark.parametrize("over", [{"pattern": "2:4"}, {"pattern": "3:4"}, {}], ids=str)
def test_zeros_of_the_dense_model_and_compensation_after_sparsegpt(over: Any, dense: Path, tmp_path: Path) -> None:
    """SparseGPT may change such zeros and keep them: then they are solved for, too, and counts stay exact."""
    model = transformers.AutoModelForCausalLM.from_pretrained(dense)
    generator = torch.Generator().manual_seed(0)
    for target in find_targets(model).values():
        weight = target.weight.data
        weight[torch.rand(weight.shape, generator=generator) < 0.04] = 0.0
    model.save_pretrained(tmp_path / "zeros" / "model")
    transformers.AutoTokenizer.from_pretrained(dense).save_pretrained(tmp_path / "zeros" / "model")
    text_jsonl(tmp_path / "zeros" / "text.jsonl")
    counts = []
    for compensate in (False, True):
        config = configure(
            tmp_path / "zeros" / "model", tmp_path / str(compensate), method="sparsegpt", compensate=compensate, **over
        )
        counts.append([count.zeros for count in prune_folder(config, progress=False)])
    first = len(counts[0]) // 2  # the second layer sees other inputs
    assert counts[0][:first] == counts[1][:first]
    assert all(found <= other + 8 for other, found in zip(*counts, strict=True))


def test_nothing_makes_up_for_weights_whose_inputs_are_all_0() -> None:
    weight, gone = torch.ones(2, 4), torch.tensor([[True, False, False, True]]).expand(2, 4)
    new = compensated(weight, gone, *scaled_hessian(torch.zeros(4, 4, dtype=torch.float64), 0.01))
    assert torch.equal(new, weight.masked_fill(gone, 0.0))


@pytest.mark.parametrize("group", ["layer", "global"])
def test_compensation_leaves_the_mask_as_it_is(group: Any, dense: Path, tmp_path: Path) -> None:
    models = []
    for compensate in (False, True):
        config = configure(dense, tmp_path / str(compensate), method="curvature", group=group, compensate=compensate)
        prune_folder(config, progress=False)
        models.append(load_file(tmp_path / str(compensate) / "model.safetensors"))
    changed = [key for key in models[0] if not torch.equal(models[0][key], models[1][key])]
    assert len(changed) == 14  # the targets of two layers, nothing else
    assert all(torch.equal(models[0][key] == 0, models[1][key] == 0) for key in models[0])
    # the same masks, named by a file
    masks = {key: models[0][key] != 0 for key in changed}
    save_file(masks, tmp_path / "masks.safetensors")
    config = configure(
        dense, tmp_path / "mask", method="mask", mask=str(tmp_path / "masks.safetensors"), compensate=True
    )
    prune_folder(config, progress=False)
    by_file = load_file(tmp_path / "mask" / "model.safetensors")
    assert all(torch.equal(by_file[key], models[1][key]) for key in by_file)
