"""Documents that share a sequence and do not see each other: packed is the same as alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from seft_dist.config import DataConfig, EvalConfig, ModelConfig, TeacherConfig
from seft_dist.data.batches import collate, count_loss_tokens, model_inputs
from seft_dist.data.load import load_sequences
from seft_dist.data.sequences import IGNORE, Sample
from seft_dist.data.several import pack
from seft_dist.data.tokenizer import load_tokenizer
from seft_dist.evaluation.perplexity import perplexity
from seft_dist.training.separation import check_frequencies, leaked_share
from seft_dist.training.trainer import train
from tests.families import FAMILIES, READ_ONLY, family_model
from tests.runs import ds_file, make_config, records, run_config, run_train
from tests.test_data_order import STATIC, chats, mixed
from tests.texts import chat_tokenizer, texts, write_jsonl

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def documents_of(sample: Sample) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The documents of a sequence, with their labels."""
    ids, labels, places = sample
    starts = [*(places == 0).nonzero().flatten().tolist(), len(ids)]
    return [(ids[a:b], labels[a:b]) for a, b in zip(starts, starts[1:], strict=False)]


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60),
    capacity=st.integers(20, 45),
)
def test_packs_hold_every_item_once_and_are_nearly_full(lengths: list[int], capacity: int) -> None:
    packs = pack(np.array(lengths, dtype=np.int32), capacity)
    assert sorted(np.concatenate(packs).tolist()) == list(range(len(lengths)))
    sizes = [sum(lengths[item] for item in items) for items in packs]
    assert max(sizes) <= capacity
    assert sum(2 * size <= capacity for size in sizes) <= 1  # two packs half empty would have been one
    assert [items[0] for items in packs] == sorted(items[0] for items in packs)


def test_text_is_cut_into_the_same_blocks(tokenizer: Any, tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", [{"text": text[:100]} for text in texts()[:20]]))
    joined, separate = (
        load_sequences(DataConfig(path=path, seq_len=64, separate=each), tokenizer) for each in (False, True)
    )
    lengths = [len(tokenizer(text[:100])["input_ids"]) + 1 for text in texts()[:20]]
    starts = set(np.cumsum([0, *lengths]).tolist())
    assert len(joined) == len(separate) > 5
    for index in range(len(joined)):
        ids, labels, places = separate[index]
        assert torch.equal(ids, joined[index][0])
        begins = [at for at in range(64) if 64 * index + at in starts or at == 0]
        assert (places == 0).nonzero().flatten().tolist() == begins
        assert (labels == IGNORE).nonzero().flatten().tolist() == begins
        assert torch.equal(ids[labels != IGNORE], labels[labels != IGNORE])
    contents = [np.concatenate(list(sequences.contents(2, 5))).tolist() for sequences in (joined, separate)]
    assert contents[0] != contents[1] and contents[1][: len(contents[0])] == contents[0]


def test_conversations_share_sequences_unchanged(tokenizer: Any, tmp_path: Path) -> None:
    path = str(chats(tmp_path / "a.jsonl", 40))
    alone, packed = (
        load_sequences(DataConfig(path=path, seq_len=64, separate=each), tokenizer) for each in (False, True)
    )
    assert len(packed) < 0.8 * len(alone) and packed.num_tokens == alone.num_tokens
    found = [(ids.tolist(), labels.tolist()) for i in range(len(packed)) for ids, labels in documents_of(packed[i])]
    expected = [(ids.tolist(), labels.tolist()) for ids, labels in (alone[i] for i in range(len(alone)))]
    assert sorted(found) == sorted(expected)
    assert packed.lengths().tolist() == [len(packed[i][0]) for i in range(len(packed))]
    batches = [collate([sequences[i] for i in range(len(sequences))], 0) for sequences in (packed, alone)]
    assert count_loss_tokens(batches[0]) == count_loss_tokens(batches[1])


def losses(model: Any, batch: Any) -> torch.Tensor:
    """Loss of each learnt token and the gradient of the embeddings, in one sum that both depend on."""
    outputs = model(**model_inputs(batch), use_cache=False)
    total: torch.Tensor = outputs.loss * count_loss_tokens(batch)
    return total


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [*FAMILIES, *READ_ONLY])
def test_packed_is_alone(family: str, attention: str, tokenizer: Any, tmp_path: Path) -> None:
    model = family_model(family).eval()
    try:
        model.set_attn_implementation(attention)
    except ValueError:
        pytest.skip(f"{family} has no {attention}")
    sequences = load_sequences(mixed(tmp_path, separate=True, seq_len=32 if family == "phi3" else 48), tokenizer)
    chosen = [sequences[index] for index in (0, 3, len(sequences) - 1)]  # padded, of several documents
    batch = collate(chosen, pad=0)
    assert "attention_mask" not in model_inputs(batch)
    with torch.no_grad():
        logits = model(**model_inputs(batch), use_cache=False).logits
        total = losses(model, batch)
        expected = torch.zeros(())
        for row, sample in enumerate(chosen):
            start = 0
            for ids, labels in documents_of(sample):
                alone = model(input_ids=ids[None], use_cache=False).logits[0]
                torch.testing.assert_close(logits[row, start : start + len(ids)], alone, rtol=1e-4, atol=2e-5)
                if count_loss_tokens({"labels": labels[None]}):
                    expected = expected + losses(model, {"input_ids": ids[None], "labels": labels[None]})
                start += len(ids)
    torch.testing.assert_close(total.double(), expected.double(), rtol=1e-5, atol=1e-4)
    joined = model(input_ids=batch["input_ids"], use_cache=False).logits
    assert (joined - logits).abs().max() > 1e-3  # the documents before have a say without the option


