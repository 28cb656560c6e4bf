"""Encoding of conversations as tokens, with a mask of the tokens that the assistant wrote.

Conversations are rendered by the tokenizer's chat template (``seft_dist.data.chat_template``). The model learns the
text that the template marks with ``{% generation %}``, as with transformers' ``return_assistant_tokens_mask``. If the
template has no such marks, it learns each turn of the assistant (``seft_dist.data.chat_spans``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from seft_dist.data.chat_spans import turn_spans
from seft_dist.data.chat_template import ChatTemplate, Message, Span, Tools

T = TypeVar("T")


class SkipError(Exception):
    """Raised for a record that is left out and counted. Its text is one of ``REASONS``."""


NO_ANSWER = "without an answer within data.seq_len tokens"
NO_MESSAGES = "without messages"
NO_CONTENT = "with a message without content"
BLANK = "with an answer of blanks"
NO_TOOL_CALLS = "with calls of tools, which the chat template cannot write"
REASONS = (NO_ANSWER, NO_MESSAGES, NO_CONTENT, BLANK, NO_TOOL_CALLS)


_ROLES = {
    **{"system": "system", "human": "user", "user": "user"},
    **{"gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "model": "assistant"},
    **{"tool": "tool", "observation": "tool", "function_response": "tool"},
}
"""Names in ShareGPT's "from", and the roles that chat templates know."""


@dataclass(frozen=True)
class EncodedChat:
    """A conversation as tokens."""

    ids: list[int]
    """Numbers of the tokens."""
    scored: list[bool]
    """True for each token that the assistant wrote; only these enter the loss."""
    lost_turns: int
    """Turns of the assistant that could not be located in the rendered text. None of their tokens is scored."""


def instruction_messages(prompt: Any, inner: Any, answer: Any, where: str) -> list[Message]:
    """Make a conversation of a prompt, an optional further input below it, and the answer.

    Args:
        prompt: The instruction.
        inner: The further input; None or empty if there is none.
        answer: The answer that the model learns.
        where: File and line of the record, for error messages.

    Raises:
        ValueError: The prompt is missing, or a value is no text, such as a list of messages.
        SkipError: The answer is missing.
    """
    for value in (prompt, inner, answer):
        if isinstance(value, bool) or not isinstance(value, (str, int, float, type(None))):
            raise ValueError(
                f"{where}: a prompt, input or answer is no text but {type(value).__name__}: needs texts, or a list of "
                "messages as prompt and another one as answer"
            )
    if prompt is None or prompt == "":
        raise ValueError(f"{where} has an empty prompt: needs text in data.prompt_field")
    if answer is None or not str(answer).strip():
        raise SkipError(BLANK)
    asked = f"{prompt}\n{inner}" if inner else str(prompt)
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": str(answer)}]


def record_messages(messages: Any, where: str, system: Any = None) -> list[Message]:
    """Check a record's list of messages, and remove the fields that hold None, as transformers does.

    Args:
        messages: The record's messages.
        where: File and line of the record, for error messages.
        system: Message of the system that ShareGPT keeps in another column; it goes before the others, if none of them
            is the system's.

    Raises:
        ValueError: The value is not a list of {"role", "content"} or {"from", "value"} objects with text.
        SkipError: There are no messages, a message that calls no tools has no content, or an answer is blank.
    """
    if messages is None or messages == []:
        raise SkipError(NO_MESSAGES)
    if not isinstance(messages, list):
        raise ValueError(f'{where}: needs a list of {{"role", "content"}} messages, found {type(messages).__name__}')
    is_sharegpt = all(map(_is_sharegpt, messages))
    messages = [_from_sharegpt(message, where) if _is_sharegpt(message) else message for message in messages]
    if is_sharegpt and system and all(message["role"] != "system" for message in messages):
        if not isinstance(system, str):
            raise ValueError(
                f"{where}: its 'system' is no text but {type(system).__name__}: needs the system's message"
            )
        messages = [{"role": "system", "content": system}, *messages]
    for message in messages:
        good = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not good or not isinstance(message.get("content"), (str, type(None))):
            names = sorted(message) if isinstance(message, dict) else type(message).__name__
            raise ValueError(f'{where}: needs messages with a text "role" and a text "content", found {names}')
    cleaned = [{key: value for key, value in message.items() if value is not None} for message in messages]
    for message in cleaned:
        if message.get("tool_calls"):
            continue
        if "content" not in message:
            raise SkipError(NO_CONTENT)
        if message["role"] == "assistant" and not message["content"].strip() and not _has_reasoning(message):
            raise SkipError(BLANK)
    return cleaned


