"""Records of a data set to token sequences, and token sequences to the batches of every rank.

A sequence is a pair of 1-D int64 tensors of one length: ``input_ids`` and ``labels``, where -100 means "no loss here".
Tokenised data stays in a memory-mapped Arrow file of the ``datasets`` cache; ranks on one machine share its pages.
"""

import hashlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from seft_dist.config import DataConfig, ModelConfig
from seft_dist.io.chat import encode_chat, instruction_messages, record_messages
from seft_dist.io.models import locate
from seft_dist.io.records import read_records, reason, record_kind, select_records

log = logging.getLogger(__name__)

IGNORE = -100

Sample = tuple[Tensor, Tensor]
Batch = dict[str, Tensor]


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model: fast ones and slow sentencepiece ones. Local.

    Raises:
        ValueError: There is none in the folder, or it would need code of its own.
    """
    folder = locate(config.tokenizer or config.path)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:  # what transformers raises depends on the files
        raise ValueError(
            f"{folder} holds no tokenizer that transformers can read ({reason(error)}): needs tokenizer.json or "
            "tokenizer.model beside tokenizer_config.json, or --model.tokenizer with a folder that has them"
        ) from error


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills up short sequences. Local.

    Any token will do, it is masked out; eos comes first because a pad token is often one that was added behind the
    vocabulary, for which the model has no embedding.

    Raises:
        ValueError: The tokenizer has neither an eos, a pad nor an unk token.
    """
    for token in (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id):
        if token is not None:
            return int(token)
    raise ValueError("the tokenizer has no eos, pad or unk token: set eos_token in its tokenizer_config.json")


def load_sequences(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, progress: bool = True
) -> "PackedBlocks | Conversations":
    """Read a data set and turn it into token sequences. Local; every rank reads the same.

    Kind "text": each document with the tokenizer's own special tokens and one eos behind it, all laid end to end and
    cut into blocks of exactly ``seq_len``; what is left at the end is dropped. Kinds "instruction" and "chat": one
    sequence a record, laid out by the tokenizer's chat template (see ``seft_dist.io.chat`` if it has none), cut at
    ``seq_len``, with loss on the answers only; records without an answer inside ``seq_len`` are left out.

    Args:
        config: Which records, how they are read.
        tokenizer: From ``load_tokenizer``.
        progress: Show progress bars (rank 0).

    Returns:
        A sequence of ``(input_ids, labels)``, in the order of the records.

    Raises:
        ValueError: No such data, unreadable, no usable columns, or too little of it.
    """
    (datasets.enable_progress_bars if progress else datasets.disable_progress_bars)()
    records = select_records(read_records(config), config)
    kind = record_kind(records.column_names, config)
    if kind == "text" and tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no eos token, which must end each document: set eos_token in its tokenizer_config.json"
        )
    columns = ["input_ids"] if kind == "text" else ["input_ids", "labels"]
    encoder = {"text": _text_encoder, "instruction": _instruction_encoder, "chat": _chat_encoder}[kind](
        config, tokenizer
    )
    encoded = records.map(
        encoder,
        batched=True,
        batch_size=200,
        with_indices=True,
        remove_columns=records.column_names,
        features=datasets.Features({name: datasets.List(datasets.Value("int32")) for name in columns}),
        # Without a name of ours, datasets would hash the tokenizer object, which changes as it is used.
        new_fingerprint=_fingerprint(records, config, kind, tokenizer),
        desc=f"Tokenising {Path(config.path).name}",
    )
    if kind == "text":
        return PackedBlocks(encoded, config)
    return Conversations(encoded, config, len(records))


class PackedBlocks(Sequence[Sample]):
    """Documents end to end, seen as blocks of ``seq_len`` tokens; nothing is copied until a block is read."""

    def __init__(self, encoded: Any, config: DataConfig) -> None:
        chunks = encoded.data.column("input_ids").chunks if len(encoded) else []
        self._chunks = [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in chunks]
        self._starts = np.cumsum([0] + [len(chunk) for chunk in self._chunks])
        self._seq_len = config.seq_len
        self._owner = encoded  # keeps the memory map open
        if len(self) == 0:
            raise ValueError(
                f"{config.path}: {self._starts[-1]} tokens in {len(encoded)} records, less than one block of "
                f"data.seq_len={config.seq_len}: needs more text or a smaller seq_len"
            )

    def __len__(self) -> int:
        return int(self._starts[-1]) // self._seq_len

    def __getitem__(self, index: Any) -> Any:
        assert 0 <= index < len(self)
        start, stop = index * self._seq_len, (index + 1) * self._seq_len
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts = []
        while start < stop:
            begin = int(self._starts[first])
            part = self._chunks[first][start - begin : stop - begin]
            parts.append(part)
            start, first = start + len(part), first + 1
        ids = torch.from_numpy(np.concatenate(parts).astype(np.int64))
        return ids, ids.clone()

    def contents(self, start: int, stop: int) -> Iterator[Any]:
        """Lengths and tokens of the sequences start <= i < stop, as int32 arrays end to end, for a digest. Local."""
        yield np.full(stop - start, self._seq_len, dtype=np.int32)
        start, stop = start * self._seq_len, stop * self._seq_len
        for begin, chunk in zip(self._starts, self._chunks, strict=False):
            part = chunk[max(0, start - begin) : max(0, stop - begin)]
            if len(part):
                yield part


