"""Where records come from: several files and patterns, formats known without options, layouts that were invented."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoTokenizer

from seft_dist.config import DataConfig, EvalConfig, ModelConfig, SeftConfig, TeacherConfig, TrainConfig, paths_of
from seft_dist.data.load import load_sequences
from seft_dist.data.tokenizer import load_tokenizer
from seft_dist.io.positions import longest_sequence
from seft_dist.session.cli import parse, to_yaml
from seft_dist.training.trainer import train
from tests.runs import make_config, run_train
from tests.texts import CHAT_TEMPLATE, fast_tokenizer, texts, write_jsonl

pytestmark = pytest.mark.usefixtures("cache")

TURNS = [("user", "Why?"), ("assistant", "Because."), ("user", "Really?"), ("assistant", "Yes.")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}[role], "value": content} for role, content in TURNS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    fast_tokenizer(path)
    return path


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    found = load_tokenizer(ModelConfig(path=str(folder)))
    found.chat_template = CHAT_TEMPLATE
    return found


def tokens(sequences: Any) -> list[tuple[list[int], list[int]]]:
    return [(ids.tolist(), labels.tolist()) for ids, labels in (sequences[i] for i in range(len(sequences)))]


def read(tokenizer: Any, path: Any, **over: Any) -> list[tuple[list[int], list[int]]]:
    paths = tuple(map(str, path)) if isinstance(path, list) else str(path)
    return tokens(load_sequences(DataConfig(path=paths, **over), tokenizer))


def test_files_and_patterns_are_read_in_the_order_given(tokenizer: Any, tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / f"{name}.jsonl", [{"text": texts()[i]}]) for i, name in enumerate("bac")]
    whole = tmp_path / "whole.jsonl"
    in_order = [files[1], files[0], files[2]]  # by name
    expected = {}
    for name, order in (("names", in_order), ("given", files)):
        write_jsonl(whole, [json.loads(file.read_text()) for file in order])
        expected[name] = read(tokenizer, whole, seq_len=32)
    assert expected["names"] != expected["given"]
    assert read(tokenizer, tmp_path / "[abc].jsonl", seq_len=32) == expected["names"]
    assert read(tokenizer, files, seq_len=32) == expected["given"]
    assert read(tokenizer, [files[0], tmp_path / "[a-a].jsonl", tmp_path / "c*"], seq_len=32) == expected["given"]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tokenizer: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "part[1].jsonl", [{"text": texts()[0]}])
    assert read(tokenizer, path, seq_len=32)


def test_paths_on_the_command_line_and_in_files(tmp_path: Path) -> None:
    one = parse(DataConfig, ["--path", "[a.jsonl, b-*.jsonl]"])
    assert one.path == ("a.jsonl", "b-*.jsonl") and one.label == "a.jsonl, b-*.jsonl"
    (tmp_path / "again.yaml").write_text(to_yaml(one))
    assert parse(DataConfig, ["--config", str(tmp_path / "again.yaml")]) == one
    assert paths_of(yaml.safe_load(to_yaml(one))) == ["a.jsonl", "b-*.jsonl"]
    assert paths_of({"path": "a"}) == ["a"] and paths_of({}) == paths_of({"path": 3, "mix": 4}) == []


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_sharegpt_is_known_without_options(suffix: str, tokenizer: Any, tmp_path: Path) -> None:
    expected = read(tokenizer, write_jsonl(tmp_path / "a.jsonl", [{"messages": MESSAGES}]))
    path = tmp_path / f"b{suffix}"
    if suffix == ".jsonl":
        write_jsonl(path, [{"id": "7", "conversations": SHAREGPT}])
    else:
        import datasets

        datasets.Dataset.from_list([{"conversations": SHAREGPT}]).to_parquet(path)
    assert read(tokenizer, path) == expected
    assert read(tokenizer, path, kind="chat") == expected
    answers = "".join(tokenizer.decode(label) for label in expected[0][1] if label != -100)
    assert answers == "Because.</s>\nYes.</s>\n"
    # columns with roles under the name of ShareGPT's
    roles = write_jsonl(tmp_path / "c.jsonl", [{"conversations": MESSAGES}])
    assert read(tokenizer, roles) == expected


def test_prompt_and_completion_are_known_without_options(tokenizer: Any, tmp_path: Path) -> None:
    expected = read(tokenizer, write_jsonl(tmp_path / "a.jsonl", [{"instruction": "Why?", "output": "Because."}]))
    other = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "Why?", "completion": "Because."}])
    assert read(tokenizer, other) == read(tokenizer, other, kind="instruction") == expected


@pytest.mark.parametrize("suffix", [".jsonl", ".hub"])
def test_lists_of_messages_as_prompt_and_completion(
    suffix: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As TRL has them: of the whole conversation, only the turns of the completion are learnt."""
    whole = read(tokenizer, write_jsonl(tmp_path / "a.jsonl", [{"messages": MESSAGES}]))
    record = {"prompt": MESSAGES[:3], "completion": MESSAGES[3:]}
    if suffix == ".hub":
        import datasets

        data = datasets.Dataset.from_list([record])
        monkeypatch.setattr("seft_dist.data.records._read_hub", lambda config: data)
        path = "some/dataset"
    else:
        path = str(write_jsonl(tmp_path / "b.jsonl", [record]))
    found = read(tokenizer, path)
    assert [ids for ids, _ in found] == [ids for ids, _ in whole]
    assert "".join(tokenizer.decode(label) for label in found[0][1] if label != -100) == "Yes.</s>\n"


