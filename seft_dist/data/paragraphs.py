"""Paragraphs of a text, and when two of them are the same."""

import re


def paragraphs(text: str) -> list[str]:
    """Cut a text at its blank lines; paragraphs of blanks are left out."""
    return [part for part in re.split(r"\n\s*\n", text.strip("\n")) if part.strip()]


def words(paragraph: str) -> str:
    """A paragraph with one blank between its words: equal for paragraphs that differ in line breaks only."""
    return " ".join(paragraph.split())
