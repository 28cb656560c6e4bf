"""Suggestions for misspelled options, values and names: "did you mean ...?"."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

_CUTOFF = 0.7
"""Least similarity of a suggestion; two words of four letters with two of them swapped have 0.75."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Suggest what was meant by a word that is none of the choices.

    Args:
        word: What the user typed.
        choices: What could have been typed.

    Returns:
        "; did you mean NAME?" to be put behind a message, or "" if nothing is close.
    """
    found = get_close_matches(word, list(choices), n=1, cutoff=_CUTOFF)
    return f"; did you mean {found[0]}?" if found else ""


def suggest_for_message(message: str, options: Iterable[str]) -> str:
    """Suggest what was meant, from what a parser says about an option or a value.

    Args:
        message: Message of jsonargparse or argparse.
        options: Names of all options, dotted, without the dashes.

    Returns:
        "Did you mean ...?", several on one line, or "".
    """
    known = list(options)
    suggestions = [_option_like(name, known) for name in _unknown_options(message)]
    chosen = re.search(r"Expected a typing\.(?:Literal|Optional\[typing\.Literal)(\[.*?\]).*Got value: (\S+)", message)
    if chosen:
        suggestions.append(_choice_like(chosen[2], re.findall(r"'([^']+)'", chosen[1])))
    chosen = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
    if chosen:
        suggestions.append(_choice_like(chosen[1], re.findall(r"[\w.-]+", chosen[2])))
    return " ".join(f"Did you mean {found}?" for found in suggestions if found)


def _unknown_options(message: str) -> list[str]:
    """Find the names of options that a message calls unknown, with dashes where they came from the command line."""
    unknown = re.match(r"unrecognized arguments: (.*)", message, re.S)
    if unknown:
        return [word.partition("=")[0] for word in unknown[1].split() if word.startswith("--")]
    of_group = re.search(r"Group '([\w.]+)' does not accept option '([\w.-]+)'", message)
    if of_group:
        return [f"{of_group[1]}.{of_group[2]}"]
    return re.findall(r"Option '([\w.-]+)' is not accepted", message)


def _option_like(name: str, known: list[str]) -> str:
    """Find the option whose whole name is close, or else its group (models.NAME), or its last part: optim.lr for lr."""
    dashes = "--" if name.startswith("--") else ""
    wanted = name.removeprefix("--").replace("-", "_")
    group, dot, _ = wanted.partition(".")
    last = {option.rpartition(".")[2]: option for option in reversed(known)}
    whole = get_close_matches(wanted, known, n=1, cutoff=_CUTOFF + 0.1)  # names of a group share its name
    groups = get_close_matches(group, known, n=1, cutoff=_CUTOFF) if dot and group not in known else []
    parts = [last[part] for part in get_close_matches(wanted.rpartition(".")[2], last, n=1, cutoff=_CUTOFF)]
    return next((dashes + found for found in (*whole, *groups, *parts)), "")


def _choice_like(word: str, choices: list[str]) -> str:
    found = get_close_matches(word, choices, n=1, cutoff=_CUTOFF)
    return found[0] if found else ""
