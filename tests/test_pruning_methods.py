"""Pruned weights against the papers' algorithms in plain dense torch, and the same weights from any number of ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from torch import Tensor

from seft_dist.backends.group import Group
from seft_dist.config import PruneConfig
from seft_dist.data.load import load_sequences
from seft_dist.data.tokenizer import load_tokenizer
from seft_dist.modules.targets import find_targets
from seft_dist.pruning import compensate
from seft_dist.pruning.calibrate import sample_sequences
from seft_dist.pruning.compensate import compensated, scaled_hessian
from seft_dist.pruning.masks import (
    Ranking,
    find_threshold,
    gather_rows,
    num_pruned,
    own_rows,
    pruning_keys,
    select_pruned,
)
from seft_dist.pruning.prune import prepare, prune, prune_folder
from seft_dist.pruning.sparsegpt import inverse_factor, sparsegpt
from tests import pruning_reference as reference
from tests.pruning_models import configure, write_dense
from tests.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("dense"))


def calibration_text(config: PruneConfig) -> list[Tensor]:
    assert config.data is not None
    return sample_sequences(load_sequences(config.data, load_tokenizer(config.model)), config.sequences, config.seed)


def block_counts(sparsity: float, columns: int, per: int) -> list[int]:
    ends = [*range(0, columns, 128), columns]
    return [num_pruned(sparsity, per * b) - num_pruned(sparsity, per * a) for a, b in zip(ends, ends[1:], strict=False)]


def pruned_by_reference(config: PruneConfig, model: Path, found: Any) -> tuple[Any, dict[str, float]]:
    """The whole model runs for every layer; then the layer's weights are pruned by the reference.

    It takes over which weights ``found`` has pruned; also returned: by how much these choices miss the smallest scores.
    """
    expected, missed = transformers.AutoModelForCausalLM.from_pretrained(model), {}
    text = calibration_text(config)
    norms = reference.curvature_norms(expected, text) if config.method == "curvature" else {}
    pattern = config.kept_of if config.pattern else None
    for number in range(expected.config.num_hidden_layers):
        for name, inputs in reference.layer_inputs(expected, text, number).items():
            weight, gone = expected.get_submodule(name).weight, found.get_submodule(name).weight == 0
            rows, columns = weight.shape
            if config.compensate:  # chosen at once, masks are tested without it
                new, hessian = found.get_submodule(name).weight.detach(), reference.hessian_of(inputs)
                missed[name] = reference.excess(new, weight.detach(), hessian, gone, config.dampening)
                if config.chooses_in_rounds:
                    numel = columns if config.ranking == "row" else weight.numel()
                    outputs = norms[name][1] if config.method == "curvature" else None
                    best = reference.prune_in_rounds(
                        weight.detach(), hessian, numel, num_pruned(config.share, numel), 8, outputs, config.dampening
                    )
                    assert float(((best == 0) != gone).float().mean()) < 0.02, name
                weight.data = new
                continue
            if config.method == "sparsegpt":
                per_row = config.group == "row"
                counts = block_counts(config.share, columns, 1 if per_row else rows)
                hessian = reference.hessian_of(inputs)
                new, missed[name] = reference.sparsegpt(weight.data, hessian, gone, counts, pattern, per_row=per_row)
                weight.data = new.float()
                continue
            norm = torch.cat(inputs).double().square().sum(0).sqrt()
            scores = weight.data.abs() * (norm if config.method == "wanda" else 1)
            if pattern is not None:
                missed[name] = reference.pattern_slack(scores, gone, *pattern)
            else:
                missed[name] = reference.slack(scores, gone, num_pruned(config.share, columns))
            weight.data[gone] = 0
    return expected, missed


CASES: dict[str, dict[str, Any]] = {
    "sparsegpt": {"method": "sparsegpt", "sparsity": 0.5},
    "sparsegpt-row": {"method": "sparsegpt", "sparsity": 0.57, "group": "row"},
    "sparsegpt-2:4": {"method": "sparsegpt", "pattern": "2:4"},
    "sparsegpt-4:8": {"method": "sparsegpt", "pattern": "4:8"},
    "sparsegpt-3:16": {"method": "sparsegpt", "pattern": "3:16"},
    "wanda-2:4": {"method": "wanda", "pattern": "2:4"},
    "wanda-1:8": {"method": "wanda", "pattern": "1:8"},
    "magnitude-4:8": {"method": "magnitude", "pattern": "4:8"},
    "wanda-compensate": {"compensate": True, "dampening": 0.1},
    "sparsegpt-compensate": {"method": "sparsegpt", "compensate": True},
    "curvature-compensate": {"method": "curvature", "compensate": True},
    "magnitude-2:4-compensate": {"method": "magnitude", "pattern": "2:4", "compensate": True},
}


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_the_published_algorithm(
    case: str, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compensate, "_BETWEEN", 400)  # rounds are solved to the end, as the reference does
    config = configure(dense, tmp_path / "out", **CASES[case])
    counts = prune_folder(config, progress=False)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected, missed = pruned_by_reference(config, dense, found)
    close = 0.01 if config.compensate else 0.0 if config.method == "magnitude" else reference.CLOSE
    assert missed and max(missed.values()) <= close, missed
    for name, theirs in expected.named_parameters():
        ours = found.get_parameter(name)
        if config.method == "sparsegpt":
            error = float((ours - theirs).detach().norm() / theirs.detach().norm())
            assert error < 1e-4, (name, error)
        else:
            assert torch.equal(ours, theirs), name
    for count in counts:
        rows, columns = found.get_submodule(count.name).weight.shape
        assert count.zeros == Ranking(config.ranking, config.share).zeros(rows, columns), count
        if config.pattern is not None:
            kept, width = config.kept_of
            weight = found.get_submodule(count.name).weight.detach()
            assert bool(((weight != 0).view(-1, width).sum(1) == kept).all())


def test_sparsegpt_on_one_weight_is_the_published_code_to_rounding() -> None:
    """A well-conditioned Hessian: nothing but rounding is left, so weights must agree everywhere."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(70, 300, generator=generator)
    inputs = [torch.randn(200, 300, generator=generator) for _ in range(8)]
    inputs = [x + 0.3 * x.roll(1, 1) for x in inputs]
    for x in inputs:
        x[:, [5, 200]] = 0  # dead
    hessian = reference.hessian_of(inputs)
    for ranking, pattern in ((Ranking("layer", 0.5), None), (Ranking("row", 0.5), None), (Ranking("2:4", 0.5), (2, 4))):
        per_row = ranking.kind == "row"
        factor, dead = inverse_factor(hessian.clone(), 0.01, "w")
        ours = sparsegpt(weight, factor, dead, ranking, Group(None))
        assert dead.nonzero().view(-1).tolist() == [5, 200]
        assert not ours[:, [5, 200]].any()
        counts = block_counts(0.5, 300, 1 if per_row else 70)
        theirs, missed = reference.sparsegpt(weight, hessian, ours == 0, counts, pattern, per_row=per_row)
        assert missed <= reference.CLOSE, ranking
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    hessian = hessian.float()
    # what the others make up for is less than what is lost without them
    loss = [
        float(((weight - new) @ hessian * (weight - new)).sum()) for new in (ours, weight.masked_fill(ours == 0, 0))
    ]
    assert loss[0] < 0.9 * loss[1]


