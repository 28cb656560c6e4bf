"""The chat template of a tokenizer: rendered on a day of one's choice, with the assistant's part where it marks that.

A tokenizer without a template gets this plain layout, one line a message, with the tokenizer's bos token in front if it
adds one to ordinary text, and its eos token behind each of the assistant's messages::

    User: What is the capital of France?
    Assistant: Paris</s>
"""

import datetime
import json
import re
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from seft_dist.data.tokenizer import adds_bos

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None
Span = tuple[int, int]
"""Characters [start, stop) of a rendered conversation."""

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TODAY = "strftime_now"
_DIRECTIVE = re.compile(r"%[-_0^#]?[aAbBcdDeFGhHIjlkmMpPrRSTuUVwWxXyYzZ]")


class ChatTemplate:
    """How a tokenizer lays out conversations; the same on every day."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: str | None) -> None:
        """Args:
        tokenizer: With a chat template or without.
        date: Day that the template sees as today, YYYY-MM-DD. None: this day.
        """
        self._tokenizer = tokenizer
        self._day = datetime.date.fromisoformat(date) if date is not None else datetime.date.today()
        self._pinned: dict[str, str] = {}

    @property
    def date(self) -> str | None:
        """The day that conversations are laid out for, YYYY-MM-DD; None: the template does not look at it."""
        return self._day.isoformat() if uses_date(self._tokenizer) else None

    def mentions(self, name: str, tools: Tools = None) -> bool:
        """Tell whether the template reads a variable or field of this name."""
        return self._tokenizer.chat_template is not None and name in self._source(tools)

    def render(self, messages: list[Message], tools: Tools, *, prompt: bool = False) -> str:
        """Lay out a conversation as text.

        Args:
            messages: The turns; fields that hold None are left out, as transformers does.
            tools: JSON schemas of what the assistant may call.
            prompt: Whether to open the assistant's next turn.

        Raises:
            jinja2.TemplateError: The template refuses the conversation.
        """
        if self._tokenizer.chat_template is None:
            return self._plain(messages, prompt)
        return str(
            self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self._source(tools),
                tokenize=False,
                add_generation_prompt=prompt,
            )
        )

    def marked_spans(self, messages: list[Message], tools: Tools) -> list[Span] | None:
        """Find what the template marks as the assistant's with ``{% generation %}``; None: it has no such marks."""
        if self._tokenizer.chat_template is None or not _MARKER.search(self._source(tools)):
            return None
        _, spans = render_jinja_template(
            [[{key: value for key, value in message.items() if value is not None} for message in messages]],
            tools=tools,
            chat_template=self._source(tools),
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        return [(start, stop) for start, stop in spans[0] if stop > start]

    def _source(self, tools: Tools) -> str:
        source = str(self._tokenizer.get_chat_template(tools=tools))
        if source not in self._pinned:
            self._pinned[source] = pin_date(source, self._day)
        return self._pinned[source]

    def _plain(self, messages: list[Message], prompt: bool) -> str:
        begin = self._tokenizer.bos_token if adds_bos(self._tokenizer) else ""
        end = self._tokenizer.eos_token or ""
        lines = [
            f"{m['role'].capitalize()}: {m.get('content') or ''}{end if m['role'] == 'assistant' else ''}\n"
            for m in messages
        ]
        return begin + "".join(lines) + ("Assistant:" if prompt else "")


def uses_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether a tokenizer's chat template (any of them, if it has several) writes today's date."""
    found = tokenizer.chat_template or ""
    return any(_TODAY in source for source in (found.values() if isinstance(found, dict) else [found]))


def pin_date(source: str, day: datetime.date) -> str:
    """Make a chat template take one day for today.

    Templates ask with ``strftime_now(format)``, which transformers answers by the clock. A macro of that name in front
    takes its place; it knows the values of all directives (%d, %B, ...) that occur in the template. The time is 00:00.
    """
    if _TODAY not in source:
        return source
    moment = datetime.datetime.combine(day, datetime.time())
    steps = "".join(
        f" | replace('{directive}', {json.dumps(moment.strftime(directive))})"
        for directive in sorted(set(_DIRECTIVE.findall(source)))
    )
    return f"{{% macro {_TODAY}(format) %}}{{{{ format{steps} }}}}{{% endmacro +%}}" + source
