"""Local data files: content, not times, identifies them; joined text; one bos; one message for whatever is wrong."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import processors

from seft_dist.config import DataConfig, ModelConfig
from seft_dist.data import data_files
from seft_dist.data.load import load_source
from seft_dist.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from tests.texts import fast_tokenizer, sentencepiece_tokenizer, texts, write_jsonl

pytestmark = pytest.mark.usefixtures("cache")
BETWEEN = {"concatenate": "", "newline": "\n", "blank_line": "\n\n"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tokenizers: one that adds no bos, Llama 3's way of adding it (fast), and Llama 2's (sentencepiece)."""
    found = {kind: tmp_path_factory.mktemp(kind) for kind in ("plain", "llama3", "llama2")}
    fast_tokenizer(found["plain"])
    tokenizer = fast_tokenizer(found["llama3"])
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(found["llama3"])
    sentencepiece_tokenizer(found["llama2"])
    return found


@pytest.fixture
def tokenizers(folders: dict[str, Path]) -> dict[str, Any]:
    return {kind: load_tokenizer(ModelConfig(path=str(folder))) for kind, folder in folders.items()}


def ids_of(sequences: Any) -> list[int]:
    """All tokens, those behind the last block included."""
    _, *parts = sequences.contents(0, len(sequences) + 1)
    return [token for part in parts for token in part.tolist()]


@pytest.mark.parametrize("kind", ["plain", "llama3", "llama2"])
def test_text_that_begins_with_bos_has_one(kind: str, tokenizers: Any, tmp_path: Path) -> None:
    tokenizer = tokenizers[kind]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    records = ["<s>an object", "<s><s>the name</s>", "a statement</s></s>"]
    path = str(write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in records]))
    found = load_source(DataConfig(path=path, seq_len=2), tokenizer)
    bare = [
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in ("<s>an object", "<s>the name", "a statement")
    ]
    last = bare[2] if kind == "plain" else [bos, *bare[2]]
    assert ids_of(found) == [*bare[0], eos, *bare[1], eos, *last, eos]
    assert bare[0][0] == bos and ids_of(found).count(bos) == (2 if kind == "plain" else 3)
    assert found.provenance.bos == ("none" if kind == "plain" else "one in front of each record")


@pytest.mark.parametrize("join", BETWEEN)
@pytest.mark.parametrize("kind", ["plain", "llama3", "llama2"])
def test_joined_records_are_one_text(kind: str, join: Any, tokenizers: Any, tmp_path: Path) -> None:
    """The result is that of the way in which papers read WikiText: tokenizer("\\n\\n".join(records))."""
    tokenizer = tokenizers[kind]
    lines = ["", " = A title = \n", "", *texts()[0].splitlines(), "<s>"]
    path = str(write_jsonl(tmp_path / "a.jsonl", [{"text": line} for line in lines]))
    found = load_source(DataConfig(path=path, seq_len=16, join=join), tokenizer)
    ids = ids_of(found)
    assert ids == list(tokenizer(BETWEEN[join].join(lines))["input_ids"])
    assert found.num_tokens == len(ids) and len(found) == len(ids) // 16
    assert found.provenance.bos == ("none" if kind == "plain" else "one in front of the text")
    begun = str(write_jsonl(tmp_path / "b.jsonl", [{"text": "<s>" + "a word " * 50}, {"text": "two"}]))
    joined = ids_of(load_source(DataConfig(path=begun, seq_len=16, join=join), tokenizer))
    assert joined.count(tokenizer.bos_token_id) == 1 and tokenizer.eos_token_id not in joined