LAYOUTS: dict[str, dict[str, Any]] = {
    "wanda-row": {"sparsity": 0.55},
    "wanda-layer": {"sparsity": 0.55, "group": "layer"},
    "wanda-global": {"group": "global"},
    "wanda-owl": {"layer_ratios": "owl", "owl_threshold": 3.0},
    "wanda-2:4": {"pattern": "2:4"},
    "magnitude-layer": {"method": "magnitude", "group": "layer"},
    "magnitude-global": {"method": "magnitude", "group": "global"},
    "curvature-layer": {"method": "curvature"},
    "curvature-global": {"method": "curvature", "group": "global"},
    "sparsegpt-layer": {"method": "sparsegpt"},
    "sparsegpt-row": {"method": "sparsegpt", "group": "row"},
    "sparsegpt-4:8": {"method": "sparsegpt", "pattern": "4:8"},
    "wanda-compensate": {"compensate": True},
    "wanda-2:4-compensate": {"pattern": "2:4", "compensate": True},
    "curvature-global-compensate": {"method": "curvature", "group": "global", "compensate": True},
    "sparsegpt-compensate": {"method": "sparsegpt", "compensate": True},
    "owl-compensate": {"layer_ratios": "owl", "owl_threshold": 3.0, "compensate": True},
}