@pytest.mark.parametrize("marked", [True, False])
def test_turns_of_weight_0_are_not_learnt(marked: bool, tokenizer: Any, tmp_path: Path) -> None:
    if marked:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>\n"
            "{% endgeneration %}{% else %}{{ m.content }}</s>\n{% endif %}{% endfor %}"
        )
    plain = read(tokenizer, write_jsonl(tmp_path / "a.jsonl", [{"messages": MESSAGES}]))
    for weights, learnt in (((0, 1), "Yes.</s>\n"), ((1, 0), "Because.</s>\n"), ((0, 0), None)):
        messages: list[dict[str, Any]] = [dict(message) for message in MESSAGES]
        messages[1]["weight"], messages[3]["weight"] = weights
        path = write_jsonl(tmp_path / f"{weights}.jsonl", [{"messages": messages}, {"messages": MESSAGES}])
        found = read(tokenizer, path)
        assert len(found) == (2 if learnt else 1)
        if learnt:
            assert found[0][0] == plain[0][0]
            assert "".join(tokenizer.decode(label) for label in found[0][1] if label != -100) == learnt


def test_turns_that_a_template_marks_otherwise_are_not_told_apart(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = (
        "{% generation %}{% for m in messages %}{{ m.role }}: {{ m.content }}</s>\n{% endfor %}{% endgeneration %}"
    )
    assert read(tokenizer, write_jsonl(tmp_path / "a.jsonl", [{"messages": MESSAGES}]))
    messages = [*MESSAGES[:3], MESSAGES[3] | {"weight": 0}]
    with pytest.raises(ValueError, match=r"b.jsonl, line 1: some turns .* marks 1 parts of 2 turns"):
        read(tokenizer, write_jsonl(tmp_path / "b.jsonl", [{"messages": messages}]))


def test_the_system_column_of_sharegpt_is_used(tokenizer: Any, tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    expected = read(tokenizer, write_jsonl(tmp_path / "a.jsonl", [{"messages": [system, *MESSAGES]}]))
    rows: list[dict[str, Any]] = [{"conversations": SHAREGPT, "system": "Be brief."}]
    rows.append({"conversations": [{"from": "system", "value": "Be brief."}, *SHAREGPT], "system": "not this one"})
    found = read(tokenizer, write_jsonl(tmp_path / "b.jsonl", rows))
    assert found == expected * 2
    without: list[dict[str, Any]] = [{"conversations": SHAREGPT, "system": ""}, {"conversations": SHAREGPT}]
    plain = read(tokenizer, write_jsonl(tmp_path / "c.jsonl", [{"messages": MESSAGES}]))
    assert read(tokenizer, write_jsonl(tmp_path / "d.jsonl", without)) == plain * 2
    with pytest.raises(ValueError, match="its 'system' is no text but list"):
        read(tokenizer, write_jsonl(tmp_path / "e.jsonl", [{"conversations": SHAREGPT, "system": ["x"]}]))
    assert read(tokenizer, write_jsonl(tmp_path / "f.jsonl", [{"messages": MESSAGES, "system": {"x": 1}}])) == plain


def test_columns_that_options_name_win(tokenizer: Any, tmp_path: Path) -> None:
    both = write_jsonl(tmp_path / "a.jsonl", [{"text": texts()[0], "conversations": SHAREGPT, "prompt": "a"}])
    assert len(read(tokenizer, both, seq_len=32)) > 1  # text, as ever
    assert len(read(tokenizer, both, seq_len=32, kind="chat")) == 1
    with pytest.raises(ValueError, match="has the columns text, conversations, prompt: needs chat: turns"):
        read(tokenizer, both, kind="chat", messages_field="turns")


def test_an_invented_layout_is_announced_once_and_exported(
    inputs: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = load_tokenizer(ModelConfig(path=str(folder)))
    plain.name_or_path = str(tmp_path)
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "w1"}, MESSAGES[1]]}] * 12)
    with caplog.at_level(logging.WARNING):
        sequences = [load_sequences(DataConfig(path=str(path)), plain) for _ in range(2)]
    assert [record.getMessage() for record in caplog.records if "has no chat template" in record.getMessage()] == [
        caplog.records[0].getMessage()
    ]
    template = sequences[0].invented_template
    assert template is not None and template in caplog.records[0].getMessage()

    config = make_config(
        inputs,
        tmp_path / "run",
        data=DataConfig(path=str(path), seq_len=32),
        steps=2,
        seft=SeftConfig(density=0.05, static=True),
    )
    run_train(config)
    exported = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    shown = exported.apply_chat_template(MESSAGES[:2], tokenize=False)
    assert shown == f"User: Why?\nAssistant: Because.{exported.eos_token}\n"
    # trained once more, it has the same tokens, and no layout is invented
    again = load_sequences(DataConfig(path=str(path)), exported)
    assert again.invented_template is None
    before = load_sequences(DataConfig(path=str(path)), load_tokenizer(ModelConfig(path=str(inputs / "pruned"))))
    assert tokens(again) == tokens(before)


