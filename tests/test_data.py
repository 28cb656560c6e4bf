"""Records to token sequences, and sequences to batches, with real tokenizers: fast, Llama's sentencepiece, slow."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import sentencepiece
import torch
from hypothesis import given
from hypothesis import strategies as st

from seft_dist.config import DataConfig, ModelConfig
from seft_dist.data.batches import BatchStream, check_vocabulary, collate, count_loss_tokens
from seft_dist.data.chat import encode_chat
from seft_dist.data.load import load_sequences
from seft_dist.data.sequences import IGNORE
from seft_dist.data.tokenizer import load_tokenizer, pad_id
from tests.families import family_model
from tests.models import tiny_llama
from tests.texts import CHAT_TEMPLATE, fast_tokenizer, sentencepiece_tokenizer, text_jsonl, texts, write_jsonl

KINDS = ("fast", "llama", "slow")
# A past turn loses its reasoning, as Qwen3 and DeepSeek write it.
REASONING_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n</think>\n{% endif %}{{ m.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    fast_tokenizer(found["fast"])
    sentencepiece_tokenizer(found["llama"])
    sentencepiece_tokenizer(found["slow"], slow=True)
    return found


@pytest.fixture
def tokenizers(folders: dict[str, Path]) -> dict[str, Any]:
    """Fresh objects: a test may change them."""
    return {kind: load_tokenizer(ModelConfig(path=str(folder))) for kind, folder in folders.items()}


def all_ids(sequences: Any) -> list[int]:
    return [token for ids, _ in (sequences[i] for i in range(len(sequences))) for token in ids.tolist()]


def scored_text(sequences: Any, tokenizer: Any, index: int) -> str:
    ids, labels = sequences[index]
    assert torch.equal(ids[labels != IGNORE], labels[labels != IGNORE])
    return str(tokenizer.decode(labels[labels != IGNORE]))


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_joined_by_eos_and_cut_into_full_blocks(kind: str, tokenizers: Any, tmp_path: Path) -> None:
    tokenizer = tokenizers[kind]
    path = text_jsonl(tmp_path / "text.jsonl")
    blocks = load_sequences(DataConfig(path=str(path), seq_len=96), tokenizer)
    line = [token for text in texts() for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert len(blocks) == len(line) // 96 > 100
    assert all_ids(blocks) == line[: 96 * len(blocks)]
    ids, labels = blocks[7]
    assert ids.dtype == torch.int64 and ids.shape == (96,) and torch.equal(ids, labels)


def test_llama_tokenizer_without_tokenizer_json_gives_what_sentencepiece_gives(folders: Any, tokenizers: Any) -> None:
    model = sentencepiece.SentencePieceProcessor(model_file=str(folders["llama"] / "tokenizer.model"))
    text = "Assert statements  are a convenient way;\n\tünï ☃ 12345"
    assert tokenizers["llama"](text)["input_ids"] == [model.bos_id(), *model.encode(text)]
    assert tokenizers["llama"].is_fast and not tokenizers["slow"].is_fast


def test_every_local_format_and_folder_gives_the_same_tokens(tokenizers: Any, tmp_path: Path) -> None:
    records = [{"text": text} for text in texts()[:8]]
    paths = [tmp_path / "a.jsonl", tmp_path / "b.json", tmp_path / "c.parquet", tmp_path / "lines", tmp_path / "plain"]
    write_jsonl(paths[0], records)
    paths[1].write_text(json.dumps(records))
    datasets.Dataset.from_list(records).to_parquet(paths[2])
    for folder in paths[3:]:
        folder.mkdir()
    for number, record in enumerate(records):
        write_jsonl(paths[3] / f"{number}.jsonl", [record])
        (paths[4] / f"{number}.txt").write_text(record["text"])
    found = [all_ids(load_sequences(DataConfig(path=str(path), seq_len=32), tokenizers["fast"])) for path in paths]
    assert len(found[0]) > 1000 and all(ids == found[0] for ids in found)


def test_second_load_reads_the_tokenised_file(cache: Path, tokenizers: Any, tmp_path: Path) -> None:
    config = DataConfig(path=str(text_jsonl(tmp_path / "text.jsonl")), seq_len=50)
    first = all_ids(load_sequences(config, tokenizers["fast"]))
    files = {path for path in cache.rglob("*.arrow")}
    assert all_ids(load_sequences(config, tokenizers["fast"])) == first
    assert {path for path in cache.rglob("*.arrow")} == files
    assert all_ids(load_sequences(config, tokenizers["llama"])) != first


def test_holdout_and_training_records_are_disjoint_and_complete(tokenizers: Any, tmp_path: Path) -> None:
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven"]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": word} for word in words])

    def read(**over: Any) -> list[str]:
        blocks = load_sequences(DataConfig(path=str(path), seq_len=2, holdout_every=3, **over), tokenizers["fast"])
        return str(tokenizers["fast"].decode(all_ids(blocks))).removesuffix("</s>").split("</s>")

    assert read(holdout=True) == ["two", "five"]
    kept = read()
    assert kept[: len(kept) - 1] == ["zero", "one", "three", "four", "six", "seven"][: len(kept) - 1]
    assert read(max_records=2)[:2] == ["zero", "one"]


@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE])
@pytest.mark.parametrize("kind", KINDS)
def test_instructions_have_loss_on_the_answer_only(kind: str, template: Any, tokenizers: Any, tmp_path: Path) -> None:
    tokenizer = tokenizers[kind]
    tokenizer.chat_template = template
    records = [
        {"instruction": "What is it?", "input": "", "output": "a statement"},
        {"instruction": "Name it", "input": "of the thing", "output": "an object"},
    ]
    found = load_sequences(DataConfig(path=str(write_jsonl(tmp_path / "a.jsonl", records)), seq_len=256), tokenizer)
    assert len(found) == 2
    assert scored_text(found, tokenizer, 0).strip() == "a statement</s>"
    assert scored_text(found, tokenizer, 1).strip() == "an object</s>"
    whole = tokenizer.decode(found[1][0])
    assert "Name it\nof the thing" in whole and whole.count("</s>") == (1 if template is None else 2)


@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE, REASONING_TEMPLATE])
@pytest.mark.parametrize("kind", KINDS)
def test_chats_have_loss_on_every_turn_of_the_assistant(kind: str, template: Any, tokenizers: Any) -> None:
    tokenizer = tokenizers[kind]
    tokenizer.chat_template = template
    turns = [
        ("system", "be brief"),
        ("user", "hi"),
        ("assistant", "well met"),
        ("user", "bye"),
        ("assistant", "so long"),
    ]
    messages = [{"role": role, "content": content} for role, content in turns]
    chat = encode_chat(messages, tokenizer, "here")
    ids, scored = chat.ids, chat.scored
    answer = tokenizer.decode([token for token, yes in zip(ids, scored, strict=True) if yes])
    last = "<think>\n</think>\nso long" if template == REASONING_TEMPLATE else "so long"
    assert answer.replace(" ", "") == f"well met</s>\n{last}</s>\n".replace(" ", "")
    assert chat.lost_turns == 0
    # Only Llama's tokenizer puts a bos in front of ordinary text, and so in front of the plain layout.
    assert (ids[0] == tokenizer.bos_token_id) == (template == CHAT_TEMPLATE or (template is None and kind == "llama"))


def test_chat_records_from_a_file(tokenizers: Any, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello", "name": "x"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat, "text": "not this"}])
    found = load_sequences(DataConfig(path=str(path)), tokenizers["fast"])
    assert scored_text(found, tokenizers["fast"], 0).strip() == "hello</s>"


def test_long_records_are_cut_and_left_out_without_an_answer(
    tokenizers: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = [{"instruction": "a " * n, "output": "b " * 30} for n in (3, 50, 5)] + [
        {"instruction": "a", "output": ""}
    ]
    path = str(write_jsonl(tmp_path / "a.jsonl", records))
    found = load_sequences(DataConfig(path=path, seq_len=40), tokenizers["fast"])
    assert [len(found[i][0]) for i in range(len(found))] == [40, 40]
    assert (
        "2 of 4 records are left out: 1 without an answer within data.seq_len tokens; 1 with an answer of bl"
        in caplog.text
    )
    with pytest.raises(ValueError, match="none of 4 records has an answer within data.seq_len=4"):
        load_sequences(DataConfig(path=path, seq_len=4), tokenizers["fast"])


CHAT_ERRORS = {
    "refuses": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "rewrites": ("{{ messages | length }}{{ messages[-1].content | upper }}", "rewrites the assistant's turns"),
    "broken": ("{% for %}", "cannot lay it out"),
}


@pytest.mark.parametrize("name", CHAT_ERRORS)
def test_templates_that_cannot_be_used(name: str, tokenizers: Any) -> None:
    tokenizers["fast"].chat_template, message = CHAT_ERRORS[name]
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    with pytest.raises(ValueError, match=f"record 3.*{message}"):
        encode_chat(chat, tokenizers["fast"], "record 3")


def bad_paths(folder: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """Name of a case to options and the message they must give."""
    files: dict[str, str] = {
        "empty.jsonl": "",
        "broken.jsonl": '{"text": "a"}\n{"text": \n',
        "table.csv": "text\na\n",
        "columns.jsonl": '{"question": "a", "answer": "b"}\n',
        "short.jsonl": '{"text": "a"}\n',
        "nulls.jsonl": '{"text": null}\n{"text": ""}\n',
        "prompt.jsonl": '{"instruction": "", "output": "b"}\n',
        "chat.jsonl": '{"messages": [{"speaker": "human", "value": "b"}]}\n',
        "sharegpt.jsonl": '{"conversations": [{"from": "function_call", "value": "b"}]}\n',
        "chat2.jsonl": '{"messages": "hello"}\n',
    }
    for name, content in files.items():
        (folder / name).write_text(content)
    (folder / "mixed").mkdir()
    (folder / "mixed" / "a.txt").write_text("a")
    write_jsonl(folder / "mixed" / "a.jsonl", [{"text": "a"}])
    (folder / "nothing").mkdir()
    here = {path.name: str(path) for path in folder.iterdir()}
    return {
        "no such file": ({"path": str(folder / "gone.jsonl")}, "does not exist"),
        "no such folder": ({"path": "./gone"}, "does not exist"),
        "hub": ({"path": "nobody/nothing-here"}, "no file or folder here, and the hub did not give"),
        "empty": ({"path": here["empty.jsonl"]}, "is empty"),
        "broken": ({"path": here["broken.jsonl"]}, r"broken.jsonl, line 2 cannot be read as json"),
        "csv": ({"path": here["table.csv"]}, r"holds .csv: needs files of one kind"),
        "mixed": ({"path": here["mixed"]}, "holds json and text"),
        "nothing": ({"path": here["nothing"]}, "no such file"),
        "columns": ({"path": here["columns.jsonl"]}, "has the columns question, answer: needs chat: messages; or"),
        "kind": ({"path": here["columns.jsonl"], "kind": "text"}, "needs text: text"),
        "short": ({"path": here["short.jsonl"]}, "2 tokens in 1 records, less than one block of data.seq_len=1024"),
        "nulls": ({"path": here["nulls.jsonl"], "kind": "text"}, "0 tokens"),
        "split": ({"path": here["short.jsonl"], "split": "test"}, "is local"),
        "holdout": ({"path": here["short.jsonl"], "holdout_every": 2, "holdout": True}, "none of them left"),
        "prompt": ({"path": here["prompt.jsonl"]}, "prompt.jsonl, line 1 has an empty prompt"),
        "chat": ({"path": here["chat.jsonl"]}, r"chat.jsonl, line 1: needs messages with a text \"role\""),
        "sharegpt": (
            {"path": here["sharegpt.jsonl"]},
            r"line 1: a message is from 'function_call': needs one of system",
        ),
        "pattern": ({"path": str(folder / "part-*.jsonl")}, r"part-\*.jsonl matches no file"),
        "twice": ({"path": (here["short.jsonl"], str(folder / "sho*"))}, "short.jsonl twice: needs each file once"),
        "hub among files": ({"path": (here["short.jsonl"], "nobody/nothing-here")}, "nothing-here does not exist"),
        "chat2": ({"path": here["chat2.jsonl"]}, r"chat2.jsonl, line 1: needs a list of"),
    }


def test_data_errors_name_what_was_found_and_needed(tokenizers: Any, tmp_path: Path) -> None:
    for name, (options, message) in bad_paths(tmp_path).items():
        with pytest.raises(ValueError, match=message) as caught:
            load_sequences(DataConfig(**options), tokenizers["fast"])
        assert len(str(caught.value)) < 400, name


def test_tokenizers_without_special_tokens(tokenizers: Any, tmp_path: Path) -> None:
    tokenizer = tokenizers["fast"]
    assert tokenizer.pad_token_id is None and pad_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos token"):
        load_sequences(DataConfig(path=str(text_jsonl(tmp_path / "a.jsonl"))), tokenizer)
    with pytest.raises(ValueError, match="no eos, pad or unk token"):
        pad_id(tokenizer)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(ModelConfig(path=str(tmp_path)))


def test_tokens_outside_the_model_are_found() -> None:
    check_vocabulary({"input_ids": torch.tensor([[127]])}, tiny_llama())
    with pytest.raises(ValueError, match="token number 128, but the model has 128 embeddings"):
        check_vocabulary({"input_ids": torch.tensor([[128]])}, tiny_llama())
    gpt2 = family_model("gpt2")
    check_vocabulary({"input_ids": torch.zeros(1, 64, dtype=torch.int64)}, gpt2)
    with pytest.raises(ValueError, match="sequences of 65 tokens, the model has 64 learned positions"):
        check_vocabulary({"input_ids": torch.zeros(1, 65, dtype=torch.int64)}, gpt2)
    check_vocabulary({"input_ids": torch.zeros(1, 65, dtype=torch.int64)}, family_model("llama2"))  # rotary ones


def test_batches_are_padded_to_their_longest_sequence() -> None:
    short, long = torch.tensor([5, 6]), torch.tensor([7, 8, 9])
    batch = collate([(short, torch.tensor([IGNORE, 6])), (long, long)], pad=1)
    assert batch["input_ids"].tolist() == [[5, 6, 1], [7, 8, 9]]
    assert batch["labels"].tolist() == [[IGNORE, 6, IGNORE], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert count_loss_tokens(batch) == 3


def numbered(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Sequences that hold their own number."""
    return [(torch.tensor([number, number]), torch.tensor([number, number])) for number in range(count)]


