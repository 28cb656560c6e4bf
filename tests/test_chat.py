"""The learned part of conversations: spans that the template marks, or the assistant's turns; and skipped records."""

import datetime
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers.utils import chat_template_utils

from seft_dist.config import DataConfig, ModelConfig
from seft_dist.data.chat import encode_chat
from seft_dist.data.chat_template import ChatTemplate, pin_date, uses_date
from seft_dist.data.load import load_sequences
from seft_dist.data.sequences import IGNORE
from seft_dist.data.tokenizer import load_tokenizer
from tests.chat_templates import LLAMA, QWEN, SPECIAL, TEMPLATES, TOOL_USERS, unmarked
from tests.texts import fast_tokenizer, sentencepiece_tokenizer, write_jsonl

pytestmark = pytest.mark.usefixtures("cache")

CALL = {
    "type": "function",
    "id": "a1b2c3d4e",
    "function": {"name": "weather", "arguments": {"city": "Rome", "days": 2}},
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
SHORT = [("user", "hi there"), ("assistant", "well met"), ("user", "bye"), ("assistant", " so long ")]
REASONED = [
    ("user", "one?"),
    ("assistant", "<think>\nhm\n</think>\n\nfirst"),
    ("user", "two?"),
    ("assistant", "<think>\nhm, hm\n</think>\n\nsecond"),
]
CHATS: dict[str, list[dict[str, Any]]] = {
    "short": [{"role": role, "content": content} for role, content in SHORT],
    "reasoned": [{"role": role, "content": content} for role, content in REASONED],
    "one blank line inside": [{"role": "user", "content": "a\n\nb"}, {"role": "assistant", "content": "c\n\nd"}],
}
TOOL_CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "rain?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "no", "tool_call_id": "a1b2c3d4e"},
    {"role": "assistant", "content": "It stays dry."},
    {"role": "user", "content": "thanks"},
    {"role": "assistant", "content": "Any time."},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer = fast_tokenizer(path)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(ModelConfig(path=str(folder)))


def expected(tokenizer: Any, marked: str, messages: Any, tools: Any = None) -> tuple[list[int], list[bool]]:
    """Tokens and mask that transformers computes from the template with marks."""
    found = tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
    )
    assert 1 in found["assistant_masks"]
    return found["input_ids"], [mask == 1 for mask in found["assistant_masks"]]


@pytest.mark.parametrize("marks", [True, False], ids=["marked", "unmarked"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_mask_is_that_of_the_marked_template(name: str, marks: bool, tokenizer: Any) -> None:
    template = TEMPLATES[name]
    tokenizer.chat_template = template if marks else unmarked(template)
    for messages in CHATS.values():
        found = encode_chat(messages, tokenizer, "here")
        assert (found.ids, found.scored) == expected(tokenizer, template, messages)
        assert found.lost_turns == 0


@pytest.mark.parametrize("marks", [True, False], ids=["marked", "unmarked"])
@pytest.mark.parametrize("name", TOOL_USERS)
def test_tools_and_their_calls_reach_the_template(name: str, marks: bool, tokenizer: Any, tmp_path: Path) -> None:
    template = TEMPLATES[name]
    tokenizer.chat_template = template if marks else unmarked(template)
    ids, scored = expected(tokenizer, template, TOOL_CHAT, TOOLS)
    assert "weather" in tokenizer.decode([token for token, yes in zip(ids, scored, strict=True) if yes])
    other = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "extra": {"deep": 1}}]
    records: list[dict[str, Any]] = [{"messages": TOOL_CHAT, "tools": TOOLS}, {"messages": other}]
    paths = [write_jsonl(tmp_path / "a.jsonl", records), tmp_path / "a.parquet"]
    datasets.Dataset.from_list(records).to_parquet(paths[1])  # Arrow fills in nulls
    for path in paths:
        found = load_sequences(DataConfig(path=str(path)), tokenizer)
        assert len(found) == 2
        assert found[0][0].tolist() == ids
        assert found[0][1].tolist() == [token if yes else IGNORE for token, yes in zip(ids, scored, strict=True)]


def test_turns_of_a_slow_tokenizer_are_those_of_the_marks(tmp_path: Path) -> None:
    sentencepiece_tokenizer(tmp_path, slow=True)
    tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path)))
    assert not tokenizer.is_fast
    for template in (QWEN, unmarked(QWEN)):
        tokenizer.chat_template = template
        chat = encode_chat(CHATS["short"], tokenizer, "here")
        text = tokenizer.decode([token for token, yes in zip(chat.ids, chat.scored, strict=True) if yes])
        assert text == "well met<|im_end|>\n so long <|im_end|>\n"


