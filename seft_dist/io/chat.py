"""Conversations to tokens, and which of the tokens are the assistant's.

The layout is the tokenizer's chat template. A tokenizer without one gets this plain layout, one line a message, with
the tokenizer's bos token in front if it adds one to ordinary text, and its eos token behind each of the assistant's
messages::

    User: What is the capital of France?
    Assistant: Paris</s>
"""

from collections.abc import Callable
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Render = Callable[[list[Message], bool], str]


def instruction_messages(prompt: Any, inner: Any, answer: Any, where: str) -> list[Message]:
    """A prompt, an optional further input below it, and the answer, as a conversation. Local.

    Args:
        prompt: The instruction.
        inner: The further input; None or empty if there is none.
        answer: What the model should say.
        where: Place of the record, for messages.

    Raises:
        ValueError: The prompt is missing.
    """
    if prompt is None or prompt == "":
        raise ValueError(f"{where} has an empty prompt: needs text in data.prompt_field")
    asked = f"{prompt}\n{inner}" if inner else str(prompt)
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": "" if answer is None else str(answer)}]


def record_messages(messages: Any, where: str) -> list[Message]:
    """Check a record's list of messages. Local.

    Raises:
        ValueError: It is not a list of {"role", "content"} with text.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'{where}: needs a list of {{"role", "content"}} messages, found {type(messages).__name__}')
    for message in messages:
        good = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not good or not isinstance(message.get("content"), (str, type(None))):
            found = sorted(message) if isinstance(message, dict) else type(message).__name__
            raise ValueError(f'{where}: needs messages with a text "role" and a text "content", found {found}')
    # Arrow fills fields that only some messages have with None; templates test for presence.
    return [{key: value for key, value in {"content": "", **m}.items() if value is not None} for m in messages]


def encode_chat(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[list[int], list[bool]]:
    """Lay out a conversation and find the assistant's part. Local.

    Args:
        messages: {"role", "content"} of each turn.
        tokenizer: Fast or slow; offsets are not needed.
        where: Place of the record, for messages.

    Returns:
        Token numbers, and for each whether it is inside a message of the assistant (its end-of-turn token included).

    Raises:
        ValueError: The template refuses the conversation, or changes its turns so that they cannot be found again.
    """
    render = _renderer(tokenizer)
    try:
        text = render(messages, False)
        spans = _assistant_spans(messages, text, render)
    except (TemplateError, ValueError) as error:
        raise ValueError(f"{where}: the tokenizer's chat template cannot lay it out: {error}") from error
    asked = [m for m in messages[1:] if m["role"] == "assistant" and m.get("content")]
    if asked and not spans:
        raise ValueError(
            f"{where}: the tokenizer's chat template rewrites the assistant's turns, so that they cannot be found in "
            "the whole conversation; change the template, or use records with one turn"
        )

    def tokens(part: str) -> list[int]:
        return list(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"])

    ids = tokens(text)
    scored = [False] * len(ids)
    for start, stop in spans:
        # A token that crosses the border into the answer belongs to the answer: the prompt alone would not have it.
        first, last = (_common(ids, tokens(text[:end])) for end in (start, stop))
        scored[first:last] = [True] * (last - first)
    return ids, scored


def _renderer(tokenizer: PreTrainedTokenizerBase) -> Render:
    if tokenizer.chat_template is not None:
        return lambda messages, prompt: str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        )
    begin = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]

    def plain(messages: list[Message], prompt: bool) -> str:
        end = tokenizer.eos_token or ""
        lines = [
            f"{m['role'].capitalize()}: {m['content']}{end if m['role'] == 'assistant' else ''}\n" for m in messages
        ]
        return (tokenizer.bos_token if begin else "") + "".join(lines) + ("Assistant:" if prompt else "")

    return plain


def _assistant_spans(messages: list[Message], text: str, render: Render) -> list[tuple[int, int]]:
    """Character ranges of the assistant's messages in the whole text, each with its end-of-turn mark.

    A turn lies between the text up to it, with the opening of an answer, and the text that ends with it. Some templates
    write a past turn differently from the last one (without its reasoning): then it is looked for by its content.
    """
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or number == 0 or not message["content"]:
            continue
        before, after = render(messages[:number], True), render(messages[: number + 1], False)
        if not text.startswith(before) or not after.startswith(before):
            continue
        body = after[len(before) :]
        shortened = message["content"].strip() + body.rpartition(message["content"].strip())[2]
        for said in (body, shortened):
            if text.startswith(said, len(before)):
                spans.append((len(before), len(before) + len(said.rstrip())))
                break
    return spans


def _common(first: list[int], second: list[int]) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))
