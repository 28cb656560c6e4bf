"""Where the assistant's turns are in a rendered conversation, for chat templates that do not mark them.

A turn of the assistant is all that the template writes between the opening of an answer (its generation prompt) and the
next message: the answer, calls of tools, and what ends the turn, whether that is a special token, a newline or both. It is
found by differences between renderings, never by looking for the text of the answer, which a template may trim, or write
in another way in a past turn than in the last one (Qwen3 and DeepSeek drop the reasoning of past turns).
"""

from jinja2.exceptions import TemplateError

from seft_dist.data.chat_template import ChatTemplate, Message, Span, Tools

_PROBE = "Zq7Xw0Vk"
"""An answer that no template has a reason to change."""


def turn_spans(messages: list[Message], tools: Tools, text: str, template: ChatTemplate) -> list[Span | None]:
    """Find the assistant's turns.

    Args:
        messages: The conversation.
        tools: What the assistant may call.
        text: The conversation, rendered.
        template: That rendered it.

    Returns:
        For each message of the assistant its characters in ``text``, or None where they cannot be told.
    """
    turns = _Turns(messages, tools, text, template)
    return [turns.find(number) for number, message in enumerate(messages) if message["role"] == "assistant"]


class _Turns:
    def __init__(self, messages: list[Message], tools: Tools, text: str, template: ChatTemplate) -> None:
        self._messages, self._tools, self._text, self._template = messages, tools, text, template

    def find(self, number: int) -> Span | None:
        """The turn of message ``number``."""
        closed = self._render(self._messages[:number])
        opened = self._render(self._messages[:number], prompt=True)
        ended = self._render(self._messages[: number + 1])
        if opened == closed:
            opened = None  # the template has no opening of its own
        whole = opened is not None and ended is not None and ended.startswith(opened) and self._text.startswith(ended)
        if opened is not None and ended is not None and whole:
            return len(opened), len(ended)
        return self._probe(number, closed, opened)

    def _probe(self, number: int, closed: str | None, opened: str | None) -> Span | None:
        """Put another answer in the turn's place and see which part of the conversation changes."""
        answer: Message = {"role": "assistant", "content": _PROBE}
        whole = self._render([*self._messages[:number], answer, *self._messages[number + 1 :]])
        alone = self._render([*self._messages[:number], answer])
        if whole is None or alone is None or whole.count(_PROBE) != 1 or alone.count(_PROBE) != 1:
            return None
        before, _, behind = whole.partition(_PROBE)
        ending = behind[: common(behind, alone.partition(_PROBE)[2])]  # of the turn, as it is when others follow
        rest = len(behind) - len(ending)
        if not self._text.endswith(behind):
            return None
        head, stop = common(self._text, before), len(self._text) - rest
        if opened is None and closed is not None and alone.startswith(closed):
            header = alone[len(closed) : alone.index(_PROBE)]
            blanks = 0 if header.strip() else len(header)  # these alone open nothing: the answer has them
            start = min(head, len(before) - blanks)
        else:
            start = self._start(head, closed, opened)
        return (start, stop) if start < stop else None

    def _start(self, head: int, closed: str | None, opened: str | None) -> int:
        """Where the answer begins: behind its opening, or where its first character can be another."""
        if opened is None or closed is None:
            return head
        if self._text.startswith(opened):
            return len(opened)
        opening = opened[common(closed, opened) :]
        if self._text.startswith(closed):
            return len(closed) + common(opening, self._text[len(closed) :])
        place = self._text.rfind(opening, 0, head)
        return place + len(opening) if place >= 0 else head

    def _render(self, messages: list[Message], *, prompt: bool = False) -> str | None:
        """None: the template refuses a part of the conversation."""
        if not messages:
            return None
        try:
            return self._template.render(messages, self._tools, prompt=prompt)
        except (TemplateError, ValueError, TypeError, KeyError, IndexError):
            return None


def common(first: str, second: str) -> int:
    """Length of the common beginning of two texts."""
    most = min(len(first), len(second))
    if first[:most] == second[:most]:
        return most
    low, high = 0, most  # equal up to low, not up to high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if first[low:middle] == second[low:middle] else (low, middle)
    return low
