"""Encoding of records as tokens: one function for each kind of record, for ``datasets.Dataset.map``."""

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
from seft_dist.data.records import LOCATION, SYSTEM, chat_value, text_or_value
from seft_dist.data.sequences import IGNORE
from seft_dist.data.tokenizer import strip_extra_bos

Columns = dict[str, list[Any]]
Encoder = Callable[[Columns, list[int]], Columns]
"""Function from the columns of some records and their numbers in the data set to columns of tokens."""

BETWEEN = {"concatenate": "", "newline": "\n", "blank_line": "\n\n"}
"""Text between two records, for each ``data.join`` that makes one text of all records."""
MOST_JOINED = 64 << 20
"""Largest number of characters of a joined text. It is tokenized at once, which takes many times its size in memory."""


def text_encoder(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """Make the encoder of single documents.

    Each document gets the tokenizer's own special tokens, with at most one bos in front and exactly one eos behind.

    Args:
        config: The data; it names the column with the text.
        tokenizer: A tokenizer with an eos token.
    """
    bos, end = tokenizer.bos_token_id, int(tokenizer.eos_token_id)

    def encode(records: Columns, numbers: list[int]) -> Columns:
        texts = [text for text in _texts(records, numbers, config) if text]
        rows = tokenizer(texts, verbose=False)["input_ids"] if texts else []
        return {"input_ids": [_end_with_one_eos(strip_extra_bos(row, bos), end) for row in rows]}

    return encode


def _end_with_one_eos(ids: list[int], end: int) -> list[int]:
    while ids and ids[-1] == end:
        ids = ids[:-1]
    return [*ids, end]


def joined_text(records: Any, config: DataConfig) -> str:
    """Join the text of all records, empty ones included, with the separator of ``data.join``.

    Args:
        records: A ``datasets.Dataset``.
        config: The data.

    Raises:
        ValueError: The text would be too long to be tokenized at once.
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
                f"data.join={config.join} makes one text of more than {MOST_JOINED} characters of {config.label}: "
                "needs fewer records (data.max_records), or data.join=documents"
            )
    return BETWEEN[config.join].join(texts)


def encode_joined(records: Any, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize all records as one text, with the tokenizer's own special tokens and at most one bos in front."""
    text = joined_text(records, config)
    return strip_extra_bos(list(tokenizer(text, verbose=False)["input_ids"]), tokenizer.bos_token_id)


def _texts(records: Columns, numbers: list[int], config: DataConfig) -> list[str | None]:
    """The texts of some records; None for a record without one."""
    texts = records[config.text_field]
    for row, text in enumerate(texts):
        if not isinstance(text, (str, type(None))):
            where = _location(records, row, numbers, config)
            raise ValueError(f"{where}: its {config.text_field!r} is no text but {type(text).__name__}")
    return texts


def _location(records: Columns, row: int, numbers: list[int], config: DataConfig) -> str:
    """File and line of a record for error messages; of a hub data set, its name and the record's number."""
    return str(records[LOCATION][row]) if LOCATION in records else f"{config.label}, record {numbers[row]}"


def instruction_encoder(config: DataConfig, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> Encoder:
    """Make the encoder of records with a prompt and an answer, texts or lists of messages; the answer is learnt."""

    def encode(record: dict[str, Any], where: str) -> EncodedChat:
        names = (config.prompt_field, config.input_field, config.answer_field)
        prompt, inner, answer = (text_or_value(record.get(name)) for name in names)
        if isinstance(prompt, list) and isinstance(answer, list) and not inner:
            messages = record_messages([*prompt, *answer], where)
            tools = record_tools(text_or_value(record.get(config.tools_field)), where)
            return encode_chat(messages, tokenizer, where, tools=tools, template=template, learnt_from=len(prompt))
        messages = instruction_messages(prompt, inner, answer, where)
        return encode_chat(messages, tokenizer, where, template=template)

    return _conversation_encoder(config, encode)


def chat_encoder(config: DataConfig, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> Encoder:
    """Make the encoder of records with a list of messages and, if present, a list of tools."""

    def encode(record: dict[str, Any], where: str) -> EncodedChat:
        messages = record_messages(chat_value(record[config.messages_field]), where, text_or_value(record.get(SYSTEM)))
        tools = record_tools(chat_value(record.get(config.tools_field)), where)
        return encode_chat(messages, tokenizer, where, tools=tools, template=template)

    return _conversation_encoder(config, encode)


_EncodeOne = Callable[[dict[str, Any], str], EncodedChat]


def _conversation_encoder(config: DataConfig, encode_one: _EncodeOne) -> Encoder:
    """Make an encoder that truncates conversations at ``seq_len`` and records which ones are left out, and why.

    A record that is left out keeps an empty row, so that rows and records stay aligned. Its column ``skipped`` is 1
    plus the index of the reason in ``REASONS``; it is 0 for a record that is kept.

    Args:
        config: The data.
        encode_one: Encodes one record, given its columns and its file and line.
    """

    def encode(records: Columns, numbers: list[int]) -> Columns:
        rows: Columns = {"input_ids": [], "labels": [], "skipped": [], "lost_turns": []}
        for row in range(len(numbers)):
            where = _location(records, row, numbers, config)
            ids: list[int] = []
            labels: list[int] = []
            lost, why = 0, NO_ANSWER
            try:
                chat = encode_one({name: column[row] for name, column in records.items()}, where)
                lost = chat.lost_turns
                if any(chat.scored[1 : config.seq_len]):
                    ids = chat.ids[: config.seq_len]
                    labels = [token if scored else IGNORE for token, scored in zip(ids, chat.scored, strict=False)]
            except SkipError as reason:
                why = str(reason)
            rows["input_ids"].append(ids)
            rows["labels"].append(labels)
            rows["skipped"].append(0 if ids else 1 + REASONS.index(why))
            rows["lost_turns"].append(lost)
        return rows

    return encode
