"""The order in which training takes sequences: shares of a mix, groups of one length, records that are kept out."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seft_dist.config import DataConfig, EvalConfig, SeftConfig, SourceConfig
from seft_dist.data.batches import BatchStream
from seft_dist.data.load import load_sequences
from seft_dist.data.order import GROUPED_STEPS, EpochOrder, LengthGrouped, MixedOrder
from seft_dist.data.selection import hash_record
from seft_dist.data.several import MixedSequences
from seft_dist.pruning.calibrate import sample_sequences
from seft_dist.training.trainer import train
from tests.runs import make_config, records, run_config, run_train
from tests.test_train import as_if_killed
from tests.texts import chat_tokenizer, texts, write_jsonl

pytestmark = pytest.mark.usefixtures("cache")

STATIC = SeftConfig(density=0.05, static=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def chats(path: Path, count: int) -> Path:
    """Conversations of lengths that differ."""
    turns = [[("user", "w" * (number * 7 % 23 + 1)), ("assistant", f"a{number}")] for number in range(count)]
    return write_jsonl(path, [{"messages": [{"role": role, "content": text} for role, text in each]} for each in turns])


def mixed(folder: Path, **over: Any) -> DataConfig:
    """Text, 3 of 4 sequences, and chats."""
    text = write_jsonl(folder / "text.jsonl", [{"text": text} for text in texts()[:6]])
    mix = {
        "docs": SourceConfig(path=str(text), weight=0.3),
        "chats": SourceConfig(path=str(chats(folder / "chats.jsonl", 30)), weight=0.1),
    }
    settings: dict[str, Any] = {"mix": mix, "seq_len": 64} | over
    return DataConfig(**settings)


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    data=st.data(),
)
def test_each_source_has_its_share_of_every_beginning(counts: list[int], data: st.DataObject) -> None:
    weights = [data.draw(st.sampled_from([0.1, 0.3, 1.0, 2.0, 7.5])) for _ in counts]
    order, total = MixedOrder(counts, weights, seed=1), sum(Fraction(str(weight)) for weight in weights)
    taken = [0] * len(counts)
    seen: list[list[int]] = [[] for _ in counts]
    for position in range(200):
        source, own = order.source_of(position)
        assert own == taken[source]
        taken[source] += 1
        index = order(position) - sum(counts[:source])
        assert 0 <= index < counts[source]
        seen[source].append(index)
        for weight, count in zip(weights, taken, strict=True):
            assert abs(Fraction(str(weight)) / total * (position + 1) - count) <= len(counts)
    for count, indices in zip(counts, seen, strict=True):  # each pass of a source has all of it
        assert all(
            sorted(indices[start : start + count]) == list(range(count))
            for start in range(0, len(indices) - count + 1, count)
        )


def stream(sequences: Any, rank: int = 0, world_size: int = 1, **over: Any) -> BatchStream:
    sizes = {"batch_size": 8 // world_size, "global_batch": 8, "group_by_length": False} | over
    return BatchStream(sequences, rank=rank, world_size=world_size, seed=3, **sizes)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_a_mix_has_one_order_on_every_layout_and_from_every_step(
    grouped: bool, separate: bool, tokenizer: Any, tmp_path: Path
) -> None:
    sequences: Any = load_sequences(mixed(tmp_path, separate=separate), tokenizer)
    one = [stream(sequences, group_by_length=grouped).indices(step)[0] for step in range(60)]
    if not grouped:
        assert all(sum(index < sequences.counts[0] for index in step) == 6 for step in one)
    for world_size, batch_size in ((2, 4), (4, 1), (3, 2)):
        sizes = {"batch_size": batch_size, "group_by_length": grouped}
        ranks = [stream(sequences, rank, world_size, **sizes) for rank in range(world_size)]
        for step in (59, 0, 17):
            parts = [rank.indices(step) for rank in ranks]
            assert [i for micro in zip(*parts, strict=True) for samples in micro for i in samples] == one[step]


def test_lengths_are_grouped_within_each_pass(tokenizer: Any, tmp_path: Path) -> None:
    config = DataConfig(path=str(chats(tmp_path / "a.jsonl", 300)), seq_len=64)
    sequences: Any = load_sequences(config, tokenizer)
    count, batch, lengths = len(sequences), 7, sequences.lengths()
    plain = EpochOrder(count, 5)
    grouped = LengthGrouped(plain, lengths, batch, count, 5)
    steps = -(-3 * count // batch)
    order = [grouped(position) for position in range(steps * batch)]
    assert order != [plain(position) for position in range(steps * batch)]
    for epoch in range(3):  # up to the step that ends it, the same sequences as without
        stop = -(-(epoch + 1) * count // batch) * batch
        assert sorted(order[:stop]) == sorted(plain(position) for position in range(stop))
    assert [LengthGrouped(plain, lengths, batch, count, 5)(position) for position in (900, 3, 400)] == [
        order[position] for position in (900, 3, 400)
    ]

    def padding(indices: list[int]) -> int:
        steps = np.array(indices).reshape(-1, batch)
        return int((lengths[steps].max(1, keepdims=True) - lengths[steps]).sum())

    without = padding([plain(position) for position in range(steps * batch)])
    assert padding(order) < 0.2 * without, (padding(order), without)
    # steps of short and of long sequences alternate
    means = lengths[np.array(order[: GROUPED_STEPS * batch // 2 // batch * batch])].reshape(-1, batch).mean(1)
    assert not (np.diff(means) >= 0).all() and not (np.diff(means) <= 0).all()


def test_calibration_takes_the_shares_of_a_mix(tokenizer: Any, tmp_path: Path) -> None:
    sequences = load_sequences(mixed(tmp_path), tokenizer)
    assert isinstance(sequences, MixedSequences)
    drawn = sample_sequences(sequences, 40, seed=0)
    assert sum(len(ids) == 64 for ids in drawn) == 30
    with pytest.raises(ValueError, match="fewer sequences than its share"):
        sample_sequences(sequences, len(sequences), seed=0)


def test_an_error_names_the_source(tokenizer: Any, tmp_path: Path) -> None:
    mix = {"docs": SourceConfig(path=str(tmp_path / "gone.jsonl"), weight=1)}
    with pytest.raises(ValueError, match=r"^data.mix.docs: data.path=.*gone.jsonl does not exist"):
        load_sequences(DataConfig(mix=mix), tokenizer)


def test_a_mixed_run_resumes_exactly_and_refuses_other_weights(inputs: Path, tmp_path: Path) -> None:
    text = str(inputs / "text.jsonl")
    chat = chats(tmp_path / "chats.jsonl", 20)

    def config(name: str, weight: float = 1.0, **over: Any) -> Any:
        mix = {"docs": SourceConfig(path=text, weight=3), "chats": SourceConfig(path=str(chat), weight=weight)}
        data = DataConfig(mix=mix, seq_len=16)
        settings = {"data": data, "steps": 6, "save_every": 3, "group_by_length": True} | over
        return run_config(inputs, tmp_path / name, **settings)

    run_train(config("whole"))
    run_train(config("killed"))
    as_if_killed(tmp_path / "killed", 3)
    run_train(config("killed"), world_size=2)
    whole, killed = (
        [json.loads(line) for line in (tmp_path / name / "trace.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    )
    assert [line["batch"] for line in whole] == [line["batch"] for line in killed]
    as_if_killed(tmp_path / "whole", 3)
    with pytest.raises(ValueError, match="cannot go on with this data: data is"):
        train(config("whole", weight=2.0))


def test_records_are_kept_out_by_their_content(tokenizer: Any, tmp_path: Path) -> None:
    words = [{"text": f"word {number % 150}"} for number in range(300)]  # each twice

    def read(name: str, rows: list[dict[str, str]], **over: Any) -> list[str]:
        config = DataConfig(path=str(write_jsonl(tmp_path / name, rows)), seq_len=2, holdout_share=0.2, **over)
        sequences: Any = load_sequences(config, tokenizer)
        return [str(text) for text in sequences.provenance.records["text"]]

    held, kept = read("a.jsonl", words, holdout=True), read("a.jsonl", words)
    assert not set(held) & set(kept) and len(held) + len(kept) == 300
    assert 30 < len(held) < 90
    assert held == [row["text"] for row in words if hash_record(row) < int(0.2 * 2**64)]
    # more records, in another order, with other processes: the old ones stay where they were
    more = read("b.jsonl", [{"text": f"new {number}"} for number in range(50)] + words[::-1], holdout=True, num_proc=2)
    assert set(held) <= set(more) and not set(kept) & set(more)
    assert read("a.jsonl", words, holdout=True, max_records=3) == held[:3]


def test_a_run_is_evaluated_on_what_it_keeps_out(inputs: Path, tmp_path: Path) -> None:
    data = DataConfig(path=str(inputs / "text.jsonl"), seq_len=16, holdout_share=0.3)
    settings: dict[str, Any] = {"steps": 2, "seft": STATIC, "export": "best"}
    shared = make_config(inputs, tmp_path / "a", data=data, eval=EvalConfig(every=1), **settings)
    named = EvalConfig(every=1, data=data.held_out)
    assert shared.validation_data == named.data and data.held_out.holdout
    run_train(shared)
    run_train(make_config(inputs, tmp_path / "b", data=data, eval=named, **settings))
    found = [[line["validation"]["loss"] for line in records(tmp_path / name)] for name in "ab"]
    assert found[0] == found[1] and len(found[0]) == 2


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_several_processes_make_the_same_tokens_and_one_cache(
    kind: str, cache: Path, tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    if kind == "text":
        write_jsonl(path, [{"text": text} for text in texts()[:20]])
    else:
        chats(path, 50)

    def read(num_proc: int) -> list[list[int]]:
        sequences: Any = load_sequences(DataConfig(path=str(path), seq_len=48, num_proc=num_proc), tokenizer)
        return [part.tolist() for part in sequences.contents(0, len(sequences))]

    several = read(3)
    made = set(cache.rglob("*.arrow"))
    one = read(1)
    assert set(cache.rglob("*.arrow")) == made  # what several have made is read by one
    assert np.concatenate(one).tolist() == np.concatenate(several).tolist()
    fresh = write_jsonl(tmp_path / "b.jsonl", [json.loads(line) for line in path.read_text().splitlines()])
    path = fresh  # another file name is another entry of the cache
    assert np.concatenate(read(1)).tolist() == np.concatenate(several).tolist()
    assert torch.tensor(one[0]).sum() > 0
