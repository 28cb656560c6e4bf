"""Models that are read and written keep dtypes, separate heads, zeros, and weights that are too small for a dtype."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tests.preload  # noqa: F401
from seft_dist.backends.packed import packed_of
from seft_dist.config import ModelConfig, PruneConfig
from seft_dist.export.delta import apply_delta, make_delta
from seft_dist.export.export import load_packed, pack_model, write_model
from seft_dist.io.models import load_model
from seft_dist.io.source import Source, open_source
from seft_dist.io.weights import Weights
from seft_dist.pruning.prune import prune_folder
from seft_dist.sparsity.casts import cast_weight, unsigned_zeros
from tests.families import READ_ONLY, family_folder
from tests.models import batch
from tests.ranks import run_ranks

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
LEAST = 2.0**-133
"""Smallest number above 0 in bfloat16."""


def opened(folder: Path, dtype: Any = "auto") -> Source:
    return open_source(ModelConfig(path=str(folder), dtype=dtype))


def pruned(folder: Path, output: Path, **options: Any) -> Path:
    model = ModelConfig(path=str(folder), **options)
    prune_folder(PruneConfig(model=model, method="magnitude", output=str(output)), progress=False)
    return output


def changed(folder: Path, **tensors: torch.Tensor) -> Path:
    file = folder / "model.safetensors"
    save_file(load_file(file) | {name.replace("__", "."): value for name, value in tensors.items()}, file)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(batch(0)["input_ids"]).logits


def mixed_folder(folder: Path) -> Path:
    """A DeepSeek-V3 in bf16 with a router's bias in fp32, as published."""
    family_folder(folder, "deepseek_v3")
    file = folder / "model.safetensors"
    state = {name: value.bfloat16() for name, value in load_file(file).items()}
    state[BIAS] = torch.tensor([4.0152, 4.0056, 4.0, 3.9])
    state["model.norm.weight"] = state["model.norm.weight"].float() + 1e-4
    save_file(state, file)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"dtype": "bfloat16"}))
    return folder


def test_tensors_keep_their_type(tmp_path: Path) -> None:
    dense = mixed_folder(tmp_path / "dense")
    stored = load_file(dense / "model.safetensors")
    pruned(dense, tmp_path / "pruned")
    write_model(opened(tmp_path / "pruned"), tmp_path / "plain", torch.bfloat16)
    pack_model(opened(tmp_path / "plain"), tmp_path / "packed", torch.bfloat16)
    write_model(opened(tmp_path / "packed"), tmp_path / "again")
    for name in ("pruned", "plain", "again"):
        found = load_file(tmp_path / name / "model.safetensors")
        for key in (BIAS, "model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.gate.weight"):
            assert found[key].dtype == stored[key].dtype and torch.equal(found[key], stored[key]), (name, key)
        assert found["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert torch.equal(logits(load_model(opened(tmp_path / "pruned")).eval()), logits(wanted))
    assert torch.equal(logits(load_packed(tmp_path / "packed")), logits(wanted))


def test_a_sharded_model_has_both_types(tmp_path: Path) -> None:
    dense = mixed_folder(tmp_path / "dense")
    wanted = logits(AutoModelForCausalLM.from_pretrained(dense))

    def on_rank(rank: int, world_size: int) -> None:
        model = load_model(opened(dense), sharding="fsdp").eval()
        assert {value.dtype for value in model.parameters()} == {torch.bfloat16, torch.float32}
        assert torch.equal(logits(model), wanted)

    run_ranks(on_rank, 2, timeout=100)


def test_a_cast_leaves_in_fp32_what_the_family_keeps_so(tmp_path: Path) -> None:
    dense = changed(
        family_folder(tmp_path / "dense", "deepseek_v3"), **{BIAS: torch.tensor([4.0152, 4.0056, 4.0, 3.9])}
    )
    write_model(opened(dense), tmp_path / "plain", torch.bfloat16)
    found, stored = (load_file(folder / "model.safetensors") for folder in (tmp_path / "plain", dense))
    kept = {name for name, value in found.items() if value.dtype == torch.float32}
    assert kept == {BIAS, "model.layers.1.mlp.gate.weight"} and all(torch.equal(found[n], stored[n]) for n in kept)


def test_a_head_of_its_own_is_used_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = family_folder(tmp_path / "dense", "llama3")
    embeddings = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    changed(folder, lm_head__weight=embeddings.clone())
    assert opened(folder).config.tie_word_embeddings and not caplog.records  # the same values: still tied
    changed(folder, lm_head__weight=embeddings + 0.5)
    wanted = logits(AutoModelForCausalLM.from_pretrained(folder))
    assert torch.equal(logits(load_model(opened(folder)).eval()), wanted)
    assert "a head that differs" in caplog.text
    write_model(opened(folder), tmp_path / "plain")
    pruned(folder, tmp_path / "pruned")
    for name in ("plain", "pruned"):
        assert json.loads((tmp_path / name / "config.json").read_text())["tie_word_embeddings"] is False
        assert torch.equal(load_file(tmp_path / name / "model.safetensors")["lm_head.weight"], embeddings + 0.5)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), wanted)