def global_order(
    count: int, steps: int, batch_size: int, global_batch: int, world_size: int, seed: int = 0
) -> list[int]:
    """Sample numbers of all ranks in the global order, read from the batches themselves."""
    streams = [
        BatchStream(
            numbered(count), batch_size=batch_size, global_batch=global_batch, rank=r, world_size=world_size, seed=seed
        )
        for r in range(world_size)
    ]
    order = []
    for step in range(steps):
        parts = [stream.step(step) for stream in streams]
        for micro in zip(*parts, strict=True):  # as many forward passes on every rank
            for batch in micro:
                assert len(batch["input_ids"]) <= batch_size
                learnt = (batch["labels"] != IGNORE).any(1)
                assert learnt.all() or (len(learnt) == 1 and not learnt.any())
                order += batch["input_ids"][learnt, 0].tolist()
    return order


@given(
    global_batch=st.integers(1, 12), batch_size=st.integers(1, 5), world_size=st.integers(1, 7), seed=st.integers(0, 9)
)
def test_global_order_does_not_depend_on_the_layout(
    global_batch: int, batch_size: int, world_size: int, seed: int
) -> None:
    expected = global_order(37, 5, global_batch, global_batch, 1, seed)
    assert len(expected) == 5 * global_batch
    assert global_order(37, 5, batch_size, global_batch, world_size, seed) == expected


def test_another_seed_is_another_order() -> None:
    assert global_order(37, 9, 12, 12, 1) != global_order(37, 9, 12, 12, 1, seed=1)


@given(count=st.integers(4, 40), global_batch=st.integers(1, 4), seed=st.integers(0, 9))
def test_every_epoch_is_a_new_permutation(count: int, global_batch: int, seed: int) -> None:
    steps = -(-3 * count // global_batch)
    order = global_order(count, steps, 2, global_batch, 1, seed)
    epochs = [order[start : start + count] for start in range(0, 3 * count, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert count < 10 or epochs[0] != epochs[1] != epochs[2]


def test_any_step_can_be_the_first() -> None:
    def stream() -> BatchStream:
        return BatchStream(numbered(11), batch_size=2, global_batch=7, rank=1, world_size=2, seed=3)

    whole = [stream().step(step) for step in range(9)]
    later = stream().batches(steps_done=5)
    for step in range(5, 9):
        for ours, theirs in zip(next(later), whole[step], strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in ("input_ids", "labels", "attention_mask"))


def test_data_smaller_than_a_global_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has 11 sequences, one optimizer step needs 12 \(global_batch; "):
        BatchStream(numbered(11), batch_size=2, global_batch=12, world_size=2)
