"""Wrong or unusual inputs of pruning: degenerate Hessians, masks and layer ratios from files, pruned checkpoints."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from seft_dist.backends.group import Group
from seft_dist.config import DataConfig, ModelConfig, PruneConfig
from seft_dist.modules.kinds import LinearWeight, Target
from seft_dist.modules.targets import find_targets
from seft_dist.pruning.owl import owl_sparsities, read_sparsities
from seft_dist.pruning.prune import prune_folder
from seft_dist.pruning.sparsegpt import Hessians, inverse_factor
from seft_dist.sparsity.bitmask import pack
from tests import pruning_reference as reference
from tests.scripts import run_script
from tests.texts import dense_folder, text_jsonl

ROOT = Path(__file__).resolve().parents[1]


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = dense_folder(tmp_path_factory.mktemp("dense") / "model")
    text_jsonl(folder.parent / "text.jsonl")
    return folder


def configure(model: Path, output: Path, **over: Any) -> PruneConfig:
    settings: dict[str, Any] = {"method": "magnitude"} | over
    if settings["method"] in ("wanda", "sparsegpt") or settings.get("layer_ratios") == "owl":
        data = DataConfig(path=str(model.parent / "text.jsonl"), seq_len=32)
        settings = {"data": data, "sequences": 12} | settings
    return PruneConfig(model=ModelConfig(path=str(model)), output=str(output), **settings)


def test_a_hessian_of_too_little_text_needs_more_dampening_or_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    inputs = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).double()
    hessian = inputs.T @ inputs  # rank 3 of 40
    factor, dead = inverse_factor(hessian.clone(), 0.01, "few")
    assert factor.isfinite().all() and not dead.any() and not caplog.text
    tiny = hessian.clone()
    tiny -= 0.05 * tiny.diagonal().mean() * torch.eye(40)  # not positive: 1 % is not enough, 10 % is
    inverse_factor(tiny, 0.01, "negative")
    assert "negative: its Hessian could be inverted only with dampening 0.1" in caplog.text
    hopeless = hessian - 9 * hessian.diagonal().mean() * torch.eye(40)
    with pytest.raises(ValueError, match="Hessian of layer.x cannot be inverted, also with dampening 1"):
        inverse_factor(hopeless, 0.01, "layer.x")
    with pytest.raises(ValueError, match="every input of layer.y was 0"):
        inverse_factor(torch.zeros(4, 4).double(), 0.01, "layer.y")


def test_hessians_are_shared_where_inputs_are() -> None:
    torch.manual_seed(0)
    linears = {name: nn.Linear(6, 3, bias=False) for name in ("q", "k", "o")}
    targets: dict[str, Target] = {name: LinearWeight(linear) for name, linear in linears.items()}
    hessians = Hessians(targets)
    inputs = [torch.randn(2, 5, 6) for _ in range(3)]
    for x in inputs:
        linears["q"](x)
        linears["k"](x)
        linears["o"](x + 1)
    found = dict((tuple(names), hessian) for names, hessian in hessians.close(Group(None)))
    assert list(found) == [("q", "k"), ("o",)]
    sequences = [sequence for x in inputs for sequence in x]
    torch.testing.assert_close(found["q", "k"], reference.hessian_of(sequences), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[("o",)], reference.hessian_of([s + 1 for s in sequences]), rtol=1e-5, atol=1e-5)
    silent = Hessians(targets)
    with pytest.raises(ValueError, match="no calibration token reached q"):
        list(silent.close(Group(None)))
    broken = Hessians({"q": targets["q"]})
    linears["q"](torch.full((1, 2, 6), float("inf")))
    with pytest.raises(ValueError, match="inputs of q are not finite"):
        list(broken.close(Group(None)))


def test_dead_inputs_get_zero_weights(dense: Path, tmp_path: Path) -> None:
    model = dense_folder(tmp_path / "model")
    text_jsonl(tmp_path / "text.jsonl")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][7] = 0  # input 7 of down_proj is 0 for every token
    tensors["model.layers.1.input_layernorm.weight"][3] = 0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    prune_folder(configure(model, tmp_path / "out", method="sparsegpt", sparsity=0.5), progress=False)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert not after["model.layers.0.mlp.down_proj.weight"][:, 7].any()
    assert not after["model.layers.1.self_attn.q_proj.weight"][:, 3].any()
    assert all(tensor.isfinite().all() for tensor in after.values())


def test_owl_is_the_published_formula(dense: Path, tmp_path: Path) -> None:
    shares = [0.01, 0.03, 0.02, 0.05]
    ours = owl_sparsities({str(i): s for i, s in enumerate(shares)}, dict.fromkeys("0123", 9), 0.6, 0.08)
    theirs = reference.owl_sparsities([100 * share for share in shares], 0.6, 0.08)
    assert list(ours.values()) == pytest.approx(theirs, abs=1e-12)
    assert owl_sparsities({"a": 0.1, "b": 0.1}, {"a": 1, "b": 2}, 0.6, 0.1) == {"a": 0.6, "b": 0.6}
    with pytest.raises(ValueError, match="lower --owl_lambda"):
        owl_sparsities({"a": 0.1, "b": 0.2}, {"a": 1, "b": 1}, 0.95, 0.4)
    config = configure(dense, tmp_path / "out", method="wanda", layer_ratios="owl", owl_threshold=3.0)
    counts = prune_folder(config, progress=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(dense)
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())["targets_pruned"]
    by_layer = [{round(record[c.name]["asked"], 9) for c in counts if f"layers.{i}." in c.name} for i in range(2)]
    assert [len(found) for found in by_layer] == [1, 1] and by_layer[0] != by_layer[1]
    assert abs(sum(found.pop() for found in by_layer) / 2 - 0.6) < 1e-9 and len(find_targets(model)) == len(record)


def test_layer_ratios_from_a_file(dense: Path, tmp_path: Path) -> None:
    file = tmp_path / "ratios.yaml"
    file.write_text("model.layers.0: 0.25\nmodel.layers.0.mlp.up_proj: 0\n")
    counts = prune_folder(configure(dense, tmp_path / "out", layer_ratios=str(file), sparsity=0.5), progress=False)
    shares = {count.name: count.sparsity for count in counts}
    assert shares["model.layers.0.self_attn.q_proj"] == 0.25 and shares["model.layers.0.mlp.up_proj"] == 0
    assert shares["model.layers.1.mlp.up_proj"] == 0.5
    for content, message in (
        ("[1, 2]", "needs names to sparsities"),
        ("a: {b", "is no plain YAML"),
        ("model.layers.0: 1.5", "needs a name with a share"),
        ("model.layers.0: true", "needs a name with a share"),
        ("model.layers.0: .nan", "needs a name with a share"),
        ("model.layers.0: 0.5\nmodel.layers.9: 0.5", "names model.layers.9, which is no target"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            prune_folder(configure(dense, tmp_path / "no", layer_ratios=str(file), sparsity=0.5), progress=False)
    file.write_text("a: 0.5")
    with pytest.raises(ValueError, match="does not name b"):
        read_sparsities(str(file), ["a", "b"], None)
    with pytest.raises(ValueError, match="is no file"):
        prune_folder(configure(dense, tmp_path / "no", layer_ratios="often"), progress=False)
    assert not (tmp_path / "no").exists()


def kept_positions(folder: Path) -> dict[str, Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {name: (value != 0).view(-1) for name, value in tensors.items() if name.endswith("proj.weight")}


def test_an_index_of_kept_positions_gives_the_same_model(dense: Path, tmp_path: Path) -> None:
    prune_folder(configure(dense, tmp_path / "pruned"), progress=False)
    expected = load_file(tmp_path / "pruned" / "model.safetensors")
    kept = kept_positions(tmp_path / "pruned")
    kinds: dict[str, dict[str, Tensor]] = {
        "positions": {name: mask.nonzero().view(-1).int() for name, mask in kept.items()},
        "bits": {name.removesuffix(".weight"): pack(mask) for name, mask in kept.items()},
        "mask": {name: mask.view(expected[name].shape) for name, mask in kept.items()},
    }
    for kind, index in kinds.items():
        file = tmp_path / f"{kind}.safetensors"
        save_file(index, file)
        prune_folder(configure(dense, tmp_path / kind, method="mask", mask=str(file)), progress=False)
        found = load_file(tmp_path / kind / "model.safetensors")
        assert all(torch.equal(found[name], value) for name, value in expected.items()), kind


def test_wrong_indices_are_refused(dense: Path, tmp_path: Path) -> None:
    good = {name: torch.arange(mask.numel() // 2) for name, mask in kept_positions(dense).items()}
    name = next(iter(good))
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({key: value for key, value in good.items() if key != name}, "lacks"),
        (good | {"other": torch.ones(1)}, "names other, which is no target"),
        (good | {name: torch.tensor([0, 10**6])}, "positions from 0 to 1000000"),
        (good | {name: torch.tensor([-1, 2])}, "positions from -1"),
        (good | {name: torch.tensor([3, 3])}, "has positions twice"),
        (good | {name: torch.ones(2, 2)}, "needs a mask of shape"),
    ]
    for number, (index, message) in enumerate(cases):
        file = tmp_path / f"{number}.safetensors"
        save_file(index, file)
        with pytest.raises(ValueError, match=message):
            prune_folder(configure(dense, tmp_path / "out", method="mask", mask=str(file)), progress=False)
    (tmp_path / "text").write_text("no tensors")
    for path, message in (("text", "is no safetensors file"), ("gone", "is no file")):
        with pytest.raises(ValueError, match=message):
            prune_folder(configure(dense, tmp_path / "out", method="mask", mask=str(tmp_path / path)), progress=False)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()


def test_pruned_checkpoints_are_recognised_and_shown(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prune_folder(configure(dense, tmp_path / "pruned", pattern="2:4"), progress=False)
    with pytest.raises(ValueError, match="50.0 % .* pruned already, to the pattern 2:4") as caught:
        prune_folder(configure(tmp_path / "pruned", tmp_path / "again"), progress=False)
    assert "self_attn.q_proj (2 x)" in str(caught.value)
    counts = prune_folder(configure(tmp_path / "pruned", Path("unused"), method="none"), progress=False)
    assert all(count.sparsity == 0.5 for count in counts)
    prune_folder(configure(dense, Path("unused"), method="none"), progress=False)
    said = capsys.readouterr().out
    assert "it was pruned already, to the pattern 2:4" in said and "0.0 % of the target weights are 0: a dense" in said


def test_patterns_that_do_not_divide_are_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="q_proj has 32 input columns, which --pattern 2:5 does not divide"):
        prune_folder(configure(dense, tmp_path / "out", pattern="2:5"), progress=False)


@pytest.mark.slow
def test_two_ranks_prune_as_one(dense: Path, tmp_path: Path) -> None:
    options = [f"--model.path={dense}", f"--data.path={dense.parent / 'text.jsonl'}", "--data.seq_len=32"]
    options += ["--sequences=12", "--method=sparsegpt", "--pattern=2:4"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for name in ("one", "two"):
        given = ["launch/prune.py", *options, f"--output={tmp_path / name}"]
        if name == "one":
            done = run_script(*given)
        else:
            done = subprocess.run([*torchrun, *given], cwd=ROOT, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("50.00 %") == 8 and "Pruning layers: " in done.stderr, done.stdout
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for key in one:
        assert torch.equal(one[key] == 0, two[key] == 0)
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-6)
