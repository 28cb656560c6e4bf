"""Weights that stay make up for those that are pruned: the normal equations, bad Hessians, each method."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from seft_dist.backends.group import Group
from seft_dist.modules.targets import find_targets
from seft_dist.pruning import compensate
from seft_dist.pruning.compensate import compensated, prune_in_rounds, scaled_hessian
from seft_dist.pruning.masks import Ranking, select_pruned
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
    for used in (False, True):
        config = configure(
            tmp_path / "zeros" / "model", tmp_path / str(used), method="sparsegpt", compensate=used, **over
        )
        counts.append([count.zeros for count in prune_folder(config, progress=False)])
    first = len(counts[0]) // 2  # the second layer sees other inputs
    assert counts[0][:first] == counts[1][:first]
    assert all(found <= other + 8 for other, found in zip(*counts, strict=True))


def test_nothing_makes_up_for_weights_whose_inputs_are_all_0() -> None:
    weight, gone = torch.ones(2, 4), torch.tensor([[True, False, False, True]]).expand(2, 4)
    new = compensated(weight, gone, *scaled_hessian(torch.zeros(4, 4, dtype=torch.float64), 0.01))
    assert torch.equal(new, weight.masked_fill(gone, 0.0))


@pytest.mark.parametrize("ranking", [Ranking("row", 0.6), Ranking("layer", 0.6), Ranking("2:4", 0.5)], ids=str)
@pytest.mark.parametrize("patient", [False, True])
def test_rounds_prune_what_matters_least_by_then(
    ranking: Ranking, patient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(66, 120, generator=generator)
    weight[3, 8:12], weight[:, 7] = 0.0, 0.0
    inputs = torch.randn(400, 120, generator=generator) @ torch.randn(120, 120, generator=generator)
    inputs[:, 20] *= 10  # an outlier, and inputs that are always 0
    inputs[:, 40:44] = 0
    hessian = reference.hessian_of([inputs])
    if patient:  # rounds that are solved to the end, as the reference does
        monkeypatch.setattr(compensate, "_BETWEEN", 400)
        monkeypatch.setattr(compensate, "_ITERATIONS", 400)
    norm = hessian.diagonal().sqrt().float()
    scaled, root = scaled_hessian(hessian.clone(), 0.01)
    rows, columns = weight.shape
    numel = {"row": columns, "layer": weight.numel(), "2:4": 4}[ranking.kind]
    count = ranking.zeros(rows, columns) * numel // weight.numel()

    def choose(values: Tensor, share: float) -> Tensor:
        now: Any = int(count * share + 0.5)
        if ranking.kind == "2:4":
            now = torch.full((weight.numel() // 4,), now)
        return select_pruned(values.abs() * norm, values, ranking, Group(None), now)

    new = prune_in_rounds(weight, choose, scaled, root, 5)
    best = reference.prune_in_rounds(weight, hessian, numel, count, 5)
    assert torch.equal((new == 0).view(-1, numel).sum(1), (best == 0).view(-1, numel).sum(1))
    dampened = reference.dampened(hessian, 0.01)

    def loss(values: Tensor) -> float:
        away = values.double() - weight
        return float(((away @ dampened) * away).sum())

    at_once = compensated(weight, choose(weight, 1.0), scaled, root)
    assert loss(new) <= (1.001 if patient else 1.1) * loss(best) and loss(new) < 0.95 * loss(at_once)
    if patient:
        assert float(((new == 0) != (best == 0)).float().mean()) < 1e-3


@pytest.mark.parametrize(
    "over",
    [
        {"group": "row", "sparsity": 0.55},
        {"group": "layer", "layer_ratios": "owl", "owl_threshold": 3.0},
        {"pattern": "2:4"},
        {"method": "curvature"},
        {"method": "curvature", "group": "global"},
        {"method": "wanda", "group": "global"},
    ],
    ids=str,
)
def test_rounds_move_the_mask_and_keep_every_count(over: dict[str, Any], dense: Path, tmp_path: Path) -> None:
    models = []
    for rounds in (1, 3):
        config = configure(dense, tmp_path / str(rounds), compensate=True, compensate_rounds=rounds, **over)
        counts = prune_folder(config, progress=False)
        models.append(load_file(tmp_path / str(rounds) / "model.safetensors"))
        assert (
            config.ranking == "global"
            or "layer_ratios" in over
            or all(
                count.zeros == Ranking(config.ranking, config.share).zeros(*models[0][f"{count.name}.weight"].shape)
                for count in counts
            )
        )
    first, later = ({f"{count.name}.weight": model[f"{count.name}.weight"] for count in counts} for model in models)
    assert any(not torch.equal(first[key] == 0, later[key] == 0) for key in first)
    width = {"row": 0, "2:4": 4}.get(config.ranking)
    for key, weight in first.items():
        numel = weight.numel() if width is None else width or weight.shape[1]
        zeros = [(one[key] == 0).view(-1, numel).sum(1) for one in (first, later)]
        assert torch.equal(*zeros), key


@pytest.mark.parametrize("group", ["layer", "global"])
def test_compensation_at_once_leaves_the_mask_as_it_is(group: Any, dense: Path, tmp_path: Path) -> None:
    models = []
    for used in (False, True):
        config = configure(
            dense,
            tmp_path / str(used),
            method="curvature",
            group=group,
            compensate=used,
            **({"compensate_rounds": 1} if used else {}),
        )
        prune_folder(config, progress=False)
        models.append(load_file(tmp_path / str(used) / "model.safetensors"))
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
