"""Loading of a data set as token sequences, which lie in a memory-mapped file of the ``datasets`` cache.

The ranks on one machine share the pages of that file.
"""

import functools
import hashlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import transformers
from transformers import PreTrainedTokenizerBase

from seft_dist.config import DataConfig
from seft_dist.data.chat_template import ChatTemplate, plain_template
from seft_dist.data.encode import chat_encoder, encode_joined, instruction_encoder, text_encoder
from seft_dist.data.records import generate_cached, read_records
from seft_dist.data.selection import select_records
from seft_dist.data.sequences import Conversations, PackedBlocks, Provenance, TokenSequences
from seft_dist.data.several import MixedSequences, PackedConversations
from seft_dist.data.tokenizer import adds_bos

log = logging.getLogger(__name__)

_ENCODING = 3
"""Version of the encoding, part of the cache's key: to be raised when the same records give other tokens."""
_MANY_BORDERS = 0.02
"""Share of bos and eos among the tokens of a text above which a warning is logged."""


def load_sequences(config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, progress: bool = True) -> TokenSequences:
    """Read a data set, or the sources of a mix, and turn it into token sequences. Every rank gets the same sequences.

    Args:
        config: The records, and how they are read.
        tokenizer: The model's tokenizer, from ``load_tokenizer``.
        progress: Show progress bars (rank 0).

    Returns:
        What ``load_source`` returns; with ``separate`` several conversations to a sequence; for a mix
        ``MixedSequences``.

    Raises:
        ValueError: There is no such data, it cannot be read, has no usable columns, or is too short.
        OSError: The permission to read a file is missing.
    """
    if config.mix is None:
        found = load_source(config, tokenizer, progress=progress)
        return PackedConversations(found) if config.separate and isinstance(found, Conversations) else found
    sources: dict[str, TokenSequences] = {}
    for name, source in config.sources.items():
        try:
            sources[name] = load_sequences(source, tokenizer, progress=progress)
        except ValueError as error:
            raise ValueError(f"data.mix.{name}: {error}") from error
    return MixedSequences(sources, {name: source.weight for name, source in config.mix.items()})


def load_source(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, progress: bool = True
) -> PackedBlocks | Conversations:
    """Read a data set of one source and turn it into token sequences. Every rank gets the same sequences.

    Records of kind "text": the documents are concatenated, each with the tokenizer's own special tokens and one eos
    behind it, or (``join``) one text is made of all records. The result is cut into blocks of exactly ``seq_len``
    tokens, and the incomplete block at the end is dropped.

    Records of kind "instruction" and "chat": each record is one sequence, rendered by the tokenizer's chat template (or
    by the plain layout of ``seft_dist.data.chat_template``) and truncated at ``seq_len``, with loss on the answers
    only. Records without an answer within ``seq_len`` are left out and counted.

    Args:
        config: The records, and how they are read.
        tokenizer: The model's tokenizer, from ``load_tokenizer``.
        progress: Show progress bars (rank 0).

    Returns:
        A sequence of ``(input_ids, labels)``, in the order of the records; of text with ``separate`` also
        ``position_ids``.

    Raises:
        ValueError: There is no such data, it cannot be read, has no usable columns, or is too short.
        OSError: The permission to read a file is missing.
    """
    (datasets.enable_progress_bars if progress else datasets.disable_progress_bars)()
    records, kind, config = read_records(config)
    records = select_records(records, config)
    template = ChatTemplate(tokenizer, config.date)
    date, invented = (None, None) if kind == "text" else (template.date, _invented_template(tokenizer, progress))
    provenance = Provenance(config, kind, records, date, invented, adds_bos(tokenizer))
    if kind == "text":
        return _text_blocks(records, config, tokenizer, provenance)
    if config.join != "documents":
        raise ValueError(
            f"data.join={config.join}, but {config.label} holds records of kind {kind}: only text is joined"
        )
    encoder = (instruction_encoder if kind == "instruction" else chat_encoder)(config, tokenizer, template)
    tokens = datasets.List(datasets.Value("int32"))
    number = datasets.Value("int32")
    features = {"input_ids": tokens, "labels": tokens, "skipped": number, "lost_turns": number}
    return Conversations(_tokenize(records, encoder, features, provenance, tokenizer), provenance)