def test_what_is_too_small_for_a_type_does_not_become_zero(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, name = family_folder(tmp_path / "dense", "llama2"), "model.layers.0.mlp.up_proj.weight"
    weight = load_file(folder / "model.safetensors")[name]
    weight[0, :4] = torch.tensor([2e-41, -2e-41, 0.0, 1e-45])
    changed(folder, **{name: weight})
    wanted = torch.tensor([LEAST, -LEAST, 0.0, LEAST], dtype=torch.bfloat16)
    write_model(opened(folder), tmp_path / "plain", torch.bfloat16)
    assert "3 weights are too small" in caplog.text
    caplog.clear()
    held = load_model(opened(folder, "bfloat16")).get_parameter(name).detach()
    assert "3 weights are too small" in caplog.text
    for found in (load_file(tmp_path / "plain" / "model.safetensors")[name], held):
        assert torch.equal(found[0, :4], wanted)
    make_delta(opened(folder), opened(tmp_path / "plain"), tmp_path / "d.safetensors")
    apply_delta(opened(folder), tmp_path / "d.safetensors", tmp_path / "applied")
    assert torch.equal(load_file(tmp_path / "applied" / "model.safetensors")[name][0, :4], wanted)


def test_cast_and_sign_of_single_values() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -2e-41, float("nan"), float("inf")])
    cast, small = cast_weight(values, torch.bfloat16)
    assert small == 1 and float(cast[3]) == -LEAST and torch.equal(cast[:3], values[:3].bfloat16())
    whole = torch.tensor([1, 0])
    assert cast_weight(whole, torch.bfloat16) == (whole, 0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        signed = torch.tensor([-0.0, 0.0, -2.0, float("nan"), float("-nan"), float("-inf")]).to(dtype)
        plain = unsigned_zeros(signed)
        assert plain.signbit().tolist()[:2] == [False, False] and plain[0] == 0
        assert torch.equal(plain[2:].view(torch.uint8), signed[2:].view(torch.uint8))


def test_zeros_lose_their_sign_wherever_a_model_is_read(tmp_path: Path) -> None:
    folder, name = family_folder(tmp_path / "dense", "llama2"), "model.layers.0.mlp.up_proj.weight"
    weight = load_file(folder / "model.safetensors")[name]
    changed(folder, **{name: weight * (weight > 0)})  # as pruning by a mask leaves it
    assert load_file(folder / "model.safetensors")[name].signbit().any()
    write_model(opened(folder), tmp_path / "plain")
    size = pack_model(opened(folder), tmp_path / "packed")
    assert size.packed_bytes == pack_model(opened(tmp_path / "plain"), tmp_path / "packed2").packed_bytes
    resident = packed_of(load_model(opened(folder), resident="all-linear").get_parameter(name))
    assert resident is not None
    pruned(folder, tmp_path / "pruned")
    for found in (
        load_model(opened(folder)).get_parameter(name),
        resident.own(),
        load_packed(tmp_path / "packed").get_parameter(name),
        *(load_file(tmp_path / kind / "model.safetensors")[name] for kind in ("plain", "pruned")),
        Weights(folder).read(name),
    ):
        assert not (found.detach().signbit() & (found == 0)).any()


@pytest.mark.parametrize("family", sorted(READ_ONLY))
def test_names_that_transformers_changes(family: str, tmp_path: Path) -> None:
    dense = family_folder(tmp_path / "dense", family)
    wanted = AutoModelForCausalLM.from_pretrained(dense)
    assert torch.equal(logits(load_model(opened(dense)).eval()), logits(wanted))
    pruned(dense, tmp_path / "pruned")
    one, two = (load_file(folder / "model.safetensors") for folder in (dense, tmp_path / "pruned"))
    assert one.keys() == two.keys()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert torch.equal(logits(load_model(opened(tmp_path / "pruned")).eval()), logits(model))


def test_models_without_a_value_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = family_folder(tmp_path / "dense", "llama2")
    changed(
        folder, **{name: torch.zeros_like(value) for name, value in load_file(folder / "model.safetensors").items()}
    )
    with caplog.at_level(logging.WARNING):
        write_model(opened(folder), tmp_path / "plain")
    assert "16 of 16 matrices are all 0" in caplog.text


def test_chat_templates_and_other_tools_entries(tmp_path: Path) -> None:
    folder = family_folder(tmp_path / "dense", "llama2")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"sparsity_config": {"format": "dense"}, "compression_config": {"x": 1}}
    (folder / "config.json").write_text(json.dumps(settings))
    write_model(opened(folder), tmp_path / "plain")
    found = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not {"sparsity_config", "compression_config"} & found.keys()
    assert (tmp_path / "plain" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}"
