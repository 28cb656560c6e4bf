"""Hashes and sketches that depend on no layout, near-ties, fingerprints of model and data."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import tests.preload  # noqa: F401
from seft_dist.config import DataConfig, ModelConfig, TrainConfig
from seft_dist.data.batches import BatchStream, collate
from seft_dist.data.load import load_sequences
from seft_dist.data.tokenizer import load_tokenizer
from seft_dist.io.source import open_source
from seft_dist.session.distributed import start
from seft_dist.sparsity.hashes import SCALE, distance, hash_of_entries, hash_of_set, hash_of_weight, sketch
from seft_dist.training.build import build
from seft_dist.training.fingerprint import data_fingerprint, has_dropout, model_fingerprint
from seft_dist.training.trace import hash_of_batch
from tests.models import moving
from tests.ranks import run_ranks

VECTORS = st.tuples(st.integers(0, 2**31), st.integers(1, 60), st.lists(st.integers(0, 60), max_size=4))


@settings(max_examples=60, deadline=None)
@given(VECTORS)
def test_hashes_are_sums_over_any_division_in_any_order(drawn: tuple[int, int, list[int]]) -> None:
    seed, count, cuts = drawn
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randperm(1000, generator=generator)[:count].to(torch.int32)
    values = torch.randn(count, generator=generator)
    shuffled = torch.randperm(count, generator=generator)
    bounds = [0, *sorted(min(cut, count) for cut in cuts), count]
    parts = [shuffled[start:stop] for start, stop in zip(bounds, bounds[1:], strict=False)]
    assert int(hash_of_set(positions)) == sum_of(hash_of_set(positions[part]) for part in parts)
    whole = hash_of_entries(positions, values)
    assert int(whole) == sum_of(hash_of_entries(positions[part], values[part]) for part in parts)
    sketches = torch.stack([sketch(positions[part], values[part]) for part in parts])
    assert torch.equal(sketch(positions, values), sketches.sum(0))
    intervals = list(zip(bounds, bounds[1:], strict=False))
    assert int(hash_of_weight(values, 7)) == sum_of(hash_of_weight(values[a:b], 7 + a) for a, b in intervals)


def sum_of(terms: Any) -> int:
    return int(torch.stack(list(terms)).sum())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 49), st.integers(0, 31))
def test_a_flipped_bit_or_a_moved_position_shows(seed: int, which: int, bit: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    positions, values = torch.randperm(1000, generator=generator)[:50], torch.randn(50, generator=generator)
    flipped = values.clone()
    flipped.view(torch.int32)[which] ^= (1 << bit) - (1 << 32 if bit == 31 else 0)
    moved = positions.clone()
    moved[which] = 1000
    swapped = values.clone()
    swapped[[which, which - 1]] = values[[which - 1, which]]
    hashes = {int(hash_of_entries(*pair)) for pair in ((positions, values), (positions, flipped), (moved, values))}
    assert len({*hashes, int(hash_of_entries(positions, swapped))}) == 4
    assert hash_of_weight(values, 0) != hash_of_weight(flipped, 0) != hash_of_weight(values, 1)
    assert hash_of_set(positions) != hash_of_set(moved)


def test_pieces_and_types_of_numbers() -> None:
    positions = torch.arange(50_000)  # more than one piece
    values = torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    assert int(hash_of_set(positions)) == sum_of(hash_of_set(part) for part in positions.split(777))
    assert int(hash_of_weight(values, 3)) == sum_of(
        hash_of_weight(part, 3 + 777 * i) for i, part in enumerate(values.split(777))
    )
    assert hash_of_entries(positions, values.bfloat16()) != hash_of_entries(positions, values)
    assert hash_of_weight(torch.tensor([0.0, 1.0]), 0) != hash_of_weight(torch.tensor([-0.0, 1.0]), 0)
    assert hash_of_weight(torch.zeros(9), 0) == hash_of_set(positions[:0]) == 0


def test_sketches_tell_how_far_two_runs_are_apart() -> None:
    ratios = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        positions = torch.randperm(1 << 20, generator=generator)[:5000]
        deltas = 1e-3 * torch.randn(5000, generator=generator)
        change = torch.zeros(5000)
        change[:200] = 1e-6 * torch.randn(200, generator=generator)
        one, two = sketch(positions, deltas), sketch(positions, deltas + change)
        true = float(((deltas + change) - deltas).double().norm())
        ratios.append(distance(one.tolist(), two.tolist()) / SCALE / true)
        moved = positions.clone()
        moved[0] += 1 << 20  # one in, one out
        assert round(distance(sketch(positions).tolist(), sketch(moved).tolist()) ** 2) in (0, 2, 4)
    assert 0.9 < sum(ratios) / len(ratios) < 1.05 and min(ratios) > 0.3 and max(ratios) < 2


def prints_of(folder: Path, world_size: int = 1, targets: str = "all-linear", **over: Any) -> set[str]:
    """Fingerprints of a model, as all ranks see them."""

    def on_rank(rank: int, world: int) -> str:
        model = ModelConfig(path=str(folder), **over)
        backend: Any = "fsdp" if world == 2 else "auto" if world == 1 else "ddp"
        seft = moving(density=0.05, targets=targets)
        config = TrainConfig(model=model, data=DataConfig(path="-"), output="-", backend=backend, seft=seft)
        ranks, source = start(threads=1), open_source(model)
        run = build(config, ranks, source, None)
        run.method.attach()
        return model_fingerprint(source, run.method, ranks)

    return set(run_ranks(on_rank, world_size))


def test_fingerprint_of_a_model(inputs: Path, tmp_path: Path) -> None:
    original = prints_of(inputs / "pruned")
    assert len(original) == 1
    assert original == prints_of(inputs / "pruned", 2) == prints_of(inputs / "pruned", 3)
    assert original == prints_of(inputs / "pruned", targets="q_proj|down_proj")
    assert original != prints_of(inputs / "pruned", dtype="bfloat16")
    weights = load_file(inputs / "pruned" / "model.safetensors")
    cut = shutil.copytree(inputs / "pruned", tmp_path / "cut")
    (cut / "model.safetensors").unlink()
    names = sorted(weights)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys_ in files.items():
        save_file({name: weights[name] for name in keys_}, cut / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, keys_ in files.items() for name in keys_}}
    (cut / "model.safetensors.index.json").write_text(json.dumps(index))
    assert original == prints_of(cut)
    found = [original]
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        changed = {key: value.clone() for key, value in weights.items()}
        place = int(changed[name].view(-1).nonzero()[0])
        changed[name].view(-1).view(torch.int32)[place] ^= 1
        other = shutil.copytree(inputs / "pruned", tmp_path / name)
        save_file(changed, other / "model.safetensors", {"format": "pt"})
        found.append(prints_of(other))
    config = json.loads((inputs / "pruned" / "config.json").read_text())
    for key, value, same in (("transformers_version", "4.0.0", True), ("rms_norm_eps", 1e-3, False)):
        other = shutil.copytree(inputs / "pruned", tmp_path / key)
        (other / "config.json").write_text(json.dumps(config | {key: value}))
        assert (prints_of(other) == original) == same
    assert len(set.union(*found)) == 4


def data_prints(inputs: Path, lines: list[dict[str, Any]], world_size: int = 1, seq_len: int = 16) -> set[str]:
    path = inputs / "other.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def on_rank(rank: int, world: int) -> str:
        ranks = start(threads=1)
        config = DataConfig(path=str(path), seq_len=seq_len)
        tokenizer = load_tokenizer(ModelConfig(path=str(inputs / "pruned")))
        stream = BatchStream(load_sequences(config, tokenizer, progress=False), batch_size=1)
        return data_fingerprint(stream.sequences, ranks)

    return set(run_ranks(on_rank, world_size))


def test_fingerprint_of_text(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seft_dist.training.fingerprint._SEQUENCES", 7)
    lines = [{"text": f"w{i} w{i + 1} w{i + 2} w3 w4"} for i in range(60)]
    original = data_prints(inputs, lines)
    assert len(original) == 1 == len(original | data_prints(inputs, lines, 3))
    assert original == data_prints(inputs, [line | {"more": "x"} for line in lines])  # the same text, another file
    others = [
        data_prints(inputs, [{"text": "w9 w1 w2 w3 w4"}, *lines[1:]]),
        data_prints(inputs, lines[::-1]),
        data_prints(inputs, lines, seq_len=15),
        data_prints(inputs, lines[:-5]),
    ]
    assert len(set.union(original, *others)) == 5


def test_fingerprint_of_conversations(inputs: Path) -> None:
    lines = [{"instruction": f"w{i} w2", "output": f"w{i + 1} w3 w4"} for i in range(40)]
    original = data_prints(inputs, lines)
    assert original == data_prints(inputs, lines, 2)
    moved = [{"instruction": "w0 w2 w1", "output": "w3 w4"}, *lines[1:]]
    assert original != data_prints(inputs, moved)


def test_dropout_is_read_from_the_settings() -> None:
    assert not has_dropout(
        {"attention_dropout": 0.0, "summary_first_dropout": 0.1, "hidden_size": 8, "resid_pdrop": None}
    )
    assert has_dropout({"attention_dropout": 0.0, "resid_pdrop": 0.1})


def test_contents_are_what_training_sees(inputs: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(path=str(inputs / "pruned")))
    blocks = load_sequences(DataConfig(path=str(inputs / "text.jsonl"), seq_len=16), tokenizer, progress=False)
    lengths, *tokens = blocks.contents(3, 9)
    assert lengths.tolist() == [16] * 6
    expected = torch.cat([blocks[i][0] for i in range(3, 9)])
    assert torch.cat([torch.tensor(part) for part in tokens]).tolist() == expected.tolist()


def test_hash_of_a_batch_is_of_its_sequences() -> None:
    samples = [(torch.arange(n) + 5, torch.arange(n) + 5) for n in (4, 7, 9)]
    together = int(hash_of_batch(collate(samples, 0)))
    assert together == sum_of(hash_of_batch(collate([sample], 1)) for sample in reversed(samples))
    nothing = (torch.arange(6), torch.full((6,), -100))
    assert together == int(hash_of_batch(collate([*samples, nothing], 0)))
    ids, labels = samples[0]
    masked = torch.where(torch.arange(4) < 2, -100, labels)
    for other in ((ids + 1, labels), (ids, masked), (ids.flip(0), labels)):
        assert together != int(hash_of_batch(collate([other, *samples[1:]], 0)))
