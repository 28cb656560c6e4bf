"""The layout of ``--help``: paragraphs of a description stay apart, and its examples stay on lines of their own."""

import textwrap

from jsonargparse import DefaultHelpFormatter


class HelpFormatter(DefaultHelpFormatter):
    """jsonargparse's formatter, but it does not join the paragraphs of a command's docstring into one."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = textwrap.dedent(text).strip("\n").split("\n\n")
        return "\n\n".join(self._fill_paragraph(paragraph, width, indent) for paragraph in paragraphs)

    def _fill_paragraph(self, paragraph: str, width: int, indent: str) -> str:
        if paragraph.startswith(" "):  # commands to copy
            return textwrap.indent(paragraph, indent)
        return super()._fill_text(paragraph, width, indent)
