"""Pruned folders against a plain dense reference, and the command as users type it."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from seft_dist.backends.group import Group
from seft_dist.config import DataConfig, ModelConfig, PruneConfig
from seft_dist.data.load import load_sequences
from seft_dist.data.tokenizer import load_tokenizer
from seft_dist.modules.kinds import LinearWeight
from seft_dist.modules.targets import find_targets
from seft_dist.pruning import masks
from seft_dist.pruning.calibrate import Calibration, LayerVisitor, find_layers, sample_sequences
from seft_dist.pruning.curvature import OutputGradientNorm
from seft_dist.pruning.gradients import BackwardCalibration
from seft_dist.pruning.masks import Ranking, select_pruned
from seft_dist.pruning.prune import prune_folder
from seft_dist.pruning.wanda import InputNorm, wanda_scores
from tests import pruning_reference
from tests.scripts import run_script
from tests.texts import dense_folder, sentencepiece_tokenizer, text_jsonl

ROOT = Path(__file__).resolve().parents[1]
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 5},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma": {},
    "Gemma2": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "Gemma3Text": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
}


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = dense_folder(tmp_path_factory.mktemp("dense") / "model")
    text_jsonl(folder.parent / "text.jsonl")
    return folder


def configure(model: Path, output: Path, *, text: Path | None = None, **over: Any) -> PruneConfig:
    data = DataConfig(path=str(text or model.parent / "text.jsonl"), seq_len=32)
    settings: dict[str, Any] = {"data": data, "sequences": 12} | over
    return PruneConfig(model=ModelConfig(path=str(model)), output=str(output), **settings)


def reference_mask(scores: np.ndarray, sparsity: float, group: str) -> np.ndarray:
    """True where the weight stays, by sorting tuples of (score, position)."""
    ranked = scores if group == "row" else scores.reshape(1, -1)
    kept = np.ones_like(ranked, dtype=bool)
    for row, values in enumerate(ranked):
        order = sorted((value, place) for place, value in enumerate(values))
        kept[row, [place for _, place in order[: int(sparsity * len(values) + 0.5)]]] = False
    return kept.reshape(scores.shape)


def reference_wanda(model: Any, found: Any, sequences: list[torch.Tensor], sparsity: float, group: str) -> float:
    """The whole model runs for every layer, one sequence at a time; norms in float64.

    Prunes what ``found`` has pruned, and returns by how much that misses the smallest scores.
    """
    missed = 0.0
    for number in range(model.config.num_hidden_layers):
        for name, seen in pruning_reference.layer_inputs(model, sequences, number).items():
            linear, gone = model.get_submodule(name), found.get_submodule(name).weight == 0
            scores = linear.weight.detach().double().abs() * torch.cat(seen).double().square().sum(0).sqrt()
            rows = (-1, scores.shape[1]) if group == "row" else (1, -1)
            count = int(sparsity * scores.reshape(rows).shape[1] + 0.5)
            missed = max(missed, pruning_reference.slack(scores.reshape(rows), gone.reshape(rows), count))
            linear.weight.data[gone] = 0
    return missed


def layer_by_layer(model: Any, sequences: list[torch.Tensor], visit: LayerVisitor) -> None:
    for _ in Calibration(model, sequences, Group(None)).walk(visit, progress=False):
        pass


@pytest.mark.parametrize("group", ["row", "layer"])
def test_wanda_is_the_dense_reference(group: Any, dense: Path, tmp_path: Path) -> None:
    config = configure(dense, tmp_path / "out", group=group, sparsity=0.53)
    assert config.data is not None
    counts = prune_folder(config, progress=False)
    sequences = sample_sequences(load_sequences(config.data, load_tokenizer(config.model)), 12, 0)
    expected = transformers.AutoModelForCausalLM.from_pretrained(dense)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert reference_wanda(expected, found, sequences, 0.53, group) <= pruning_reference.CLOSE
    for (name, ours), theirs in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    for count in counts:
        rows, columns = found.get_submodule(count.name).weight.shape
        wanted = rows * int(0.53 * columns + 0.5) if group == "row" else int(0.53 * rows * columns + 0.5)
        assert count.zeros == wanted, count.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitude_is_the_dense_reference(dtype: torch.dtype, tmp_path: Path) -> None:
    model = dense_folder(tmp_path / "model", dtype=dtype)
    prune_folder(configure(model, tmp_path / "out", method="magnitude", data=None, group="layer"), progress=False)
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        if name.endswith("proj.weight"):
            kept = reference_mask(weight.float().abs().numpy(), 0.6, "layer")
            weight = weight * torch.from_numpy(kept)
        assert after[name].dtype == dtype and torch.equal(after[name], weight), name


def test_output_is_a_complete_hugging_face_folder(dense: Path, tmp_path: Path) -> None:
    config = configure(dense, tmp_path / "deep" / "out", targets="q_proj|down_proj")
    prune_folder(config, progress=False)
    out = tmp_path / "deep" / "out"
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    record = json.loads((out / "pruning.json").read_text())
    assert (record["method"], record["sparsity"], record["seed"], record["calibration_tokens"]) == (
        "wanda",
        0.6,
        0,
        384,
    )
    assert record["data"]["seq_len"] == 32 and record["model"]["path"] == str(dense)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    for name, linear in find_targets(model).items():
        zeros = int((linear.weight == 0).sum())
        assert zeros == record["targets_pruned"].get(name, {"zeros": 0})["zeros"]
        assert (zeros > 0) == ("q_proj" in name or "down_proj" in name)
    text = "The assert statement"
    tokens = transformers.AutoTokenizer.from_pretrained(out)(text)["input_ids"]
    assert tokens == transformers.AutoTokenizer.from_pretrained(dense)(text)["input_ids"]
    assert (out / "generation_config.json").is_file()
    again = configure(dense, tmp_path / "again", targets="q_proj|down_proj")
    prune_folder(again, progress=False)
    first, second = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_bfloat16_with_a_sentencepiece_tokenizer(dense: Path, tmp_path: Path) -> None:
    model = dense_folder(tmp_path / "model", dtype=torch.bfloat16)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    sentencepiece_tokenizer(model)
    counts = prune_folder(configure(model, tmp_path / "out", text=dense.parent / "text.jsonl"), progress=False)
    assert all(count.zeros in (32 * 19, 16 * 19, 48 * 19, 32 * 29) for count in counts)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (model / "tokenizer.model").read_bytes()
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def model_and_text(family: str) -> tuple[Any, list[torch.Tensor]]:
    """A small random model of a family, and sequences of several lengths."""
    settings = getattr(transformers, f"{family}Config")(**SMALL | FAMILIES[family])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(settings).eval()
    return model, [torch.randint(0, 64, (length,)) for length in (9, 12, 9, 7)]


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_by_layer_sees_what_the_whole_model_computes(family: str) -> None:
    model, sequences = model_and_text(family)
    norms: dict[str, torch.Tensor] = {}

    def visit(name: str, layer: nn.Module, run: Any) -> None:
        listening = {
            f"{name}.{n}": InputNorm(LinearWeight(m)) for n, m in layer.named_modules() if isinstance(m, nn.Linear)
        }
        run()
        norms.update({key: norm.close(key, Group(None)) for key, norm in listening.items()})

    layer_by_layer(model, sequences, visit)
    assert find_layers(model)[0] == "model.layers"
    targets = find_targets(model)
    assert norms.keys() == targets.keys()
    listening = {name: InputNorm(linear) for name, linear in targets.items()}
    with torch.no_grad():
        for sequence in sequences:
            model(sequence[None])
    for name in targets:
        torch.testing.assert_close(norms[name], listening[name].close(name, Group(None)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_by_layer_gradients_are_those_of_the_whole_model(family: str) -> None:
    model, sequences = model_and_text(family)
    expected = pruning_reference.curvature_norms(model, sequences)
    model.requires_grad_(False)
    found: dict[str, torch.Tensor] = {}

    def visit(name: str, layer: nn.Module, run: Any) -> None:
        inside = {key: target for key, target in find_targets(model).items() if key.startswith(f"{name}.")}
        watching = {key: OutputGradientNorm(target) for key, target in inside.items()}
        run()
        found.update({key: norm.close(key, Group(None)) for key, norm in watching.items()})

    order = list(BackwardCalibration(model, sequences, Group(None)).walk_back(visit, progress=False))
    assert order == [f"model.layers.{number}" for number in (2, 1, 0)] and found.keys() == expected.keys()
    for name, (_, outputs) in expected.items():
        torch.testing.assert_close(found[name].double(), outputs, rtol=1e-4, atol=1e-7)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_that_are_nothing_or_not_finite_are_refused() -> None:
    linear = nn.Linear(3, 2, bias=False)
    for factor, kind in ((0.0, "all 0"), (float("inf"), "not finite")):
        norm = OutputGradientNorm(LinearWeight(linear))
        (linear(torch.ones(4, 3, requires_grad=True)).sum() * factor).backward()
        with pytest.raises(ValueError, match=f"gradients behind model.x are {kind}.*--method wanda"):
            norm.close("model.x", Group(None))


def test_layers_in_another_place_are_found() -> None:
    settings = transformers.OPTConfig(
        hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=64, word_embed_proj_dim=16
    )
    model = transformers.OPTForCausalLM(settings).eval()
    visited: list[str] = []
    layer_by_layer(model, [torch.arange(9)], lambda name, layer, run: visited.append(name))
    assert visited == ["model.decoder.layers.0", "model.decoder.layers.1"]


def test_models_that_are_no_plain_chain_are_refused() -> None:
    layers = {"num_hidden_layers": 2, "intermediate_size": [24] * 2, "layer_types": ["full_attention"] * 2}
    settings = transformers.Gemma3nTextConfig(
        **SMALL | layers,
        activation_sparsity_pattern=[0.0] * 2,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=64,
        laurel_rank=4,
    )
    model = transformers.Gemma3nForCausalLM(settings).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("correct_output_scale"):  # starts at 0, which would hide what each layer gets from the tokens
            nn.init.ones_(parameter)
    with pytest.raises(ValueError, match="more than the output of the layer before"):
        layer_by_layer(model, [torch.arange(9)], lambda name, layer, run: run())
    model._no_split_modules = []
    with pytest.raises(ValueError, match="has 0 lists of decoder layers"):
        find_layers(model)


@given(data=st.data())
def test_selection_is_exact_with_ties_zeros_and_dead_inputs(data: Any) -> None:
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 7))
    values = data.draw(
        st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0]), min_size=rows * columns, max_size=rows * columns)
    )
    norm = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 1.0, 3.0]), min_size=columns, max_size=columns)))
    sparsity, group = data.draw(st.floats(0.05, 0.95)), data.draw(st.sampled_from(["row", "layer"]))
    weight = torch.tensor(values).view(rows, columns)
    scores = wanda_scores(weight, norm)
    ranked = np.where(weight.numpy() == 0, -1.0, scores.numpy())
    expected = weight.numpy() * reference_mask(ranked, sparsity, group)
    pruned = weight.clone()
    with mock.patch.object(masks, "_BLOCK", data.draw(st.sampled_from([1, 8, 1 << 22]))):
        pruned[select_pruned(scores, weight, Ranking(group, sparsity), Group(None))] = 0.0
    assert np.array_equal(pruned.numpy(), expected)
    size = columns if group == "row" else rows * columns
    before, after = (int((w.view(-1, size)[0] == 0).sum()) for w in (weight, pruned))
    assert after == max(before, int(sparsity * size + 0.5))


def test_a_linear_that_sees_no_token_or_a_broken_one() -> None:
    linear = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="no calibration token reached expert"):
        InputNorm(LinearWeight(linear)).close("expert", Group(None))
    norm = InputNorm(LinearWeight(linear))
    linear(torch.tensor([[1.0, float("inf"), 0.0]]))
    with pytest.raises(ValueError, match="inputs of it are not finite"):
        norm.close("it", Group(None))


def spoiled(folder: Path, to: Path, name: str, value: float) -> Path:
    """A copy of a model folder with one weight filled with a value."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    tensors = load_file(to / "model.safetensors")
    tensors[name][:, :] = value
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_user_errors_leave_nothing_behind(dense: Path, tmp_path: Path) -> None:
    text = dense.parent / "text.jsonl"
    pruned = tmp_path / "pruned"
    prune_folder(configure(dense, pruned), progress=False)
    weight = "model.layers.1.mlp.up_proj.weight"
    broken = spoiled(dense, tmp_path / "broken", weight, float("nan"))
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (pruned, {}, "59.6 % of the target weights are 0, it was pruned already"),
        (tmp_path / "gone", {}, "is not a folder"),
        (tmp_path, {}, "has no config.json: needs the folder"),
        (broken, {}, "up_proj.weight has values that are not finite"),
        (dense, {"sequences": 10**6}, "--sequences asks for 1000000"),
        (dense, {"targets": "nothing"}, "matches no linear"),
        (dense, {"targets": "q_proj("}, "is no regular expression .missing"),
        (dense, {"targets": "lm_head"}, "target lm_head is outside the decoder layers"),
        (dense, {"data": DataConfig(path=str(tmp_path / "no.txt"))}, "no.txt does not exist"),
    ]
    there = sorted(tmp_path.iterdir())
    for model, over, message in cases:
        with pytest.raises(ValueError, match=message):
            prune_folder(configure(model, tmp_path / "out", text=text, **over), progress=False)
        assert sorted(tmp_path.iterdir()) == there, message
    with pytest.raises(ValueError, match="exists already"):
        prune_folder(configure(dense, pruned), progress=False)


