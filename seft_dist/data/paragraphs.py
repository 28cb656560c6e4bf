"""Splitting of a text into paragraphs, and a form in which two of them can be compared."""

import re


def paragraphs(text: str) -> list[str]:
    """Split a text at its blank lines; paragraphs that hold only white space are left out."""
    return [part for part in re.split(r"\n\s*\n", text.strip("\n")) if part.strip()]


def normalize_whitespace(paragraph: str) -> str:
    """Put one blank between the words of a paragraph, so that paragraphs that differ only in line breaks are equal."""
    return " ".join(paragraph.split())