def test_frequencies_that_depend_on_the_longest_document_are_found() -> None:
    config = family_model("phi3").config  # its frequencies change beyond 32 tokens
    check_frequencies(config, 32, "data.seq_len")
    with pytest.raises(ValueError, match="data.separate with data.seq_len=33: .*longrope.*at most 32"):
        check_frequencies(config, 33, "data.seq_len")
    check_frequencies(family_model("llama3").config, 1000, "data.seq_len")


@pytest.mark.parametrize("rows", [1, 2])
def test_models_that_carry_a_state_are_found(rows: int) -> None:
    sizes = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2}
    kinds = {
        "mamba": {"state_size": 4},
        "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "num_attention_heads": 4, "max_position_embeddings": 64},
        "llama": {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2},
    }
    leaked = {}
    for kind, over in kinds.items():
        config = AutoConfig.for_model(kind, **sizes, **over, pad_token_id=0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
        leaked[kind] = leaked_share(model, model, torch.device("cpu"), rows)
        assert model.training
    assert leaked["llama"] < 1e-5 and leaked["mamba"] > 0.5 and leaked["opt"] > 0.05, leaked


def test_a_run_with_a_model_that_mixes_documents_is_refused(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    causal = modeling_llama.create_causal_mask
    monkeypatch.setattr(
        modeling_llama, "create_causal_mask", lambda *args, **kwargs: causal(*args, **kwargs | {"position_ids": None})
    )
    data = DataConfig(path=str(inputs / "text.jsonl"), seq_len=16, separate=True)
    with pytest.raises(ValueError, match="data.separate: the model .llama. does not keep the documents of a sequence"):
        train(make_config(inputs, tmp_path / "run", data=data))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_run_learns_packed_what_it_learns_alone(inputs: Path, tmp_path: Path) -> None:
    path = str(chats(tmp_path / "a.jsonl", 24))
    found = {}
    for separate in (False, True):
        data = DataConfig(path=path, seq_len=64, separate=separate)
        sequences = load_sequences(data, load_tokenizer(ModelConfig(path=str(inputs / "pruned"))))
        # all conversations in each step, whichever way they are packed
        over = {"global_batch": len(sequences), "steps": 3, "seft": STATIC, "eval": EvalConfig(data=data, every=1)}
        run_train(make_config(inputs, tmp_path / str(separate), data=data, **over))
        lines = records(tmp_path / str(separate))
        found[separate] = [(line["loss"], line["validation"]["loss"]) for line in lines]
    np.testing.assert_allclose(found[True], found[False], rtol=1e-5)


@pytest.mark.parametrize("stage", [None, pytest.param(3, marks=pytest.mark.long)])
def test_packed_documents_are_the_same_run_on_two_ranks(stage: int | None, inputs: Path, tmp_path: Path) -> None:
    data = DataConfig(path=str(inputs / "text.jsonl"), seq_len=16, separate=True)
    over: dict[str, Any] = {"data": data, "steps": 4, "export": False}
    if stage is not None:  # with a teacher, which is asked too
        over |= {"teacher": TeacherConfig(path=str(inputs / "pruned"))}
    ds = ds_file(tmp_path, {"zero_optimization": {"stage": stage}}) if stage is not None else None
    run_train(run_config(inputs, tmp_path / "1", **over))
    run_train(run_config(inputs, tmp_path / "2", deepspeed=ds, **over), 2)
    one, two = ([(line["loss"], line["tokens"]) for line in records(tmp_path / str(n))] for n in (1, 2))
    np.testing.assert_allclose(one, two, rtol=1e-5)


def test_perplexity_of_packed_conversations_is_that_of_each_alone(tokenizer: Any, tmp_path: Path) -> None:
    path = str(chats(tmp_path / "a.jsonl", 20))
    model = family_model("llama3")
    results = [
        perplexity(model, load_sequences(DataConfig(path=path, seq_len=48, separate=each), tokenizer))
        for each in (False, True)
    ]
    assert results[0].num_tokens == results[1].num_tokens
    assert abs(results[0].loss - results[1].loss) < 1e-6
