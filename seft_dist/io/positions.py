"""Check that sequences are no longer than a model can read, in one place for plans and runs."""

from typing import Any


def longest_sequence(config: Any) -> int | None:
    """Return the number of tokens that a model can read at most; None if its configuration does not say.

    Rotary frequencies that are stretched (YaRN and others) reach ``factor`` times as far as before, although some
    models, such as Qwen 2.5 with YaRN, state the number before.

    Args:
        config: Configuration of a causal LM of transformers.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(text, "max_position_embeddings", None)
    if not isinstance(longest, int):
        return None
    rotary = getattr(text, "rope_parameters", None) or {}
    of_layers = [entry for entry in rotary.values() if isinstance(entry, dict)] or [rotary]
    for entry in of_layers:
        before, factor = entry.get("original_max_position_embeddings"), entry.get("factor")
        if isinstance(before, int) and isinstance(factor, (int, float)):
            longest = max(longest, int(before * factor))
    return longest


def check_length(config: Any, length: int, model: str, option: str) -> None:
    """Refuse sequences that are longer than a model can read.

    Args:
        config: Configuration of a causal LM of transformers.
        length: Tokens of the longest sequence.
        model: Name of the model, for the message.
        option: Option that sets the length, e.g. "data.seq_len".

    Raises:
        ValueError: The sequences are longer.
    """
    longest = longest_sequence(config)
    if longest is not None and length > longest:
        raise ValueError(
            f"{option}={length}: {model} reads at most {longest} tokens (max_position_embeddings in its config.json); "
            "choose a shorter one"
        )