def _is_sharegpt(message: Any) -> bool:
    return isinstance(message, dict) and "from" in message and "value" in message and "role" not in message


def _from_sharegpt(message: Message, where: str) -> Message:
    """Return a message of ShareGPT's {"from", "value"} as {"role", "content"}; other fields stay."""
    role = _ROLES.get(message["from"]) if isinstance(message["from"], str) else None
    if role is None:
        raise ValueError(
            f"{where}: a message is from {message['from']!r}: needs one of {', '.join(_ROLES)}, or messages with "
            '"role" and "content", which may hold calls of tools'
        )
    others = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {"role": role, "content": message["value"]} | others


def _has_reasoning(message: Message) -> bool:
    """Return whether a message holds reasoning beside its content."""
    return any(str(message.get(name, "")).strip() for name in ("reasoning_content", "reasoning", "thinking"))


def record_tools(tools: Any, where: str) -> Tools:
    """Check a record's list of tools.

    Args:
        tools: The record's tools.
        where: File and line of the record, for error messages.

    Returns:
        The tools; None if the record has none.

    Raises:
        ValueError: The value is not a list of JSON schemas.
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
    learnt_from: int = 0,
) -> EncodedChat:
    """Render a conversation, tokenize it, and mark the tokens that the assistant wrote.

    Turns of the assistant with ``weight`` 0 are not marked.

    Args:
        messages: Checked messages, from ``record_messages``.
        tokenizer: A fast or slow tokenizer.
        where: File and line of the record, for error messages.
        tools: Checked tools, from ``record_tools``.
        template: The tokenizer's chat template, to be shared by many records. None: it is made here, for today's date.
        learnt_from: Number of messages at the beginning whose turns are not marked.

    Raises:
        ValueError: The template refuses the conversation, or no turn of the assistant can be located in its output.
        SkipError: The conversation calls tools, which the template does not support.
    """
    template = template or ChatTemplate(tokenizer, None)
    if any(message.get("tool_calls") for message in messages) and not template.mentions("tool_calls", tools):
        raise SkipError(NO_TOOL_CALLS)
    learnt = [
        number >= learnt_from and message.get("weight") not in (0, False)
        for number, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    messages = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    try:
        text = template.render(messages, tools)
        marked = template.marked_spans(messages, tools)
        turns = turn_spans(messages, tools, text, template) if marked is None else marked
    except (TemplateError, ValueError, TypeError) as error:  # TypeError: a template may add None to text
        raise ValueError(f"{where}: the tokenizer's chat template cannot lay it out: {error}") from error
    wanted = _learnt(turns, learnt, where)
    spans = [span for span in wanted if span is not None]
    lost = len(wanted) - len(spans)
    if lost and not spans:
        raise ValueError(
            f"{where}: the tokenizer's chat template rewrites the assistant's turns, so that they cannot be found in "
            "the whole conversation; mark them in the template with {% generation %}, or use records with one turn"
        )
    ids, scored = _tokenize_spans(text, spans, tokenizer)
    return EncodedChat(ids, scored, lost)


def _learnt(spans: Sequence[T], learnt: list[bool], where: str) -> Sequence[T]:
    """Leave out the turns that are not to be learnt.

    Args:
        spans: One for each turn of the assistant, or, if all are learnt, as many as the template marks.
        learnt: Whether each turn of the assistant is learnt.
        where: File and line of the record.

    Raises:
        ValueError: It cannot be known which spans are which turns.
    """
    if all(learnt):
        return spans
    if not any(learnt):
        return []
    if len(spans) != len(learnt):
        raise ValueError(
            f"{where}: some turns of the assistant are not to be learnt (weight 0, or turns in the prompt), and the "
            f"chat template marks {len(spans)} parts of {len(learnt)} turns: leave these turns out, or their weight"
        )
    return [span for span, is_learnt in zip(spans, learnt, strict=True) if is_learnt]


def _tokenize_spans(text: str, spans: list[Span], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Tokenize a text, and mark each token that overlaps a span, which is the rule of transformers' assistant mask.

    Args:
        text: The rendered conversation.
        spans: Characters of the assistant's turns, in order and without overlap.
        tokenizer: A fast or slow tokenizer.

    Returns:
        The tokens, and True for each one that overlaps a span.
    """
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
    # A slow tokenizer gives no character offsets. The text is tokenized once more up to each border of a span: the
    # tokens that agree with those of the whole text lie in front of that border.
    for start, stop in spans:
        first, last = (_common_prefix_tokens(ids, tokens(text[:end])) for end in (start, stop))
        scored[first:last] = [True] * (last - first)
    return ids, scored


def _common_prefix_tokens(first: list[int], second: list[int]) -> int:
    """Number of tokens in the longest common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))