def test_lines_of_a_text_as_documents_are_warned_of(
    tokenizers: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", [{"text": line} for line in texts()[0].splitlines()]))
    with caplog.at_level(logging.WARNING):
        load_source(DataConfig(path=path, seq_len=16, join="newline"), tokenizers["llama3"])
        assert not caplog.text
        load_source(DataConfig(path=path, seq_len=16), tokenizers["llama3"])
    assert "of the tokens are bos and eos" in caplog.text and "--data.join blank_line" in caplog.text


def test_records_without_text_are_counted(tokenizers: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [{"text": texts()[0]}, {"content": "in another column"}, {"text": ""}, {"text": texts()[1]}]
    path = str(write_jsonl(tmp_path / "a.jsonl", records))
    with caplog.at_level(logging.WARNING):
        load_source(DataConfig(path=path, seq_len=16), tokenizers["llama3"])
    assert "2 of 4 records are left out: they have no text in 'text'" in caplog.text


def test_joining_is_for_text(tokenizers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b"}]))
    with pytest.raises(ValueError, match="records of kind instruction: only text is joined"):
        load_source(DataConfig(path=path, join="newline"), tokenizers["plain"])
    with pytest.raises(ValueError, match="data.join=newline with data.kind=chat"):
        DataConfig(path=path, join="newline", kind="chat")
    monkeypatch.setattr("seft_dist.data.encode.MOST_JOINED", 5)
    path = str(write_jsonl(tmp_path / "b.jsonl", [{"text": "three"}, {"text": "words"}]))
    with pytest.raises(ValueError, match="makes one text of more than 5 characters"):
        load_source(DataConfig(path=path, join="newline"), tokenizers["plain"])


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".json", ".parquet"])
def test_a_file_replaced_in_place_is_read_anew(suffix: str, tokenizers: Any, tmp_path: Path) -> None:
    """The new file has the name, size and time of the old one, as after rsync -t or cp -p."""
    path, other = tmp_path / f"a{suffix}", tmp_path / f"other{suffix}"

    def write(file: Path, text: str) -> None:
        if suffix == ".parquet":
            datasets.Dataset.from_list([{"text": text}]).to_parquet(file)
        else:
            file.write_text(
                {".txt": text, ".json": json.dumps([{"text": text}])}.get(suffix, json.dumps({"text": text}))
            )

    def read() -> str:
        found = load_source(DataConfig(path=str(path), seq_len=2), tokenizers["plain"])
        return str(tokenizers["plain"].decode(ids_of(found))).removesuffix("</s>")

    write(path, "the first one")
    write(other, "the other one")
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    assert read() == "the first one"
    if suffix != ".parquet":
        assert path.stat().st_size == other.stat().st_size
    shutil.copy2(other, path)
    assert read() == "the other one"
    os.utime(path)
    assert read() == "the other one"


BROKEN: dict[str, tuple[str | bytes, str]] = {
    "deep.jsonl": ('{"text": "a"}\n' + '{"text":' * 100_000, "line 2 is nested too deeply"),
    "deep.json": ("[" * 100_000, "record 0 is nested too deeply"),
    "null.jsonl": (b'{"text": "a"}\n{"te\0xt": "b"}\n', "line 2 has a null byte"),
    "null.txt": (b"some text\0\0\0", "has a null byte behind 9 characters"),
    "latin.txt": ("ünï".encode("latin-1"), "is not UTF-8 text"),
    "latin.jsonl": (b'{"text": "\xfc"}', "line 1 is not UTF-8 text"),
    "latin.json": (b'[{"text": "\xfc"}]', "latin.json is not UTF-8 text"),
    "half.jsonl": ('{"text": "\\ud83d"}', "line 1 has half of a surrogate pair"),
    "long.jsonl": ('{"text": "a"}\n{"text": "' + "a" * 200 + '"}', "line 2 is longer than 100 bytes"),
    "numbers.jsonl": ('{"text": "a"}\n\n3\n', "line 3 is a number: needs an object"),
    "lists.jsonl": ('["a"]\n', "line 1 is a list: needs an object"),
    "list.json": ('[{"text": "a"}, "b"]', "record 1 is a string: needs an object"),
    "object.json": ('{\n "data": [{"text": "a"}]\n}', "holds an object at the top"),
    "scalar.json": ("3", "line 1 is a number: needs an object"),
    "cut.json": ('[{"text": "a"}, {"text', "record 1 cannot be read as json"),
    "cut.jsonl": ('{"text": "a"}\n{"text', "line 2 cannot be read as json"),
    "type.jsonl": ('{"text": "a"}\n{"text": 7}', "line 2: its 'text' is no text but int"),
    "answer.jsonl": ('{"instruction": "a", "output": ["b"]}', "line 1: a prompt, input or answer is no text but list"),
    "role.jsonl": ('{"messages": [{"role": 3, "content": "b"}]}', "line 1: needs messages with a text"),
    "tools.jsonl": (
        '{"messages": [{"role": "user", "content": "a"}], "tools": {"a": 1}}',
        "line 1: needs a list of JSON schemas",
    ),
    "table.parquet": (b"PAR1 no, it is not", "cannot be read as parquet"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_named_with_its_file_and_line(
    name: str, tokenizers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, message = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if name.startswith("long"):
        monkeypatch.setattr(data_files, "MOST_LINE_BYTES", 100)
    with pytest.raises(ValueError, match=message) as caught:
        load_source(DataConfig(path=str(path), seq_len=2), tokenizers["plain"])
    assert name in str(caught.value) and len(str(caught.value)) < 400


def test_pipes_and_devices_are_refused(tokenizers: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    (tmp_path / "null.txt").symlink_to("/dev/zero")
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.jsonl").mkdir()
    for path, message in {
        "a.jsonl": "a.jsonl is a pipe or a device",
        "null.txt": "null.txt is a pipe or a device",
        ".": "is a pipe or a device",
        "empty": "holds no such file: needs files of one kind",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_source(DataConfig(path=str(tmp_path / path)), tokenizers["plain"])


def test_a_byte_order_mark_is_no_text(tokenizers: Any, tmp_path: Path) -> None:
    contents = {"a.txt": "an object", "a.jsonl": '{"text": "an object"}', "a.json": '[{"text": "an object"}]'}
    for name, content in contents.items():
        (tmp_path / name).write_text("\ufeff" + content, encoding="utf-8")
        found = load_source(DataConfig(path=str(tmp_path / name), seq_len=2), tokenizers["plain"])
        assert tokenizers["plain"].decode(ids_of(found)) == "an object</s>"


def test_a_list_larger_than_what_is_read_at_a_time(tokenizers: Any, tmp_path: Path) -> None:
    records = [{"text": f"record {number} " + "é " * 300} for number in range(1000)]
    (tmp_path / "a.json").write_text(json.dumps(records, ensure_ascii=False))
    config = DataConfig(path=str(tmp_path / "a.json"), seq_len=64)
    as_lines = DataConfig(path=str(write_jsonl(tmp_path / "a.jsonl", records)), seq_len=64)
    assert ids_of(load_source(config, tokenizers["plain"])) == ids_of(load_source(as_lines, tokenizers["plain"]))


def test_fingerprints_of_text_and_tokenizer(tokenizers: Any, folders: Any, tmp_path: Path) -> None:
    records = [{"text": text, "other": 1} for text in texts()[:3]]
    paths = [write_jsonl(tmp_path / "a.jsonl", records), tmp_path / "b.parquet"]
    datasets.Dataset.from_list(records).to_parquet(paths[1])
    found = {
        load_source(DataConfig(path=str(path), seq_len=8), tokenizers["plain"]).provenance.fingerprint()
        for path in paths
    }
    part = load_source(DataConfig(path=str(paths[0]), seq_len=8, max_records=2), tokenizers["plain"])
    assert len(found) == 1 and part.provenance.fingerprint() not in found
    prints = [tokenizer_fingerprint(tokenizer) for tokenizer in tokenizers.values()]
    assert (
        prints[0] == prints[1] != prints[2]
    )  # of the vocabulary; what is added to text is told by the hash of the tokens
    assert tokenizer_fingerprint(load_tokenizer(ModelConfig(path=str(folders["plain"])))) == prints[0]


@pytest.mark.parametrize("column", ["prompt", "completion"])
def test_messages_in_a_prompt_are_not_their_text(
    column: str, tokenizers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In files and in data sets of the hub, whose columns keep the types that they have there."""
    record: dict[str, Any] = {"prompt": "a question", "completion": "an answer"}
    record[column] = [{"role": "user", "content": "a question"}]
    path = str(write_jsonl(tmp_path / "a.jsonl", [record]))
    with pytest.raises(
        ValueError, match=r"a.jsonl, line 1: .* is no text but list: needs texts, or a list of messages"
    ):
        load_source(DataConfig(path=path, seq_len=16), tokenizers["plain"])
    hub = datasets.Dataset.from_list([record])
    monkeypatch.setattr("seft_dist.data.records._read_hub", lambda config: hub)
    with pytest.raises(ValueError, match=r"some/dataset, record 0: .* is no text but list"):
        load_source(DataConfig(path="some/dataset", seq_len=16), tokenizers["plain"])
