"""The packed form: every bit comes back, files are read a tensor at a time, and damaged ones are refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tests.preload  # noqa: F401
from seft_dist.config import ModelConfig
from seft_dist.export.export import load_packed, pack_model, write_model
from seft_dist.io.models import load_model
from seft_dist.io.packed import INDEX, PackedFiles, PackedWriter, open_weights
from seft_dist.io.source import Source, open_source
from seft_dist.io.weights import Weights
from tests.folders import model_folder
from tests.models import batch
from tests.ranks import run_ranks
from tests.test_export import assert_same_model, same_bits


def opened(folder: Path) -> Source:
    return open_source(ModelConfig(path=str(folder), dtype="float32"))


def packed_folder(folder: Path, **options: Any) -> Path:
    pack_model(opened(model_folder(folder / "pruned", torch.bfloat16)), folder / "packed", **options)
    return folder / "packed"


SPECIAL = [0.0, -0.0, 1.0, -2.5, 1e-40, float("inf"), float("nan"), float("-nan")]
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


@settings(max_examples=80, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(TYPES), max_bytes=st.sampled_from([1, 40, 10**9]))
def test_every_bit_comes_back(
    data: st.DataObject, dtype: torch.dtype, max_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Also NaN, subnormals, tensors without values or without zeros, and any cut into files; zeros lose their sign."""
    folder = tmp_path_factory.mktemp("packed")
    shapes = data.draw(st.lists(st.lists(st.integers(0, 6), max_size=3), min_size=1, max_size=4))
    tensors = {}
    writer = PackedWriter(folder, max_bytes)
    for i, shape in enumerate(shapes):
        numel = torch.Size(shape).numel()
        values = data.draw(st.lists(st.sampled_from(SPECIAL), min_size=numel, max_size=numel))
        numbers = torch.tensor(values, dtype=torch.float64)
        tensor = (numbers if dtype.is_floating_point else numbers.nan_to_num(3, 2, 1).abs()).to(dtype).view(shape)
        tensors[f"t{i}"] = torch.where(tensor == 0, torch.zeros_like(tensor), tensor)
        writer.add(f"t{i}", tensor)
    size = writer.close()
    weights = open_weights(folder)
    assert isinstance(weights, PackedFiles) and weights.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert weights.tensors[name].shape == tensor.shape and weights.tensors[name].dtype == dtype
        assert same_bits(weights.read(name), tensor.view(-1))
        assert same_bits(weights.read(name, 1, tensor.numel()), tensor.view(-1)[1:])
    assert size.packed_bytes <= size.dense_bytes == sum(t.numel() * t.element_size() for t in tensors.values())