def on_ranks(rank: int, size: int, dense: Path, folder: Path) -> list[str]:
    """Every layout case on these ranks, into folders of their own."""
    for name, over in LAYOUTS.items():
        plan = prepare(configure(dense, folder / name, **over), progress=False)
        prune(plan, Group(dist.group.WORLD), progress=False)
        assert (folder / name / "model.safetensors").is_file()  # there when any rank returns
    return sorted(LAYOUTS)


@pytest.mark.slow
@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.long), 3, pytest.param(4, marks=pytest.mark.long)])
def test_any_number_of_ranks_gives_the_same_folder(size: int, dense: Path, tmp_path: Path) -> None:
    for name, over in LAYOUTS.items():
        prune_folder(configure(dense, tmp_path / "1" / name, **over), progress=False)
    # 24 sequences are 2 batches: some ranks have no text, and of k and v some have no rows
    assert run_ranks(on_ranks, size, dense, tmp_path / str(size), timeout=280) == [sorted(LAYOUTS)] * size
    for name in LAYOUTS:
        one, many = (load_file(tmp_path / str(n) / name / "model.safetensors") for n in (1, size))
        assert one.keys() == many.keys()
        for key in one:
            assert torch.equal(one[key] == 0, many[key] == 0), (size, name, key)
            if "sparsegpt" in name or "compensate" in name:
                torch.testing.assert_close(many[key], one[key], rtol=1e-4, atol=1e-6)
            else:
                assert torch.equal(one[key], many[key]), (size, name, key)


def share_rows(rank: int, size: int, shape: tuple[int, int]) -> list[Tensor]:
    """One weight full of ties, pruned on these ranks in every way."""
    generator = torch.Generator().manual_seed(1)
    ranks = Group(dist.group.WORLD) if size > 1 else Group(None)
    weight = torch.randint(-3, 4, shape, generator=generator).float()
    root = torch.randn(shape[1], shape[1], generator=generator)
    factor, dead = inverse_factor((root @ root.T).double(), 0.01, "w")
    scaled = scaled_hessian((root @ root.T).double(), 0.01)
    first, last = own_rows(shape[0], ranks)
    own = weight[first:last]
    results = []
    for ranking in (Ranking("row", 0.4), Ranking("layer", 0.4), Ranking("1:4", 0.75)):
        gone = select_pruned(own.abs(), own, ranking, ranks)
        results.append(gather_rows(own.masked_fill(gone, 0.0), ranks))
        results.append(gather_rows(sparsegpt(own, factor, dead, ranking, ranks), ranks))
        results.append(gather_rows(compensated(own, gone, *scaled), ranks))
    threshold = find_threshold(ranks, lambda layer: pruning_keys(own.abs(), own * (1 + layer)), 3, 501)
    results += [gather_rows(threshold.mask(pruning_keys(own.abs(), own), i).view_as(own), ranks) for i in range(3)]
    return results


@pytest.mark.parametrize("shape", [(200, 132), (64, 8), (1, 4)], ids=str)
def test_given_the_same_statistics_the_weights_are_equal_bit_for_bit(shape: tuple[int, int]) -> None:
    alone = share_rows(0, 1, shape)
    assert int(sum(mask.sum() for mask in alone[-3:])) == min(501, 3 * shape[0] * shape[1])
    for size in (2, 3, 5):
        for results in run_ranks(share_rows, size, shape):
            for one, many in zip(alone, results, strict=True):
                assert torch.equal(one, many)