class Conversations(Sequence[Sample]):
    """One sequence for each record that has an answer."""

    def __init__(self, encoded: Any, config: DataConfig, num_records: int) -> None:
        lost = num_records - len(encoded)
        if len(encoded) == 0:
            raise ValueError(
                f"{config.path}: none of {num_records} records has an answer within data.seq_len={config.seq_len} "
                "tokens: raise seq_len, or check the fields and data.kind"
            )
        if lost:
            log.warning("%s: %d of %d records have no answer within %d tokens and are left out",
                        config.path, lost, num_records, config.seq_len)  # fmt: skip
        self._encoded = encoded.with_format("numpy")

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, index: Any) -> Any:
        assert 0 <= index < len(self)
        row = self._encoded[index]
        return torch.from_numpy(row["input_ids"].astype(np.int64)), torch.from_numpy(row["labels"].astype(np.int64))

    def contents(self, start: int, stop: int) -> Iterator[Any]:
        """Lengths, tokens and labels of the sequences start <= i < stop, as int32 arrays, for a digest. Local."""
        rows = self._encoded.with_format("arrow")[start:stop]
        yield rows["input_ids"].combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
        for name in ("input_ids", "labels"):
            yield rows[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)


def collate(samples: Sequence[Sample], pad: int) -> Batch:
    """Stack sequences, padded on the right to the longest. Local.

    Args:
        samples: ``(input_ids, labels)`` pairs, 1-D int64.
        pad: Token that fills up.

    Returns:
        ``input_ids``, ``labels`` (-100 on padding) and ``attention_mask`` (0 on padding), int64, [samples, longest].
    """
    shape = (len(samples), max(len(ids) for ids, _ in samples))
    batch = {
        "input_ids": torch.full(shape, pad, dtype=torch.int64),
        "labels": torch.full(shape, IGNORE, dtype=torch.int64),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
    }
    for row, (ids, labels) in enumerate(samples):
        batch["input_ids"][row, : len(ids)] = ids
        batch["labels"][row, : len(ids)] = labels
        batch["attention_mask"][row, : len(ids)] = 1
    return batch


def check_vocabulary(batch: Batch, model: Any) -> None:
    """Check that a model has an embedding for every token of a batch, and for its position if those are learned. Local.

    Raises:
        ValueError: It has not; the tokenizer is of another model, or sequences are too long.
    """
    words, length = model.get_input_embeddings(), batch["input_ids"].shape[-1]
    largest, size = int(batch["input_ids"].max()), int(words.num_embeddings)
    if largest >= size:
        raise ValueError(
            f"the tokenizer gives token number {largest}, but the model has {size} embeddings: needs the model's own "
            "tokenizer"
        )
    most = getattr(model.config, "max_position_embeddings", None) or length
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not words]
    if length > most and any(most <= table <= most + 2 for table in tables):
        raise ValueError(f"sequences of {length} tokens, the model has {most} learned positions: lower data.seq_len")


def count_loss_tokens(batch: Batch) -> int:
    """Tokens of a batch that a causal model is scored on: the first of a sequence never is. Local."""
    return int((batch["labels"][:, 1:] != IGNORE).sum())


