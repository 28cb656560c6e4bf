"""The chat template of a tokenizer, rendered for a fixed date, with the spans that it marks as the assistant's.

A tokenizer without a template gets the following plain layout of one line for each message, which is written as a
template too, so that it can be stored with a model. The tokenizer's bos token comes first if the tokenizer adds one to
ordinary text, and its eos token follows each message of the assistant::

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
    """Renders conversations as the tokenizer's chat template does, for one fixed date."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: str | None) -> None:
        """Args:
        tokenizer: A tokenizer with a chat template or without.
        date: Day that the template is given as today, YYYY-MM-DD. None: the current day.
        """
        self._tokenizer = tokenizer
        self._day = datetime.date.fromisoformat(date) if date is not None else datetime.date.today()
        self._pinned: dict[str, str] = {}
        self._plain = plain_template(tokenizer) if tokenizer.chat_template is None else ""

    @property
    def date(self) -> str | None:
        """Day that the template is given as today, YYYY-MM-DD; None if the template does not use the date."""
        return self._day.isoformat() if uses_date(self._tokenizer) else None

    def mentions(self, name: str, tools: Tools = None) -> bool:
        """Return whether the template's source contains the name of a variable or field."""
        return self._tokenizer.chat_template is not None and name in self._source(tools)

    def render(self, messages: list[Message], tools: Tools, *, prompt: bool = False) -> str:
        """Render a conversation as text.

        Args:
            messages: The turns; fields that hold None are left out, as transformers does.
            tools: JSON schemas of the tools that the assistant may call.
            prompt: Add the generation prompt, which opens the assistant's next turn.

        Raises:
            jinja2.TemplateError: The template refuses the conversation.
        """
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
        """Return the spans that the template marks with ``{% generation %}``; None if it has no such marks."""
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
        if self._tokenizer.chat_template is None:
            return self._plain
        source = str(self._tokenizer.get_chat_template(tools=tools))
        if source not in self._pinned:
            self._pinned[source] = pin_date(source, self._day)
        return self._pinned[source]


def plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the plain layout as the Jinja source of a chat template."""
    begin = "{{ bos_token }}" if adds_bos(tokenizer) else ""
    end = "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}" if tokenizer.eos_token else ""
    return (
        begin
        + "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] or '' }}"
        + end
        + "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
    )


def uses_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer's chat template (any of them, if it has several) writes today's date."""
    template = tokenizer.chat_template or ""
    return any(_TODAY in source for source in (template.values() if isinstance(template, dict) else [template]))


def pin_date(source: str, day: datetime.date) -> str:
    """Rewrite the source of a chat template so that it uses a given day as today.

    Templates call ``strftime_now(format)``, which transformers implements with the clock. A macro of the same name in
    front of the template hides that function; it replaces each directive (%d, %B, ...) that occurs in the template by
    its value on the given day, at 00:00.

    Args:
        source: The template, in Jinja.
        day: Day to use.
    """
    if _TODAY not in source:
        return source
    moment = datetime.datetime.combine(day, datetime.time())
    steps = "".join(
        f" | replace('{directive}', {json.dumps(moment.strftime(directive))})"
        for directive in sorted(set(_DIRECTIVE.findall(source)))
    )
    return f"{{% macro {_TODAY}(format) %}}{{{{ format{steps} }}}}{{% endmacro +%}}" + source