def _invented_template(tokenizer: PreTrainedTokenizerBase, progress: bool) -> str | None:
    """Return the plain layout, and announce it on rank 0, if the tokenizer has no chat template."""
    if tokenizer.chat_template is not None:
        return None
    source = plain_template(tokenizer)
    if progress:
        _announce(str(tokenizer.name_or_path), source)
    return source


@functools.cache
def _announce(name: str, source: str) -> None:
    """Log once that a tokenizer's conversations get a layout of ours."""
    log.warning(
        '%s has no chat template: conversations get a plain layout of ours, "User: ..." and "Assistant: ..." in lines '
        "(docs/data.md), and a model trained on them is exported with it; a model that was tuned to chat needs its own "
        "(chat_template.jinja): %s",
        name,
        source,
    )


def _text_blocks(
    records: Any, config: DataConfig, tokenizer: PreTrainedTokenizerBase, provenance: Provenance
) -> PackedBlocks:
    """Tokenize text, as documents or as one text, and cut it into blocks; warn of what looks like a mistake."""
    features = {"input_ids": datasets.List(datasets.Value("int32"))}
    if config.join != "documents":

        def one_row() -> Iterator[dict[str, list[int]]]:
            yield {"input_ids": encode_joined(records, config, tokenizer)}

        name = _fingerprint(records, provenance, tokenizer)
        return PackedBlocks(generate_cached(one_row, features, name, "as one text", config), provenance)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no eos token, which must end each document: set eos_token in its tokenizer_config.json"
        )
    blocks = PackedBlocks(
        _tokenize(records, text_encoder(config, tokenizer), features, provenance, tokenizer), provenance
    )
    left_out = len(records) - blocks.num_documents
    if left_out:
        log.warning(
            "%s: %d of %d records are left out: they have no text in %r",
            *(config.label, left_out, len(records), config.text_field),
        )
    borders = (1 + provenance.adds_bos) * blocks.num_documents / blocks.num_tokens
    if borders > _MANY_BORDERS:
        log.warning(
            "%s: %.0f %% of the tokens are bos and eos, around %d short records. If these are the lines of one text, "
            "as WikiText on the hub, give --data.join blank_line (or newline)",
            config.label,
            100 * borders,
            blocks.num_documents,
        )
    return blocks


def _tokenize(records: Any, encoder: Any, features: dict[str, Any], provenance: Provenance, tokenizer: Any) -> Any:
    return records.map(
        encoder,
        batched=True,
        batch_size=200,
        with_indices=True,
        num_proc=provenance.config.num_proc if provenance.config.num_proc > 1 else None,
        remove_columns=records.column_names,
        features=datasets.Features(features),
        # Without a name of ours, datasets would hash the tokenizer object, which changes as it is used.
        new_fingerprint=_fingerprint(records, provenance, tokenizer),
        desc=f"Tokenising {Path(provenance.config.label).name}",
    )


def _fingerprint(records: Any, provenance: Provenance, tokenizer: PreTrainedTokenizerBase) -> str:
    """Key of the tokenized data in the cache: equal on every rank and in every run, new if any input changes."""
    config, kind = provenance.config, provenance.kind
    digest = hashlib.sha256(f"{_ENCODING} {transformers.__version__} {records._fingerprint} {kind}".encode())
    fields = (config.text_field, config.prompt_field, config.input_field, config.answer_field, config.messages_field)
    settings = config.join if kind == "text" else (config.seq_len, config.tools_field, provenance.date)
    digest.update(repr((fields, settings)).encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]
