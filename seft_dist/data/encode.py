"""Records to tokens: one function for each kind of record, for ``datasets.Dataset.map``."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from seft_dist.config import DataConfig
from seft_dist.data.chat import (
    NO_ANSWER,
    REASONS,
    EncodedChat,
    SkipError,
    encode_chat,
    instruction_messages,
    record_messages,
    record_tools,
)
from seft_dist.data.chat_template import ChatTemplate
from seft_dist.data.records import PLACE, chat_value
from seft_dist.data.sequences import IGNORE
from seft_dist.data.tokenizer import one_bos

Columns = dict[str, list[Any]]
Encoder = Callable[[Columns, list[int]], Columns]
"""Takes columns of some records and their numbers in the data set; gives columns of tokens."""

BETWEEN = {"concatenate": "", "newline": "\n", "blank_line": "\n\n"}
"""Text between two records, for each ``data.join`` that makes one text of all."""
MOST_JOINED = 64 << 20
"""Most characters of a joined text: it is tokenised in one go, which takes many times its size in memory."""


def text_encoder(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """Each document by itself: the tokenizer's own special tokens, at most one bos in front, exactly one eos behind."""
    bos, end = tokenizer.bos_token_id, int(tokenizer.eos_token_id)

    def encode(records: Columns, numbers: list[int]) -> Columns:
        texts = [text for text in _texts(records, numbers, config) if text]
        rows = tokenizer(texts, verbose=False)["input_ids"] if texts else []
        return {"input_ids": [_one_end(one_bos(row, bos), end) for row in rows]}

    return encode


def _one_end(ids: list[int], end: int) -> list[int]:
    while ids and ids[-1] == end:
        ids = ids[:-1]
    return [*ids, end]


def joined_text(records: Any, config: DataConfig) -> str:
    """Make one text of all records, empty ones included, as ``data.join`` says.

    Raises:
        ValueError: It would be too long to be tokenised in one go.
    """
    texts: list[str] = []
    length = 0
    for start in range(0, len(records), 1000):
        columns = records[start : start + 1000]
        some = _texts(columns, list(range(start, start + 1000)), config)
        texts += [text for text in some if text is not None]
        length += sum(len(text or "") for text in some)
        if length > MOST_JOINED:
            raise ValueError(
                f"data.join={config.join} makes one text of more than {MOST_JOINED} characters of {config.path}: needs "
                "fewer records (data.max_records), or data.join=documents"
            )
    return BETWEEN[config.join].join(texts)


def encode_joined(records: Any, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenise all records as one text: the tokenizer's own special tokens, at most one bos."""
    text = joined_text(records, config)
    return one_bos(list(tokenizer(text, verbose=False)["input_ids"]), tokenizer.bos_token_id)


def _texts(records: Columns, numbers: list[int], config: DataConfig) -> list[str | None]:
    texts = records[config.text_field]
    for place, text in enumerate(texts):
        if not isinstance(text, (str, type(None))):
            where = _where(records, place, numbers, config)
            raise ValueError(f"{where}: its {config.text_field!r} is no text but {type(text).__name__}")
    return texts


def _where(records: Columns, place: int, numbers: list[int], config: DataConfig) -> str:
    return str(records[PLACE][place]) if PLACE in records else f"{config.path}, record {numbers[place]}"


def instruction_encoder(config: DataConfig, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> Encoder:
    """A prompt and its answer as a conversation of two turns."""

    def encode(record: dict[str, Any], where: str) -> EncodedChat:
        inner = record.get(config.input_field)
        messages = instruction_messages(record[config.prompt_field], inner, record[config.answer_field], where)
        return encode_chat(messages, tokenizer, where, template=template)

    return _conversations(config, encode)


def chat_encoder(config: DataConfig, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> Encoder:
    """A list of messages, and maybe of tools."""

    def encode(record: dict[str, Any], where: str) -> EncodedChat:
        messages = record_messages(chat_value(record[config.messages_field]), where)
        tools = record_tools(chat_value(record.get(config.tools_field)), where)
        return encode_chat(messages, tokenizer, where, tools=tools, template=template)

    return _conversations(config, encode)


def _conversations(config: DataConfig, encode_one: Callable[[dict[str, Any], str], EncodedChat]) -> Encoder:
    """One row a record, also where it is left out: ``skipped`` is the number of the reason plus 1."""

    def encode(records: Columns, numbers: list[int]) -> Columns:
        rows: Columns = {"input_ids": [], "labels": [], "skipped": [], "lost_turns": []}
        for place in range(len(numbers)):
            where = _where(records, place, numbers, config)
            ids: list[int] = []
            labels: list[int] = []
            lost, why = 0, NO_ANSWER
            try:
                chat = encode_one({name: column[place] for name, column in records.items()}, where)
                lost = chat.lost_turns
                if any(chat.scored[1 : config.seq_len]):
                    ids = chat.ids[: config.seq_len]
                    labels = [token if yes else IGNORE for token, yes in zip(ids, chat.scored, strict=False)]
            except SkipError as reason:
                why = str(reason)
            rows["input_ids"].append(ids)
            rows["labels"].append(labels)
            rows["skipped"].append(0 if ids else 1 + REASONS.index(why))
            rows["lost_turns"].append(lost)
        return rows

    return encode
