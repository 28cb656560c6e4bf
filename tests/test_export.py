"""Export: the folder holds the very bits that were trained, on every layout; so does pruned model + delta file."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import tests.preload  # noqa: F401
from seft_dist import SeftOptimizer
from seft_dist.config import ModelConfig
from seft_dist.export.delta import KINDS, apply_delta
from seft_dist.export.export import export_model
from seft_dist.io.models import load_model
from seft_dist.io.source import open_source
from seft_dist.io.weights import Weights, WeightsWriter
from tests.folders import model_folder
from tests.models import batch, moving
from tests.ranks import run_ranks
from tests.scripts import run_script

ROOT = Path(__file__).resolve().parents[1]


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))


def assert_same_model(one: Path, other: Path) -> None:
    first, second = Weights(one), Weights(other)
    assert first.tensors.keys() == second.tensors.keys()
    for name in first.tensors:
        assert same_bits(first.read(name), second.read(name)), name


def train_and_export(
    folder: Path, output: Path, dtype: str = "auto", sharding: Any = "none", world_size: int = 1
) -> None:
    """Three steps with an evolution, then an export; every rank checks nothing but rank 0 writes."""

    def on_rank(rank: int, world: int) -> None:
        ds = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3},
            "zero_allow_untested_optimizer": True,
        }
        ds["bf16"] = {"enabled": dtype == "bfloat16"}
        if sharding == "zero3":
            import deepspeed

            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        source = open_source(ModelConfig(path=str(folder), dtype=dtype))  # type: ignore[arg-type]
        model = load_model(source, sharding=sharding, ds_config=ds)
        seft = SeftOptimizer(model, moving(density=0.1, interval=2, steps=10), lr=1e-2)
        engine = None
        if sharding == "zero3":
            engine, *_ = deepspeed.initialize(model=model, optimizer=seft, config=ds)
        for step in range(3):
            loss = (engine or model)(**batch(step, rank)).loss
            (engine.backward if engine else lambda value: value.backward())(loss)
            (engine or seft).step()
            seft.zero_grad()
        trained = {name: seft.backend.full(module.weight).clone() for name, module in seft._targets.items()}
        export_model(
            model,
            seft.backend.full,
            output / "model",
            source,
            writes=rank == 0,
            delta=output / "delta.safetensors",
            targets=seft.target_names,
        )
        torch.distributed.barrier()
        weights = Weights(output / "model")
        for name, weight in trained.items():
            assert same_bits(weights.read(f"{name}.weight"), weight), name

    run_ranks(on_rank, world_size, timeout=100)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("dtype", "sharding", "world_size"),
    [
        ("auto", "none", 1),
        ("bfloat16", "none", 1),
        ("bfloat16", "fsdp", 3),
        ("auto", "fsdp", 2),
        ("bfloat16", "zero3", 2),
    ],
)
def test_export_and_delta(dtype: str, sharding: str, world_size: int, tied: bool, tmp_path: Path) -> None:
    pruned = model_folder(tmp_path / "pruned", tie_word_embeddings=tied)
    train_and_export(pruned, tmp_path, dtype, sharding, world_size)
    names = Weights(tmp_path / "model").tensors.keys()
    assert not any("anchor" in name for name in names) and ("lm_head.weight" in names) is not tied
    assert names == Weights(pruned).tensors.keys()
    apply_delta(open_source(ModelConfig(path=str(pruned))), tmp_path / "delta.safetensors", tmp_path / "repaired")
    assert_same_model(tmp_path / "model", tmp_path / "repaired")
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert files == {path.name for path in (tmp_path / "repaired").iterdir()} >= {"tokenizer.json", "config.json"}
    for name in files - {"model.safetensors"}:
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "repaired" / name).read_bytes(), name
    logits = [
        AutoModelForCausalLM.from_pretrained(tmp_path / folder)(**batch(0)).logits for folder in ("model", "repaired")
    ]
    assert same_bits(*logits)
    with safe_open(tmp_path / "delta.safetensors", "pt") as delta:
        kinds = {name.rsplit(".", 1)[1] for name in delta.keys()}  # noqa: SIM118  # not a dict
    assert kinds == {f"{kind}{ending}" for kind in KINDS for ending in ("", "_xor")}


def test_delta_of_another_model_is_refused(tmp_path: Path) -> None:
    pruned = model_folder(tmp_path / "pruned")
    train_and_export(pruned, tmp_path)
    other = model_folder(tmp_path / "other", seed=1)
    small = model_folder(tmp_path / "small", num_hidden_layers=1)
    delta = tmp_path / "delta.safetensors"
    for base, message in ((other, "another pruned model"), (small, "model.layers.1.")):
        with pytest.raises(ValueError, match=message):
            apply_delta(open_source(ModelConfig(path=str(base))), delta, tmp_path / "repaired")
    with pytest.raises(ValueError, match="exists already"):
        apply_delta(open_source(ModelConfig(path=str(pruned))), delta, tmp_path / "model")
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    for file, message in (
        ("x.safetensors", "format None"),
        ("pruned/config.json", "cannot be read"),
        ("none", "is no file"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_delta(open_source(ModelConfig(path=str(pruned))), tmp_path / file, tmp_path / "repaired")
    assert not list(tmp_path.glob("repaired*"))


def test_weights_in_several_files(tmp_path: Path) -> None:
    tensors = {f"w{i}": torch.randn(10, 10, generator=torch.Generator().manual_seed(i)) for i in range(5)}
    writer = WeightsWriter(tmp_path, max_bytes=900)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)] + ["model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2000 and index["weight_map"].keys() == tensors.keys()
    weights = Weights(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(weights.read(name), tensor.view(-1))
        assert torch.equal(weights.read(name, 17, 63), tensor.view(-1)[17:63])
        assert weights.read(name, 5, 5).numel() == 0
    (tmp_path / files[1]).unlink()
    with pytest.raises(ValueError, match="lacks model-00002"):
        Weights(tmp_path)
    (tmp_path / files[1]).write_bytes(b"half")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        Weights(tmp_path)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    pruned = model_folder(tmp_path / "pruned")
    train_and_export(pruned, tmp_path, "bfloat16")

    def run(base: Path, output: str) -> subprocess.CompletedProcess[str]:
        delta = tmp_path / "delta.safetensors"
        return run_script("launch/export.py", "--base", base, "--delta", delta, "--output", tmp_path / output)

    done = run(pruned, "repaired")
    assert done.returncode == 0, done.stderr
    assert_same_model(tmp_path / "model", tmp_path / "repaired")
    failed = run(tmp_path / "nowhere", "again")
    assert failed.returncode == 2 and "is not a folder" in failed.stderr and "Traceback" not in failed.stderr
