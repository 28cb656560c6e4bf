"""Conversations to tokens, and which of the tokens are the assistant's.

The layout is the tokenizer's chat template (``seft_dist.data.chat_template``). What is learned is what the template marks
with ``{% generation %}``, just as transformers' ``return_assistant_tokens_mask``; of a template without marks it is each
turn of the assistant (``seft_dist.data.chat_spans``).
"""

from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from seft_dist.data.chat_spans import turn_spans
from seft_dist.data.chat_template import ChatTemplate, Message, Span, Tools


class SkipError(Exception):
    """A record that is left out and counted; the text is one of ``REASONS``."""


NO_ANSWER = "without an answer within data.seq_len tokens"
NO_MESSAGES = "without messages"
NO_CONTENT = "with a message without content"
BLANK = "with an answer of blanks"
NO_TOOL_CALLS = "with calls of tools, which the chat template cannot write"
REASONS = (NO_ANSWER, NO_MESSAGES, NO_CONTENT, BLANK, NO_TOOL_CALLS)


@dataclass(frozen=True)
class EncodedChat:
    """A conversation as tokens."""

    ids: list[int]
    scored: list[bool]
    """For each token whether it is the assistant's."""
    lost_turns: int
    """Turns of the assistant that could not be found in what the template writes: nothing of them is scored."""


def instruction_messages(prompt: Any, inner: Any, answer: Any, where: str) -> list[Message]:
    """A prompt, an optional further input below it, and the answer, as a conversation.

    Args:
        prompt: The instruction.
        inner: The further input; None or empty if there is none.
        answer: What the model should say.
        where: Place of the record, for messages.

    Raises:
        ValueError: The prompt is missing.
        SkipError: The answer is.
    """
    if prompt is None or prompt == "":
        raise ValueError(f"{where} has an empty prompt: needs text in data.prompt_field")
    if answer is None or not str(answer).strip():
        raise SkipError(BLANK)
    asked = f"{prompt}\n{inner}" if inner else str(prompt)
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": str(answer)}]


def record_messages(messages: Any, where: str) -> list[Message]:
    """Check a record's list of messages, and take out the fields that hold None, as transformers does.

    Raises:
        ValueError: It is not a list of {"role", "content"} with text.
        SkipError: There are no messages; one has no content (one that calls tools needs none) or answers with blanks.
    """
    if messages is None or messages == []:
        raise SkipError(NO_MESSAGES)
    if not isinstance(messages, list):
        raise ValueError(f'{where}: needs a list of {{"role", "content"}} messages, found {type(messages).__name__}')
    for message in messages:
        good = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not good or not isinstance(message.get("content"), (str, type(None))):
            names = sorted(message) if isinstance(message, dict) else type(message).__name__
            raise ValueError(f'{where}: needs messages with a text "role" and a text "content", found {names}')
    found = [{key: value for key, value in message.items() if value is not None} for message in messages]
    for message in found:
        if message.get("tool_calls"):
            continue
        if "content" not in message:
            raise SkipError(NO_CONTENT)
        if message["role"] == "assistant" and not message["content"].strip() and not _reasons(message):
            raise SkipError(BLANK)
    return found


def _reasons(message: Message) -> bool:
    """Tell whether an answer holds reasoning beside its content."""
    return any(str(message.get(name, "")).strip() for name in ("reasoning_content", "reasoning", "thinking"))


def record_tools(tools: Any, where: str) -> Tools:
    """Check a record's list of tools; None if it has none.

    Raises:
        ValueError: It is not a list of JSON schemas.
    """
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{where}: needs a list of JSON schemas in data.tools_field, found {type(tools).__name__}")
    return tools


def encode_chat(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    *,
    tools: Tools = None,
    template: ChatTemplate | None = None,
) -> EncodedChat:
    """Lay out a conversation and find the assistant's part.

    Args:
        messages: From ``record_messages``.
        tokenizer: Fast or slow.
        where: Place of the record, for messages.
        tools: From ``record_tools``.
        template: The tokenizer's, to be used for many records. None: made here, for today.

    Raises:
        ValueError: The template refuses the conversation, or writes no turn of the assistant that can be found.
        SkipError: The conversation calls tools, and the template knows of none.
    """
    template = template or ChatTemplate(tokenizer, None)
    if any(message.get("tool_calls") for message in messages) and not template.mentions("tool_calls", tools):
        raise SkipError(NO_TOOL_CALLS)
    lost = 0
    try:
        text = template.render(messages, tools)
        spans = template.marked_spans(messages, tools)
        if spans is None:
            found = turn_spans(messages, tools, text, template)
            spans = [span for span in found if span is not None]
            lost = len(found) - len(spans)
    except (TemplateError, ValueError, TypeError) as error:  # a template may add None to text
        raise ValueError(f"{where}: the tokenizer's chat template cannot lay it out: {error}") from error
    if lost and not spans:
        raise ValueError(
            f"{where}: the tokenizer's chat template rewrites the assistant's turns, so that they cannot be found in "
            "the whole conversation; mark them in the template with {% generation %}, or use records with one turn"
        )
    ids, scored = _tokens_of(text, spans, tokenizer)
    return EncodedChat(ids, scored, lost)


def _tokens_of(text: str, spans: list[Span], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Tokens, and whether each overlaps a span: the rule of transformers' assistant mask."""
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, scored, number = list(encoded["input_ids"]), [], 0
        for start, stop in encoded["offset_mapping"]:
            while number < len(spans) and start >= spans[number][1]:
                number += 1
            scored.append(number < len(spans) and stop > spans[number][0])
        return ids, scored

    def tokens(part: str) -> list[int]:
        return list(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"])

    ids = tokens(text)
    scored = [False] * len(ids)
    for start, stop in spans:  # a slow tokenizer has no offsets: what two texts share is in front of the border
        first, last = (_common_tokens(ids, tokens(text[:end])) for end in (start, stop))
        scored[first:last] = [True] * (last - first)
    return ids, scored


def _common_tokens(first: list[int], second: list[int]) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))
