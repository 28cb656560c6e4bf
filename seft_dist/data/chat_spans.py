"""Locate the assistant's turns in a rendered conversation, for chat templates that do not mark them.

A turn of the assistant is everything that the template writes between the opening of an answer (its generation prompt)
and the next message: the answer, calls of tools, and what ends the turn, be it a special token, a newline or both.
Turns are located by comparing renderings, not by searching for the text of the answer: a template may trim the answer,
or write it differently in a past turn than in the last one (Qwen3 and DeepSeek drop the reasoning of past turns).
"""

from jinja2.exceptions import TemplateError

from seft_dist.data.chat_template import ChatTemplate, Message, Span, Tools

_PROBE = "Zq7Xw0Vk"
"""An answer that no template has a reason to change."""


def turn_spans(messages: list[Message], tools: Tools, text: str, template: ChatTemplate) -> list[Span | None]:
    """Locate the assistant's turns in a rendered conversation.

    Args:
        messages: The conversation.
        tools: Tools that the assistant may call.
        text: The rendered conversation.
        template: Template that rendered it.

    Returns:
        For each message of the assistant the characters of its turn in ``text``, or None if they cannot be determined.
    """
    locator = _TurnLocator(messages, tools, text, template)
    return [locator.span(number) for number, message in enumerate(messages) if message["role"] == "assistant"]


class _TurnLocator:
    """Renders parts and variants of one conversation, and compares them with the whole."""

    def __init__(self, messages: list[Message], tools: Tools, text: str, template: ChatTemplate) -> None:
        self._messages, self._tools, self._text, self._template = messages, tools, text, template

    def span(self, number: int) -> Span | None:
        """Locate the turn of message ``number``.

        The simple case is tried first: the conversation up to this message, rendered with and without it, is a prefix
        of the whole. Templates that write past turns differently need the second way.
        """
        closed = self._render(self._messages[:number])
        opened = self._render(self._messages[:number], prompt=True)
        ended = self._render(self._messages[: number + 1])
        if opened == closed:
            opened = None  # this template writes no generation prompt
        whole = opened is not None and ended is not None and ended.startswith(opened) and self._text.startswith(ended)
        if opened is not None and ended is not None and whole:
            return len(opened), len(ended)
        return self._span_by_substitution(number, closed, opened)

    def _span_by_substitution(self, number: int, closed: str | None, opened: str | None) -> Span | None:
        """Locate a turn by replacing its answer and comparing which part of the rendered conversation changes.

        Args:
            number: Index of the assistant's message.
            closed: The messages before it, rendered; None if the template refuses them.
            opened: The same with the generation prompt; None if the template has none or refuses.
        """
        answer: Message = {"role": "assistant", "content": _PROBE}
        whole = self._render([*self._messages[:number], answer, *self._messages[number + 1 :]])
        alone = self._render([*self._messages[:number], answer])
        if whole is None or alone is None or whole.count(_PROBE) != 1 or alone.count(_PROBE) != 1:
            return None
        before, _, behind = whole.partition(_PROBE)
        # What ends the turn is what follows the answer both in the middle of the conversation and at its end
        ending = behind[: common_prefix_length(behind, alone.partition(_PROBE)[2])]
        rest = len(behind) - len(ending)
        if not self._text.endswith(behind):
            return None
        head, stop = common_prefix_length(self._text, before), len(self._text) - rest
        if opened is None and closed is not None and alone.startswith(closed):
            header = alone[len(closed) : alone.index(_PROBE)]
            blanks = 0 if header.strip() else len(header)  # blanks alone are no header: they belong to the answer
            start = min(head, len(before) - blanks)
        else:
            start = self._start(head, closed, opened)
        return (start, stop) if start < stop else None

    def _start(self, head: int, closed: str | None, opened: str | None) -> int:
        """Position at which the answer begins: behind the generation prompt, or else at the first differing character.

        Args:
            head: Number of leading characters that do not change when the answer is replaced.
            closed: The messages before the answer, rendered.
            opened: The same with the generation prompt.
        """
        if opened is None or closed is None:
            return head
        if self._text.startswith(opened):
            return len(opened)
        opening = opened[common_prefix_length(closed, opened) :]
        if self._text.startswith(closed):
            return len(closed) + common_prefix_length(opening, self._text[len(closed) :])
        position = self._text.rfind(opening, 0, head)
        return position + len(opening) if position >= 0 else head

    def _render(self, messages: list[Message], *, prompt: bool = False) -> str | None:
        """Render a part of the conversation; None if it is empty or the template refuses it."""
        if not messages:
            return None
        try:
            return self._template.render(messages, self._tools, prompt=prompt)
        except (TemplateError, ValueError, TypeError, KeyError, IndexError):
            return None


def common_prefix_length(first: str, second: str) -> int:
    """Number of characters in the longest common prefix of two texts, by bisection over slices."""
    most = min(len(first), len(second))
    if first[:most] == second[:most]:
        return most
    low, high = 0, most  # equal up to low, not up to high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if first[low:middle] == second[low:middle] else (low, middle)
    return low
