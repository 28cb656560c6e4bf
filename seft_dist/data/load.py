"""A data set, from its files to token sequences that lie in a memory-mapped file of the ``datasets`` cache.

Ranks on one machine share the file's pages.
"""

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
from seft_dist.data.chat_template import ChatTemplate
from seft_dist.data.encode import chat_encoder, encode_joined, instruction_encoder, text_encoder
from seft_dist.data.records import generated, read_records, select_records
from seft_dist.data.sequences import Conversations, Origin, PackedBlocks
from seft_dist.data.tokenizer import adds_bos

log = logging.getLogger(__name__)

_ENCODING = 2  # of this code; another number makes old caches of tokens useless
_MUCH = 0.02  # share of a text's tokens that mark the borders of documents


def load_sequences(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, progress: bool = True
) -> PackedBlocks | Conversations:
    """Read a data set and turn it into token sequences; every rank reads the same.

    Kind "text": each document with the tokenizer's own special tokens and one eos behind it, all laid end to end, or (by
    ``join``) one text made of all records; cut into blocks of exactly ``seq_len``; what is left at the end is dropped.
    Kinds "instruction" and "chat": one sequence a record, laid out by the tokenizer's chat template (see
    ``seft_dist.data.chat_template`` if it has none), cut at ``seq_len``, with loss on the answers only; records without an
    answer inside ``seq_len`` are left out and counted.

    Args:
        config: Which records, how they are read.
        tokenizer: From ``load_tokenizer``.
        progress: Show progress bars (rank 0).

    Returns:
        A sequence of ``(input_ids, labels)``, in the order of the records.

    Raises:
        ValueError: No such data, unreadable, no usable columns, or too little of it.
        OSError: A file may not be read.
    """
    (datasets.enable_progress_bars if progress else datasets.disable_progress_bars)()
    records, kind = read_records(config)
    records = select_records(records, config)
    template = ChatTemplate(tokenizer, config.date)
    origin = Origin(config, kind, records, template.date if kind != "text" else None, adds_bos(tokenizer))
    if kind == "text":
        return _text_blocks(records, config, tokenizer, origin)
    if config.join != "documents":
        raise ValueError(
            f"data.join={config.join}, but {config.path} holds records of kind {kind}: only text is joined"
        )
    encoder = (instruction_encoder if kind == "instruction" else chat_encoder)(config, tokenizer, template)
    tokens = datasets.List(datasets.Value("int32"))
    number = datasets.Value("int32")
    features = {"input_ids": tokens, "labels": tokens, "skipped": number, "lost_turns": number}
    return Conversations(_mapped(records, encoder, features, origin, tokenizer), origin)


def _text_blocks(records: Any, config: DataConfig, tokenizer: PreTrainedTokenizerBase, origin: Origin) -> PackedBlocks:
    features = {"input_ids": datasets.List(datasets.Value("int32"))}
    if config.join != "documents":

        def one_row() -> Iterator[dict[str, list[int]]]:
            yield {"input_ids": encode_joined(records, config, tokenizer)}

        name = _fingerprint(records, origin, tokenizer)
        return PackedBlocks(generated(one_row, features, name, "as one text", config), origin)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no eos token, which must end each document: set eos_token in its tokenizer_config.json"
        )
    blocks = PackedBlocks(_mapped(records, text_encoder(config, tokenizer), features, origin, tokenizer), origin)
    borders = (1 + origin.adds_bos) * blocks.num_documents / blocks.num_tokens
    if borders > _MUCH:
        log.warning(
            "%s: %.0f %% of the tokens are bos and eos, around %d short records. If these are the lines of one text, as "
            "WikiText on the hub, give --data.join blank_line (or newline)",
            *(config.path, 100 * borders, blocks.num_documents),
        )
    return blocks


def _mapped(records: Any, encoder: Any, features: dict[str, Any], origin: Origin, tokenizer: Any) -> Any:
    return records.map(
        encoder,
        batched=True,
        batch_size=200,
        with_indices=True,
        remove_columns=records.column_names,
        features=datasets.Features(features),
        # Without a name of ours, datasets would hash the tokenizer object, which changes as it is used.
        new_fingerprint=_fingerprint(records, origin, tokenizer),
        desc=f"Tokenising {Path(origin.config.path).name}",
    )


def _fingerprint(records: Any, origin: Origin, tokenizer: PreTrainedTokenizerBase) -> str:
    """A name for the tokenised data: the same on every rank and in every run, new if anything that matters changes."""
    config, kind = origin.config, origin.kind
    digest = hashlib.sha256(f"{_ENCODING} {transformers.__version__} {records._fingerprint} {kind}".encode())
    fields = (config.text_field, config.prompt_field, config.input_field, config.answer_field, config.messages_field)
    settings = config.join if kind == "text" else (config.seq_len, config.tools_field, origin.date)
    digest.update(repr((fields, settings)).encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]
