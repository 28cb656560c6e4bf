"""Batches of token sequences for every rank, in an order that does not depend on the number of ranks."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from seft_dist.data.micro_batches import num_micro_batches
from seft_dist.data.order import GROUPED_STEPS, EpochOrder, LengthGrouped, MixedOrder, Order
from seft_dist.data.sequences import IGNORE, Sample
from seft_dist.data.several import MixedSequences

Batch = dict[str, Tensor]


def collate(samples: Sequence[Sample], pad: int) -> Batch:
    """Stack sequences into one batch, padded on the right to the longest.

    Args:
        samples: ``(input_ids, labels)`` or, of separate documents, ``(input_ids, labels, position_ids)``, 1-D int64.
        pad: Number of the padding token.

    Returns:
        ``input_ids``, ``labels`` (-100 on padding) and ``attention_mask`` (0 on padding), int64, [samples, longest].
        With separate documents also ``position_ids``, in which padding is a document of its own.
    """
    shape = (len(samples), max(len(sample[0]) for sample in samples))
    batch = {
        "input_ids": torch.full(shape, pad, dtype=torch.int64),
        "labels": torch.full(shape, IGNORE, dtype=torch.int64),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
    }
    if len(samples[0]) > 2:
        batch["position_ids"] = torch.zeros(shape, dtype=torch.int64)
    for row, (ids, labels, *places) in enumerate(samples):
        batch["input_ids"][row, : len(ids)] = ids
        batch["labels"][row, : len(ids)] = labels
        batch["attention_mask"][row, : len(ids)] = 1
        if places:
            batch["position_ids"][row] = torch.cat([places[0], torch.arange(shape[1] - len(ids))])
    return batch


def model_inputs(batch: Batch) -> Batch:
    """Return what a model is called with.

    transformers restricts attention to documents by positions that begin anew, and only where it is given no mask.
    """
    return {key: value for key, value in batch.items() if key != "attention_mask" or "position_ids" not in batch}


def check_vocabulary(batch: Batch, model: Any) -> None:
    """Check that a model has an embedding for every token of a batch and, if they are learned, for every position.

    Args:
        batch: Its ``input_ids`` are checked.
        model: A causal LM of transformers.

    Raises:
        ValueError: An embedding is missing: the tokenizer belongs to another model, or sequences are too long.
    """
    words, length = model.get_input_embeddings(), batch["input_ids"].shape[-1]
    largest, size = int(batch["input_ids"].max()), int(words.num_embeddings)
    if largest >= size:
        raise ValueError(
            f"the tokenizer gives token number {largest}, but the model has {size} embeddings: needs the model's own "
            "tokenizer"
        )
    most = getattr(model.config, "max_position_embeddings", None) or length
    # Rotary models state a maximum too, but have no table for it. OPT's table has two more rows than positions.
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not words]
    if length > most and any(most <= table <= most + 2 for table in tables):
        raise ValueError(f"sequences of {length} tokens, the model has {most} learned positions: lower data.seq_len")


def count_loss_tokens(batch: Batch) -> int:
    """Count the tokens of a batch that enter the loss. The first token of a sequence is never predicted."""
    return int((batch["labels"][:, 1:] != IGNORE).sum())


class BatchStream:
    """The batches of one rank, as a pure function of the optimizer step.

    There is no state to save: a resumed run asks for the step at which it continues.

    The samples of all epochs form one endless sequence: each epoch is a permutation of the data set drawn from (seed,
    epoch), and a batch may end one epoch and begin the next (``seft_dist.data.order`` has other orders). Optimizer step
    t takes the t-th piece of ``global_batch`` samples, whatever the world size. Within it, each rank takes
    ``batch_size`` samples for each micro-batch::

        | micro-batch 0: rank 0 | rank 1 | ... | micro-batch 1: rank 0 | rank 1 | ... |

    The last micro-batch divides the samples that remain. A rank that gets none of them runs a batch in which no label
    is learned, because it has to take part in the collectives of forward and backward.
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
        group_by_length: bool = False,
    ) -> None:
        """Args:
            sequences: The data set.
            batch_size: Largest number of sequences of a rank in one micro-batch.
            global_batch: Sequences of one optimizer step over all ranks. None: batch_size for each rank.
            rank: This rank.
            world_size: Number of ranks.
            seed: Seed of the order.
            pad_id: Number of the padding token.
            group_by_length: Put sequences of similar length together; needs ``TokenSequences``.

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
        self._batch_size = batch_size
        self._num_micro_batches = num_micro_batches(self.global_batch, batch_size, world_size)
        self._rank, self._world_size = rank, world_size
        self._pad = pad_id
        self._sample, self.order = self._make_order(sequences, seed, group_by_length)

    def _make_order(self, sequences: Any, seed: int, group_by_length: bool) -> tuple[Order, str]:
        """Make the order of the samples, and describe it; nothing is said of permutations of one source."""
        order: Order
        if isinstance(sequences, MixedSequences):
            order = MixedOrder(sequences.counts, sequences.weights, seed)
            said = f" mixed {sequences.counts} by {sequences.weights}"
        else:
            order, said = EpochOrder(len(sequences), seed), ""
        if group_by_length:
            order = LengthGrouped(order, sequences.lengths(), self.global_batch, len(sequences), seed)
            said += f" by length in {GROUPED_STEPS} steps"
        return order, said

    @property
    def sequences(self) -> Any:
        """The data set, in the order of its records."""
        return self._sequences

    def indices(self, steps_done: int) -> list[list[int]]:
        """Indices of this rank's samples in the optimizer step after ``steps_done``, a list for each micro-batch."""
        micro_batches, begin, end = [], steps_done * self.global_batch, (steps_done + 1) * self.global_batch
        for _ in range(self._num_micro_batches):
            size = min(self._batch_size * self._world_size, end - begin)
            first, stop = (begin + size * rank // self._world_size for rank in (self._rank, self._rank + 1))
            micro_batches.append([self._sample(position) for position in range(first, stop)])
            begin += size
        return micro_batches

    def step(self, steps_done: int) -> list[Batch]:
        """The micro-batches of the optimizer step after ``steps_done``; every rank gets the same number of them."""
        return [self._batch(micro) for micro in self.indices(steps_done)]

    def _batch(self, samples: list[int]) -> Batch:
        if samples:
            return collate([self._sequences[index] for index in samples], self._pad)
        ids, labels, *places = self._sequences[0]
        return collate([(ids, torch.full_like(labels, IGNORE), *places)], self._pad)

    def batches(self, steps_done: int = 0) -> Iterator[list[Batch]]:
        """Yield the micro-batches of the step after ``steps_done`` and of every later one, without end."""
        while True:
            yield self.step(steps_done)
            steps_done += 1
