"""Perplexity of a causal model: each token scored once and all weighing the same, on one rank or many."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from seft_dist.backends.group import Group
from seft_dist.config import EvaluateConfig
from seft_dist.data.batches import check_vocabulary, collate
from seft_dist.data.sequences import IGNORE, PackedBlocks, Sample

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PerplexityResult:
    """A model's fit to a text."""

    perplexity: float
    """exp(loss)."""
    loss: float
    """Mean negative log-likelihood of a scored token, in nats."""
    num_tokens: int
    """Scored tokens: those with a label, but not the first of a sequence."""


class SlidingWindows(Sequence[Sample]):
    """One stream of tokens as overlapping windows; labels are -100 where an earlier window has scored the token.

    Window i begins at token i x stride and has ``window`` tokens, the last one what is left. Every token but the stream's
    first is scored exactly once.
    """

    def __init__(self, stream: Tensor, window: int, stride: int) -> None:
        """Args:
        stream: All tokens, [n], n at least 2.
        window: Tokens in a window, what the model sees at once.
        stride: Tokens between the beginnings of two windows, 1 to window - 1.
        """
        assert 1 <= stride < window
        assert len(stream) >= 2
        self._stream, self._window, self._stride = stream, window, stride

    def __len__(self) -> int:
        return 1 + max(0, -(-(len(self._stream) - self._window) // self._stride))

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        begin = index * self._stride
        ids = self._stream[begin : begin + self._window].long()
        labels = ids.clone()
        if index > 0:
            labels[: self._window - self._stride] = IGNORE
        return ids, labels


def limit_tokens(sequences: Sequence[Sample], max_tokens: int | None) -> Sequence[Sample]:
    """The first sequences that together have at most ``max_tokens`` tokens; None: all.

    Raises:
        ValueError: The first sequence alone has more.
    """
    if max_tokens is None:
        return sequences
    kept: list[Sample] = []
    for index in range(len(sequences)):
        max_tokens -= len(sequences[index][0])
        if max_tokens < 0:
            break
        kept.append(sequences[index])
    if not kept:
        length = len(sequences[0][0])
        raise ValueError(
            f"the first sequence has {length} tokens, more than max_tokens: raise it, or lower data.seq_len"
        )
    return kept


def scored_sequences(sequences: Any, config: EvaluateConfig) -> Sequence[Sample]:
    """What perplexity is measured on: sliding windows over a text if there is a stride, else the sequences.

    Args:
        sequences: From ``load_sequences``.
        config: Its stride and max_tokens.

    Raises:
        ValueError: A stride for records that are no text, or max_tokens below one sequence.
    """
    if config.stride is None:
        return limit_tokens(sequences, config.max_tokens)
    assert config.data is not None
    if not isinstance(sequences, PackedBlocks):
        raise ValueError(
            f"stride={config.stride}, but {config.data.path} holds instructions or chats, where each record is a "
            "sequence of its own: leave the stride out, or choose data.kind text"
        )
    # one block more than there are: what is left behind the last full block counts too
    _, *parts = sequences.contents(0, len(sequences) + 1)
    stream = torch.from_numpy(np.concatenate(parts)[: config.max_tokens])
    return SlidingWindows(stream, config.data.seq_len, config.stride)


def plan_passes(lengths: Sequence[int], batch_size: int, *, pad: bool) -> list[list[int]]:
    """Share sequences out to forward passes, the longest first (memory runs out at once or never).

    Args:
        lengths: Tokens of each sequence.
        batch_size: Most sequences in a pass.
        pad: Whether sequences of different lengths may share a pass.

    Returns:
        Numbers of the sequences of each pass; each sequence once.
    """
    passes: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        last = passes[-1] if passes else []
        if last and len(last) < batch_size and (pad or lengths[last[0]] == lengths[index]):
            last.append(index)
        else:
            passes.append([index])
    return passes


@torch.no_grad()
def perplexity(
    model: nn.Module,
    sequences: Sequence[Sample],
    batch_size: int = 4,
    *,
    group: Group | None = None,
    progress: str | None = None,
) -> PerplexityResult:
    """Measure perplexity, every token weighing the same. Collective over ``group``.

    The passes are planned for all ranks together and dealt out, and their sums (fp64) added exactly: the number of ranks
    decides about nothing but time. Windows and blocks of a text are never padded.

    Args:
        model: A causal LM, whole or sharded over ``group``; its training mode is restored afterwards.
        sequences: ``(input_ids, labels)`` pairs, 1-D int64; labels of -100 are not scored. The same on every rank.
        batch_size: Sequences of a rank in one forward pass.
        group: Ranks that share the work. None: this process alone.
        progress: Label of a progress bar. None: no bar.

    Returns:
        The result over all sequences, the same on every rank.

    Raises:
        ValueError: Nothing to score, or the tokens are not the model's.
        FloatingPointError: The loss is not finite.
    """
    group = group or Group(None)
    lengths, scored = _survey(model, sequences)
    passes = plan_passes(lengths, batch_size, pad=not isinstance(sequences, (SlidingWindows, PackedBlocks)))
    own = passes[group.rank :: group.size]
    # a rank without a pass of its own in the last round repeats one: sharded weights are gathered by all ranks together
    rounds = own + [passes[0]] * (-(-len(passes) // group.size) - len(own))
    sums = torch.zeros(len(rounds), dtype=torch.float64)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = sum(lengths[index] for chosen in own for index in chosen)
    try:
        with tqdm(total=total, desc=progress, disable=progress is None, unit=" tokens", unit_scale=True) as bar:
            for number, chosen in enumerate(rounds):
                sums[number] = _pass(model, [sequences[index] for index in chosen], device)
                bar.update(sum(lengths[index] for index in chosen) if number < len(own) else 0)
    finally:
        model.train(was_training)
    loss = math.fsum(group.stack(sums).T.flatten()[: len(passes)].tolist()) / scored
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}: the model's weights or activations are not finite")
    return PerplexityResult(math.exp(loss) if loss < 700 else math.inf, loss, scored)


def _survey(model: Any, sequences: Sequence[Sample]) -> tuple[list[int], int]:
    """Lengths, and tokens that will be scored; refuses before the first pass, on every rank alike."""
    lengths, scored = [], 0
    for index in range(len(sequences)):
        ids, labels = sequences[index]
        check_vocabulary({"input_ids": ids}, model)
        lengths.append(len(ids))
        scored += int((labels[1:] != IGNORE).sum())
    if scored == 0:
        raise ValueError(
            f"none of {len(sequences)} sequences has a token to score: needs labels beyond each first token"
        )
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and max(lengths) > most:
        log.warning("sequences of %d tokens, but the model was made for %d: lower data.seq_len", max(lengths), most)
    return lengths, scored


def _pass(model: nn.Module, samples: list[Sample], device: torch.device) -> float:
    """Sum of the negative log-likelihoods of one forward pass, in fp64."""
    batch = collate(samples, pad=0)
    labels = batch.pop("labels").to(device)
    logits = model(**{name: value.to(device) for name, value in batch.items()}, use_cache=False).logits
    total = torch.zeros((), dtype=torch.float64, device=device)
    for scores, answer in zip(logits[:, :-1], labels[:, 1:], strict=True):  # fp32 copies one sequence at a time
        total += F.cross_entropy(scores.float(), answer, ignore_index=IGNORE, reduction="none").double().sum()
    return float(total)