def test_the_bytes_are_those_of_the_description(tmp_path: Path) -> None:
    """60 % zeros in bf16: one bit for each position and two bytes for each value, 0.925 bytes a weight."""
    weight = torch.zeros(20, 100, dtype=torch.bfloat16)
    weight.view(-1)[torch.randperm(2000, generator=torch.Generator().manual_seed(0))[:800]] = 1.5
    writer = PackedWriter(tmp_path)
    writer.add("w", weight)
    writer.add("dense", torch.ones(3))
    size = writer.close()
    assert size.bytes_a_weight == 0.925 and (size.sparse_weights, size.sparse_bytes) == (2000, 1850)
    assert (size.dense_bytes, size.packed_bytes) == (4012, 1862)
    stored = load_file(tmp_path / "packed-00001-of-00001.safetensors")
    assert stored.keys() == {"w.mask", "w.values", "dense"}
    octets = stored["w.mask"].numpy()
    mask = [int(octets[i // 8]) >> i % 8 & 1 for i in range(2000)]
    assert mask == (weight.view(-1) != 0).int().tolist() and stored["w.values"].tolist() == [1.5] * 800


@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_of_a_model(tied: bool, tmp_path: Path) -> None:
    pruned = model_folder(tmp_path / "pruned", torch.bfloat16, tie_word_embeddings=tied)
    size = pack_model(opened(pruned), tmp_path / "packed", max_bytes=9000)
    assert len(list((tmp_path / "packed").glob("packed-*"))) > 1
    written = sum(path.stat().st_size for path in (tmp_path / "packed").glob("packed-*"))
    assert size.packed_bytes < written < 1.6 * size.packed_bytes  # this model is so small that headers count
    write_model(opened(tmp_path / "packed"), tmp_path / "plain")
    assert_same_model(pruned, tmp_path / "plain")
    for name in {path.name for path in pruned.iterdir()} - {"model.safetensors"}:
        like = pruned if name in ("generation_config.json", "tokenizer.json") else tmp_path / "packed"
        assert (tmp_path / "plain" / name).read_bytes() == (like / name).read_bytes(), name
    model, wanted = load_packed(tmp_path / "packed"), AutoModelForCausalLM.from_pretrained(pruned)
    assert not model.training and model.config.use_cache and model.dtype == torch.bfloat16
    assert same_bits(model(batch(0)["input_ids"]).logits, wanted(batch(0)["input_ids"]).logits)
    prompt = {"max_new_tokens": 5, "do_sample": False}
    ids = batch(0)["input_ids"]
    assert torch.equal(model.generate(ids, **prompt), wanted.generate(ids, **prompt))


def test_cast_and_files_of_a_size(tmp_path: Path) -> None:
    pruned = model_folder(tmp_path / "pruned")
    write_model(opened(pruned), tmp_path / "plain", torch.bfloat16, max_bytes=9000)
    files = sorted((tmp_path / "plain").glob("*.safetensors"))
    assert len(files) > 1 and all(file.stat().st_size < 12000 for file in files)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert (
        model.dtype == torch.bfloat16
        and json.loads((tmp_path / "plain/config.json").read_text())["dtype"] == "bfloat16"
    )
    wanted = load_model(open_source(ModelConfig(path=str(pruned), dtype="bfloat16")))
    for name, value in wanted.state_dict().items():
        assert same_bits(model.state_dict()[name], value), name


@pytest.mark.slow
def test_packed_model_in_shards(tmp_path: Path) -> None:
    """A packed folder is a model like any other: FSDP2 ranks fill their parts from it."""
    folder = packed_folder(tmp_path)

    def on_rank(rank: int, world: int) -> None:
        model = load_model(open_source(ModelConfig(path=str(folder))), sharding="fsdp")
        weights = Weights(tmp_path / "pruned")
        for name, value in model.state_dict().items():
            assert same_bits(value.full_tensor().reshape(-1), weights.read(name)), name

    run_ranks(on_rank, 2, timeout=100)


def rewrite(file: Path, metadata: dict[str, str] | None = None, **tensors: torch.Tensor) -> None:
    with safe_open(file, "pt") as handle:
        old = dict(handle.metadata())
        kept = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  # not a dict
    save_file(kept | {name.replace("__", "."): value for name, value in tensors.items()}, file, old | (metadata or {}))


def flip(file: Path, offset: int) -> None:
    with file.open("r+b") as handle:
        handle.seek(offset, os.SEEK_END)
        byte = handle.read(1)
        handle.seek(offset, os.SEEK_END)
        handle.write(bytes([byte[0] ^ 1]))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_packed(folder)
    with pytest.raises(ValueError, match=message):
        write_model(opened(folder), folder.with_name("unpacked"))
    assert not list(folder.parent.glob("unpacked*"))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = packed_folder(tmp_path, max_bytes=20000)
    first = folder / next(iter(sorted(path.name for path in folder.glob("packed-*"))))
    whole = first.read_bytes()
    for offset in (-1, -(len(whole) // 3)):
        flip(first, offset)
        refused(folder, "is damaged")
        first.write_bytes(whole)
    first.write_bytes(whole[:-5])
    refused(folder, "not a whole safetensors file")
    first.write_bytes(whole)
    rewrite(first, {"version": "2"})
    refused(folder, "version 2 .* up to 1: update it")
    rewrite(first, {"version": "1", "format": "other"})
    refused(folder, "has format 'other'")
    rewrite(first, {"format": "seft_dist packed", "tensors": "[]"})
    refused(folder, "its list of tensors does not hold what is needed")
    first.write_bytes(whole)
    rewrite(first, extra=torch.ones(2))
    refused(folder, "holds extra, which its header does not mention")
    first.unlink()
    refused(folder, f"lacks {first.name}")


def test_damaged_headers_are_refused(tmp_path: Path) -> None:
    folder = packed_folder(tmp_path)
    file, index = folder / "packed-00001-of-00001.safetensors", json.loads((folder / INDEX).read_text())
    whole, name = file.read_bytes(), "model.layers.0.self_attn.q_proj.weight"
    with safe_open(file, "pt") as handle:
        entries = json.loads(handle.metadata()["tensors"])
    for shape, message in (
        ([31, 32], "cannot be a tensor"),
        ([-32, -32], "cannot be a tensor"),
        ([16, 64], "damaged|shape"),
    ):
        rewrite(file, {"tensors": json.dumps(entries | {name: entries[name] | {"shape": shape}})})
        refused_read(folder, message)
    file.write_bytes(whole)
    for change, message in (
        ({"version": 2}, "version 2"),
        ({"weight_map": {**index["weight_map"], "more": file.name}}, "do not agree about more"),
        ({"weight_map": {**index["weight_map"], name: "../x"}}, "names '../x', which is no file of its folder"),
        ({"weight_map": {**index["weight_map"], name: f"{folder.absolute()}/{file.name}"}}, "no file of its folder"),
        ({"weight_map": {**index["weight_map"], name: 7}}, f"{INDEX} does not hold what is needed: weight_map.*string"),
        ({"weight_map": {}}, "names no tensor"),
        ({"weight_map": 3}, "weight_map: .*pack or download it again"),
    ):
        (folder / INDEX).write_text(json.dumps(index | change))
        refused_read(folder, message)
    (folder / INDEX).write_text("{")
    refused_read(folder, "is no JSON .*pack or download it again")


def refused_read(folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_packed(folder)


def test_what_cannot_be_packed_or_is_not(tmp_path: Path) -> None:
    pruned = model_folder(tmp_path / "pruned")
    with pytest.raises(ValueError, match="is not packed"):
        load_packed(pruned)
    with pytest.raises(ValueError, match="exists already"):
        pack_model(opened(pruned), pruned)
    writer = PackedWriter(tmp_path)
    writer.add("a.mask", torch.ones(1))
    with pytest.raises(ValueError, match="a.mask would be in the file twice"):
        writer.add("a", torch.zeros(64))