def test_records_without_an_answer_are_skipped_and_counted(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer.chat_template = unmarked(TEMPLATES["gemma"])  # knows no calls of tools
    user = {"role": "user", "content": "hi"}
    answers: list[Any] = ["yes", None, "", " \n ", "no"]
    records: list[Any] = [{"messages": [user, {"role": "assistant", "content": answer}]} for answer in answers]
    records += [{"messages": TOOL_CHAT}, {"messages": []}, {"messages": None}]
    with caplog.at_level(logging.WARNING):
        found = load_sequences(DataConfig(path=str(write_jsonl(tmp_path / "a.jsonl", records))), tokenizer)
    assert len(found) == 2
    warning = "6 of 8 records are left out: 2 without messages; 1 with a message without content; "
    warning += "2 with an answer of blanks; 1"
    assert warning in caplog.text
    instructions = [{"instruction": "a", "output": answer} for answer in answers]
    found = load_sequences(DataConfig(path=str(write_jsonl(tmp_path / "b.jsonl", instructions))), tokenizer)
    assert len(found) == 2


def test_turns_that_cannot_be_found_are_counted(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}{{ m.content if loop.last else m.content | upper }}\n{% endfor %}"
    )
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHATS["short"]}])
    with caplog.at_level(logging.WARNING):
        found = load_sequences(DataConfig(path=str(path)), tokenizer)
    assert "1 turns of the assistant are not learned: the chat template rewrites them" in caplog.text
    assert tokenizer.decode(found[0][1][found[0][1] != IGNORE]) == " so long \n"


class _Fixed(datetime.datetime):
    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return cls(2031, 3, 9)


@pytest.mark.parametrize(
    "template", [LLAMA, unmarked(LLAMA), "{{ strftime_now('%Y-%m-%d') }} %d{{ messages[-1].content }}"]
)
def test_a_template_sees_the_day_it_is_given(
    template: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tokenizer.chat_template = template
    assert uses_date(tokenizer)
    monkeypatch.setattr(chat_template_utils, "datetime", _Fixed)
    on_the_day = tokenizer.apply_chat_template(CHATS["short"], return_dict=True)["input_ids"]
    monkeypatch.undo()
    pinned = ChatTemplate(tokenizer, "2031-03-09")
    assert encode_chat(CHATS["short"], tokenizer, "here", template=pinned).ids == on_the_day
    assert (
        encode_chat(CHATS["short"], tokenizer, "here", template=ChatTemplate(tokenizer, "2031-03-10")).ids != on_the_day
    )
    path = str(write_jsonl(tmp_path / "a.jsonl", [{"messages": CHATS["short"]}]))
    read = {day: load_sequences(DataConfig(path=path, date=day), tokenizer) for day in ("2031-03-09", "2031-03-10")}
    assert read["2031-03-09"][0][0].tolist() == on_the_day != read["2031-03-10"][0][0].tolist()
    assert read["2031-03-09"].date == "2031-03-09"


def test_a_template_without_a_date_is_left_alone(tokenizer: Any) -> None:
    tokenizer.chat_template = QWEN
    assert not uses_date(tokenizer) and ChatTemplate(tokenizer, "2031-03-09").date is None
    assert pin_date(QWEN, datetime.date(2031, 3, 9)) == QWEN


def test_the_template_of_several_is_that_for_tools(tokenizer: Any) -> None:
    tokenizer.chat_template = {"default": TEMPLATES["gemma"], "tool_use": QWEN}
    assert (
        encode_chat(CHATS["short"], tokenizer, "here").ids == expected(tokenizer, TEMPLATES["gemma"], CHATS["short"])[0]
    )
    found = encode_chat(TOOL_CHAT, tokenizer, "here", tools=TOOLS)
    assert (found.ids, found.scored) == expected(tokenizer, QWEN, TOOL_CHAT, TOOLS)


def test_arguments_stay_as_they_were_written(tokenizer: Any, tmp_path: Path) -> None:
    """Arrow would give each call the fields of all others."""
    tokenizer.chat_template = QWEN
    calls = [{"a": 1}, {"b": "x", "c": [1, "two"]}, {"a": None}]
    records = [
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": call}}]}]}
        for call in calls
    ]
    found = load_sequences(DataConfig(path=str(write_jsonl(tmp_path / "a.jsonl", records))), tokenizer)
    for number, call in enumerate(calls):
        assert json.dumps(call) in tokenizer.decode(found[number][0])
