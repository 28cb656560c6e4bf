"""Weights go straight into shards: the same bits as transformers' own loading, and no rank holds the whole model."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import tests.preload  # noqa: F401
from seft_dist.backends.shards import stored_part
from seft_dist.config import ModelConfig
from seft_dist.io import weights
from seft_dist.io.models import load_model, named_state
from seft_dist.io.source import open_source
from tests.folders import model_folder
from tests.models import prune_, tiny_llama
from tests.ranks import return_freed_memory, run_ranks

DS = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
IDS = torch.arange(16).view(1, 16)


def load(folder: Path, sharding: Any, dtype: str = "auto", **over: Any) -> Any:
    ds = DS | {"bf16": {"enabled": dtype == "bfloat16"}}
    if sharding == "zero3":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    source = open_source(ModelConfig(path=str(folder), dtype=dtype))  # type: ignore[arg-type]
    return load_model(source, sharding=sharding, ds_config=ds, **over)


def whole(parameter: Any) -> Tensor:
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    value = parameter.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("sharding", "world_size", "dtype", "over"),
    [
        ("none", 1, "auto", {}),
        ("none", 1, "bfloat16", {"activation_checkpointing": True}),
        ("fsdp", 1, "auto", {}),
        ("fsdp", 3, "bfloat16", {}),
        ("fsdp", 4, "auto", {"replicas": 2}),
        ("fsdp", 2, "auto", {"offload": True}),
        ("zero3", 1, "auto", {}),
        ("zero3", 3, "bfloat16", {}),
    ],
)
def test_the_bits_of_from_pretrained(
    sharding: str, world_size: int, dtype: str, over: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    prune_(model)
    model.save_pretrained(tmp_path, max_shard_size="15KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)

    def on_rank(rank: int, world: int) -> float:
        loaded = load(tmp_path, sharding, dtype, **over)
        assert loaded.training and not loaded.config.use_cache
        shared = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
        assert shared == tied
        for (name, mine), theirs in zip(named_state(loaded).items(), expected.parameters(), strict=True):
            assert torch.equal(whole(mine), theirs), name
        for mine, theirs in zip(loaded.buffers(), expected.buffers(), strict=True):
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
        if sharding == "zero3":  # runs only inside an engine
            return 0.0
        with torch.no_grad():
            return float((loaded(IDS).logits - expected(IDS).logits).abs().max())

    assert run_ranks(on_rank, world_size) == [0.0] * world_size


def test_old_and_foreign_keys(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    computed = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(weights | computed, folder / "model.safetensors", {"format": "pt"})
    load(folder, "none")  # transformers of old stored these
    for change, message in (
        ({"lora_A.weight": torch.ones(1)}, "lora_A.weight not expected"),
        ({"model.norm.weight": None}, "model.norm.weight missing"),
    ):
        changed = {name: value for name, value in (weights | change).items() if value is not None}
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            load(folder, "none")


def test_half_precision_needs_a_choice(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", torch.float16)
    with pytest.raises(ValueError, match="--model.dtype float32 or bfloat16"):
        load(folder, "none")
    assert load(folder, "none", "bfloat16").dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["fsdp", "zero3"])
def test_memory_of_a_rank_falls_with_the_number_of_ranks(sharding: str, tmp_path: Path) -> None:
    model = tiny_llama(hidden_size=512, intermediate_size=1536, num_hidden_layers=16, vocab_size=8192)
    size = sum(parameter.numel() for parameter in model.parameters()) * 4
    largest = max(parameter.numel() for parameter in model.parameters()) * 4
    model.save_pretrained(tmp_path)
    del model

    def on_rank(rank: int, world: int) -> tuple[int, int]:
        return_freed_memory()
        before, peak, done = anonymous(), 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.is_set():
                return_freed_memory()  # blocks of the heap that tests before this one have left are used again
                peak = max(peak, anonymous())
                time.sleep(0.002)

        thread = threading.Thread(target=watch)
        thread.start()
        loaded = load(tmp_path, sharding)
        done.set()
        thread.join()
        stored = sum(stored_part(parameter)[0].numel() for parameter in loaded.parameters()) * 4
        return peak - before, stored

    # Beside its part a rank holds one tensor at a time (ZeRO-3 cuts each whole one up) and what libraries allocate.
    slack = 4 * largest + 30e6
    for world_size in (1, 4):
        for peak, stored in run_ranks(on_rank, world_size):
            assert stored <= size / world_size * 1.01
            assert peak < stored + slack < (0.7 * size if world_size == 4 else 2 * size), (peak, stored, size)


def test_files_that_were_read_do_not_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_MOST_TOUCHED", limit := 1 << 20)
    save_file({f"t{i}": torch.full((1 << 17,), float(i)) for i in range(16)}, tmp_path / "model.safetensors")
    opened, most = weights.Weights(tmp_path), 0
    for i in range(16):
        assert opened.read(f"t{i}").eq(i).all()
        most = max(most, mapped(tmp_path))
    assert limit // 2 <= most <= 2 * limit
    tensor = opened.read("t3")
    opened.release()
    assert tensor.eq(3).all() and opened.read("t4").eq(4).all()

    loaded = load(model_folder(tmp_path / "llama"), "none")
    assert mapped(tmp_path / "llama") == 0 and len(list(loaded.parameters()))


def mapped(folder: Path) -> int:
    """Bytes of a folder's files that are part of this process's resident set."""
    entries = Path("/proc/self/smaps").read_text().split(str(folder))[1:]
    return sum(int(entry.split("Rss:")[1].split()[0]) * 1024 for entry in entries)


def anonymous() -> int:
    """Bytes of this process that are no file's, i.e. not the page cache of the model's files."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024