def test_tied_weights(dense: Path, tmp_path: Path) -> None:
    model = dense_folder(tmp_path / "tied", tie_word_embeddings=True)
    text = dense.parent / "text.jsonl"
    prune_folder(configure(model, tmp_path / "out", text=text), progress=False)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    with pytest.raises(ValueError, match="is tied to"):
        prune_folder(configure(model, tmp_path / "out2", text=text, targets="lm_head"), progress=False)


def test_rows_that_were_empty_before_are_kept_and_named(
    dense: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = dense_folder(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3] = 0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    counts = prune_folder(configure(model, tmp_path / "out", text=dense.parent / "text.jsonl"), progress=False)
    zeros = {count.name: count.zeros for count in counts}
    assert zeros["model.layers.0.mlp.up_proj"] == 47 * 19 + 32
    assert "model.layers.0.mlp.up_proj has 925 zeros, 912 asked for" in caplog.text


def test_the_command_prunes_from_a_recipe(dense: Path, tmp_path: Path, cache: Path) -> None:
    recipe = tmp_path / "prune.yaml"
    recipe.write_text(
        f"model: {{path: {dense}}}\ndata:\n  path: {dense.parent / 'text.jsonl'}\n  seq_len: 32\nsequences: 12\n"
        f"output: {tmp_path / 'wrong'}\n"
    )
    done = run_script("launch/prune.py", "--config", recipe, "--output", tmp_path / "out", "--sparsity", "0.5")
    assert done.returncode == 0, done.stderr
    assert "self_attn.q_proj (2 x)" in done.stdout and "50.00 %" in done.stdout and "Pruning layers" in done.stderr
    assert json.loads((tmp_path / "out" / "pruning.json").read_text())["reached"] == 0.5
    assert not (tmp_path / "wrong").exists()


def test_the_command_reports_what_is_wrong(tmp_path: Path, cache: Path) -> None:
    done = run_script(
        "launch/prune.py", "--model.path=gone", "--data.path=x.txt", "--sparsity=60", f"--output={tmp_path / 'out'}"
    )
    assert done.returncode == 2
    assert done.stderr.strip() == "prune.py: error: sparsity=60.0: needs a share above 0 and below 1"