def num_micro(global_batch: int, batch_size: int, world_size: int) -> int:
    """Forward passes of a rank in one optimizer step. Local.

    Args:
        global_batch: Sequences of the step over all ranks.
        batch_size: Most sequences of a rank in one forward pass.
        world_size: Number of ranks.
    """
    return -(-global_batch // (batch_size * world_size))


class BatchStream:
    """The batches of one rank, a function of the optimizer step: nothing to save, any step can be the first. Local.

    The samples of all epochs form one endless line: each epoch is a permutation of the data set made from (seed,
    epoch), and a batch may end one epoch and begin the next. Optimizer step t takes the t-th piece of ``global_batch``
    samples, whatever the world size; inside it micro-step m of rank r takes ``batch_size`` samples::

        | micro 0: rank 0 | rank 1 | ... | micro 1: rank 0 | rank 1 | ... |

    The last micro-step shares out what is left; a rank for which nothing is left gets a batch without any label to
    learn, so that it still takes part in the collectives of forward and backward.
    """

    def __init__(
        self,
        sequences: Sequence[Sample],
        *,
        batch_size: int,
        global_batch: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        pad_id: int = 0,
    ) -> None:
        """Args:
            sequences: The data set.
            batch_size: Most sequences of a rank in one micro-batch.
            global_batch: Sequences of one optimizer step over all ranks. None: batch_size for each rank.
            rank: This rank.
            world_size: Number of ranks.
            seed: Seed of the order.
            pad_id: Token that fills up short sequences.

        Raises:
            ValueError: The data set is smaller than one global batch.
        """
        self.global_batch = global_batch if global_batch is not None else batch_size * world_size
        self.num_sequences = len(sequences)
        if len(sequences) < self.global_batch:
            raise ValueError(
                f"the data set has {len(sequences)} sequences, one optimizer step needs {self.global_batch}"
                f" (global_batch; by default batch_size {batch_size} x {world_size} ranks): use more data, a smaller "
                "data.seq_len or a smaller batch"
            )
        assert 0 <= rank < world_size
        self._sequences = sequences
        self._batch_size, self._num_micro = batch_size, num_micro(self.global_batch, batch_size, world_size)
        self._rank, self._world_size = rank, world_size
        self._seed, self._pad = seed, pad_id
        self._orders: dict[int, Tensor] = {}

    @property
    def sequences(self) -> Any:
        """The data set, in the order of its records."""
        return self._sequences

    def indices(self, step: int) -> list[list[int]]:
        """Numbers of this rank's samples in optimizer step ``step`` (from 0), for each micro-batch."""
        found, begin, end = [], step * self.global_batch, (step + 1) * self.global_batch
        for _ in range(self._num_micro):
            size = min(self._batch_size * self._world_size, end - begin)
            first, stop = (begin + size * rank // self._world_size for rank in (self._rank, self._rank + 1))
            found.append([self._sample(position) for position in range(first, stop)])
            begin += size
        return found

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of optimizer step ``step`` (from 0), as many on every rank."""
        return [self._batch(micro) for micro in self.indices(step)]

    def _batch(self, samples: list[int]) -> Batch:
        if samples:
            return collate([self._sequences[index] for index in samples], self._pad)
        ids, labels = self._sequences[0]
        return collate([(ids, torch.full_like(labels, IGNORE))], self._pad)

    def batches(self, start_step: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of step ``start_step`` and every later one, without end."""
        while True:
            yield self.step(start_step)
            start_step += 1

    def _sample(self, position: int) -> int:
        epoch, place = divmod(position, len(self._sequences))
        if epoch not in self._orders:
            digest = hashlib.sha256(f"order {self._seed} {epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            self._orders = {kept: order for kept, order in self._orders.items() if abs(kept - epoch) == 1}
            self._orders[epoch] = torch.randperm(len(self._sequences), generator=generator)
        return int(self._orders[epoch][place])


Encoder = Callable[[dict[str, list[Any]], list[int]], dict[str, list[list[int]]]]


def _text_encoder(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    end = int(tokenizer.eos_token_id)

    def encode(records: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[list[int]]]:
        texts = [str(text) for text in records[config.text_field] if text]
        rows = tokenizer(texts, verbose=False)["input_ids"] if texts else []
        return {"input_ids": [row if row and row[-1] == end else [*row, end] for row in rows]}

    return encode


def _instruction_encoder(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    def messages(record: dict[str, Any], where: str) -> list[dict[str, Any]]:
        inner = record.get(config.input_field)
        return instruction_messages(record[config.prompt_field], inner, record[config.answer_field], where)

    return _conversation_encoder(config, tokenizer, messages)


def _chat_encoder(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    return _conversation_encoder(
        config, tokenizer, lambda record, where: record_messages(record[config.messages_field], where)
    )


def _conversation_encoder(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    messages: Callable[[dict[str, Any], str], list[dict[str, Any]]],
) -> Encoder:
    def encode(records: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[list[int]]]:
        rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
        for place, number in enumerate(numbers):
            where = f"{config.path}, record {number}"
            turns = messages({name: column[place] for name, column in records.items()}, where)
            ids, scored = encode_chat(turns, tokenizer, where)
            ids, scored = ids[: config.seq_len], scored[: config.seq_len]
            if any(scored[1:]):
                rows["input_ids"].append(ids)
                rows["labels"].append([token if yes else IGNORE for token, yes in zip(ids, scored, strict=True)])
        return rows

    return encode


def _fingerprint(records: Any, config: DataConfig, kind: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A name for the tokenised data: the same on every rank and in every run, new if anything that matters changes."""
    digest = hashlib.sha256(f"1 {transformers.__version__} {records._fingerprint} {kind}".encode())
    fields = (config.text_field, config.prompt_field, config.input_field, config.answer_field, config.messages_field)
    digest.update(repr((fields, None if kind == "text" else config.seq_len)).encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]