def test_global_ranking_takes_the_smallest_of_all(dense: Path, tmp_path: Path) -> None:
    prune_folder(configure(dense, tmp_path / "out", method="magnitude", group="global", data=None), progress=False)
    before = transformers.AutoModelForCausalLM.from_pretrained(dense)
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    values = torch.cat([m.weight.detach().abs().view(-1) for m in find_targets(before).values()])
    zeros = torch.cat([m.weight.detach().view(-1) == 0 for m in find_targets(after).values()])
    assert int(zeros.sum()) == num_pruned(0.6, values.numel())
    assert float(values[zeros].max()) <= float(values[~zeros].min())


def test_global_wanda_uses_norms_of_the_dense_model(dense: Path, tmp_path: Path) -> None:
    config = configure(dense, tmp_path / "out", group="global")
    prune_folder(config, progress=False)
    before = transformers.AutoModelForCausalLM.from_pretrained(dense)
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    scores, zeros = [], []
    for layer in range(2):
        for name, inputs in reference.layer_inputs(before, calibration_text(config), layer).items():
            norm = torch.cat(inputs).double().square().sum(0).sqrt().float()
            scores.append((before.get_submodule(name).weight.detach().abs() * norm).view(-1))
            zeros.append((after.get_submodule(name).weight.detach() == 0).view(-1))
    score, gone = torch.cat(scores), torch.cat(zeros)
    assert int(gone.sum()) == num_pruned(0.6, score.numel())
    assert float(score[gone].max()) <= float(score[~gone].min()) * (1 + reference.CLOSE)


@pytest.mark.parametrize("group", ["layer", "global"])
def test_curvature_is_the_second_order_estimate_of_the_dense_model(group: Any, dense: Path, tmp_path: Path) -> None:
    config = configure(dense, tmp_path / "out", method="curvature", group=group)
    prune_folder(config, progress=False)
    before = transformers.AutoModelForCausalLM.from_pretrained(dense)
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    scores, zeros = [], []
    for name, (inputs, outputs) in reference.curvature_norms(before, calibration_text(config)).items():
        weight, kept = before.get_submodule(name).weight.detach(), after.get_submodule(name).weight.detach()
        scores.append((weight.double().abs() * inputs * outputs[:, None]).view(1, -1))
        zeros.append((kept == 0).view(1, -1))
        assert torch.equal(kept[kept != 0], weight[kept != 0])
    if group == "global":
        scores, zeros = [torch.cat(scores, 1)], [torch.cat(zeros, 1)]
    for score, gone in zip(scores, zeros, strict=True):
        assert reference.slack(score, gone, num_pruned(0.6, score.numel())) <= reference.CLOSE


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "curvature", "curvature and compensate"])
def test_one_decoder_layer_is_in_memory(
    method: str, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, _, more = method.partition(" and ")
    plan = prepare(configure(dense, tmp_path / "out", method=chosen, compensate=bool(more)), progress=False)
    model, materialize, held = plan.stream.model, plan.stream.materialize, []

    @contextmanager
    def watched(*args: Any, **options: Any) -> Iterator[None]:
        with materialize(*args, **options):
            held.append(sum(value.numel() for value in model.parameters() if not value.is_meta))
            yield

    monkeypatch.setattr(plan.stream, "materialize", watched)
    prune(plan, progress=False)
    layers = [sum(value.numel() for value in layer.parameters()) for layer in model.model.layers]
    outside = sum(value.numel() for name, value in model.model.named_parameters() if not name.startswith("layers."))
    assert held[-len(layers) :] == layers  # while they are pruned, or their gradients measured
    assert max(held) == outside + max(layers)  # once, to see how the model calls its layers
    assert all(value.is_meta for value in model.parameters())
