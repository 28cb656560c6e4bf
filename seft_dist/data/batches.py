"""Token sequences to the batches of every rank, in an order that does not depend on the number of ranks."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from seft_dist.data.sequences import IGNORE, Sample

Batch = dict[str, Tensor]


def collate(samples: Sequence[Sample], pad: int) -> Batch:
    """Stack sequences, padded on the right to the longest.

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
    """Check that a model has an embedding for every token of a batch, and for its position if those are learned.

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
    """Tokens of a batch that a causal model is scored on: the first of a sequence never is."""
    return int((batch["labels"][:, 1:] != IGNORE).sum())


def num_micro(global_batch: int, batch_size: int, world_size: int) -> int:
    """Forward passes of a rank in one optimizer step.

    Args:
        global_batch: Sequences of the step over all ranks.
        batch_size: Most sequences of a rank in one forward pass.
        world_size: Number of ranks.
    """
    return -(-global_batch // (batch_size * world_size))


class BatchStream:
    """The batches of one rank, a function of the optimizer step: nothing to save, any step can be the first.

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