def test_text_brings_no_layout(inputs: Path, tmp_path: Path) -> None:
    run_train(make_config(inputs, tmp_path / "run", steps=2, seft=SeftConfig(density=0.05, static=True)))
    assert not (tmp_path / "run" / "model" / "chat_template.jinja").exists()


def test_longer_sequences_than_the_model_reads_are_refused(inputs: Path, tmp_path: Path) -> None:
    def config(**over: Any) -> TrainConfig:
        return make_config(inputs, tmp_path / "run", **over)

    path = str(inputs / "text.jsonl")
    with pytest.raises(ValueError, match="^data.seq_len=65: .*pruned reads at most 64 tokens"):
        train(config(data=DataConfig(path=path, seq_len=65)))
    with pytest.raises(ValueError, match="^eval.data.seq_len=65: .*reads at most 64 tokens"):
        train(config(eval=EvalConfig(data=DataConfig(path=path, seq_len=65))))
    short = tmp_path / "teacher"
    short.mkdir()
    for file in (inputs / "pruned").iterdir():
        (short / file.name).write_bytes(file.read_bytes())
    settings = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 8}))
    with pytest.raises(ValueError, match="data.seq_len=16: teacher.path=.*reads at most 8 tokens"):
        train(config(teacher=TeacherConfig(path=str(short))))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_positions_that_a_model_reads() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "original_max_position_embeddings": 32768}
    llama3 = yarn | {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
    llama3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    cases = {
        32768: AutoConfig.for_model("qwen2", max_position_embeddings=32768),
        131072: AutoConfig.for_model("qwen2", max_position_embeddings=32768, rope_parameters=yarn),
        131073: AutoConfig.for_model("llama", max_position_embeddings=131073, rope_parameters=llama3),
        1024: AutoConfig.for_model("gpt2"),
        None: torch.nn.Module(),
    }
    assert {longest_sequence(config) for config in cases.values()} == cases.keys()
    assert all(longest_sequence(config) == longest for longest, config in cases.items())
