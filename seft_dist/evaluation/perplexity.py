"""Perplexity of a causal model, on one rank or many; each token is scored once, and all tokens have equal weight."""

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
from seft_dist.config import DataConfig
from seft_dist.data.batches import check_vocabulary, collate, model_inputs
from seft_dist.data.sequences import IGNORE, PackedBlocks, Sample
from seft_dist.io.positions import longest_sequence

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PerplexityResult:
    """The perplexity of a model on a text."""

    perplexity: float
    """exp(loss)."""
    loss: float
    """Mean negative log-likelihood of a scored token, in nats; infinite if weights or activations are not finite."""
    num_tokens: int
    """Number of scored tokens: those with a label, except the first of each sequence."""


class SlidingWindows(Sequence[Sample]):
    """Overlapping windows over one stream of tokens, with labels of -100 where an earlier window has scored the token.

    Window i begins at token i x stride and has ``window`` tokens; the last window may be shorter. Every token of the
    stream except the first is scored exactly once.
    """

    def __init__(self, stream: Tensor, window: int, stride: int) -> None:
        """Args:
        stream: All tokens, [n], n at least 2.
        window: Number of tokens in a window, the context of the model.
        stride: Number of tokens between the beginnings of two windows, 1 to window - 1.
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
    """Return the first sequences that together have at most ``max_tokens`` tokens, or all of them if it is None.

    Raises:
        ValueError: The first sequence alone has more tokens.
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


def scored_sequences(
    sequences: Any, data: DataConfig, stride: int | None = None, max_tokens: int | None = None
) -> Sequence[Sample]:
    """Select the sequences to score: sliding windows over the text if a stride is set, otherwise the sequences.

    Args:
        sequences: The data, from ``load_sequences``.
        data: Its configuration.
        stride: Number of tokens between the beginnings of two windows; None: no windows.
        max_tokens: Largest number of tokens; None: all.

    Raises:
        ValueError: A stride is set for records that are not text, or max_tokens is shorter than one sequence.
    """
    if stride is None:
        return limit_tokens(sequences, max_tokens)
    if not isinstance(sequences, PackedBlocks):
        raise ValueError(
            f"stride={stride}, but {data.label} holds instructions or chats, where each record is a "
            "sequence of its own: leave the stride out, or choose data.kind text"
        )
    # One block more than there are, so that the tokens behind the last full block are included
    _, *parts = sequences.contents(0, len(sequences) + 1)
    stream = torch.from_numpy(np.concatenate(parts)[:max_tokens])
    return SlidingWindows(stream, data.seq_len, stride)


def plan_passes(lengths: Sequence[int], batch_size: int, *, pad: bool) -> list[list[int]]:
    """Divide sequences into forward passes, the longest first, so that memory runs out at the beginning or never.

    Args:
        lengths: Number of tokens of each sequence.
        batch_size: Largest number of sequences in a pass.
        pad: Allow sequences of different lengths in one pass.

    Returns:
        Indices of the sequences of each pass; each sequence occurs once.
    """
    passes: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        last = passes[-1] if passes else []
        if last and len(last) < batch_size and (pad or lengths[last[0]] == lengths[index]):
            last.append(index)
        else:
            passes.append([index])
    return passes


@dataclass(frozen=True)
class ScoringPlan:
    """Sequences to score, checked, and the forward passes that score them; the same on every rank."""

    sequences: Sequence[Sample]
    """``(input_ids, labels)``, and ``position_ids`` of separate documents, 1-D int64; labels of -100 are not scored."""
    lengths: list[int]
    """Number of tokens of each sequence."""
    scored: int
    """Number of tokens with a label that are not the first of their sequence."""
    passes: list[list[int]]
    """Indices of the sequences of each pass."""


def plan_scoring(model: nn.Module, sequences: Sequence[Sample], batch_size: int = 4) -> ScoringPlan:
    """Check sequences, and divide them into forward passes.

    Args:
        model: A causal LM; it may be on the meta device.
        sequences: See ``ScoringPlan``. The same on every rank.
        batch_size: Number of sequences of a rank in one forward pass.

    Raises:
        ValueError: There is no token to score, or a token is outside the model's vocabulary.
    """
    lengths, scored = _check_sequences(model, sequences)
    passes = plan_passes(lengths, batch_size, pad=not isinstance(sequences, (SlidingWindows, PackedBlocks)))
    return ScoringPlan(sequences, lengths, scored, passes)


def perplexity(
    model: nn.Module,
    sequences: Sequence[Sample],
    batch_size: int = 4,
    *,
    group: Group | None = None,
    progress: str | None = None,
) -> PerplexityResult:
    """Measure perplexity, as ``score`` does, on sequences that were not checked yet. Collective over ``group``.

    Args:
        model: A causal LM, whole or sharded over ``group``.
        sequences: See ``ScoringPlan``. The same on every rank.
        batch_size: Number of sequences of a rank in one forward pass.
        group: Ranks that share the work. None: this process alone.
        progress: Label of a progress bar. None: no bar.

    Raises:
        ValueError: There is no token to score, or a token is outside the model's vocabulary.
    """
    plan = plan_scoring(model, sequences, batch_size)
    return score(model, plan, next(model.parameters()).device, group=group, progress=progress)


@torch.no_grad()
def score(
    forward_module: nn.Module,
    plan: ScoringPlan,
    device: torch.device,
    *,
    group: Group | None = None,
    progress: str | None = None,
) -> PerplexityResult:
    """Measure perplexity, with equal weight for every token. Collective over ``group``.

    The passes are planned for all ranks together and then distributed, and their sums in fp64 are added with a
    correctly rounded sum, so the result does not depend on the number of ranks. Windows and blocks of a text are never
    padded.

    Args:
        forward_module: A causal LM, whole or sharded over ``group``, or what wraps it; its training mode is restored
            afterwards.
        plan: What is scored.
        device: Device of its inputs.
        group: Ranks that share the work. None: this process alone.
        progress: Label of a progress bar. None: no bar.

    Returns:
        The result over all sequences, the same on every rank.
    """
    group = group or Group(None)
    passes, lengths = plan.passes, plan.lengths
    own = passes[group.rank :: group.size]
    # A rank without a pass in the last round repeats one, whose result is not used: gathering sharded weights needs all
    rounds = own + [passes[0]] * (-(-len(passes) // group.size) - len(own))
    sums = torch.zeros(len(rounds), dtype=torch.float64)
    was_training = forward_module.training
    forward_module.eval()
    total = sum(lengths[index] for chosen in own for index in chosen)
    try:
        with tqdm(total=total, desc=progress, disable=progress is None, unit=" tokens", unit_scale=True) as bar:
            for number, chosen in enumerate(rounds):
                sums[number] = _pass(forward_module, [plan.sequences[index] for index in chosen], device)
                bar.update(sum(lengths[index] for index in chosen) if number < len(own) else 0)
    finally:
        forward_module.train(was_training)
    sums = group.stack(sums).T.flatten()[: len(passes)]
    loss = math.fsum(sums.tolist()) / plan.scored if bool(sums.isfinite().all()) else math.inf
    return PerplexityResult(math.exp(loss) if loss < 700 else math.inf, loss, plan.scored)


def _check_sequences(model: Any, sequences: Sequence[Sample]) -> tuple[list[int], int]:
    """Check all sequences before the first pass, so that an error is raised on every rank and none waits for another.

    Returns:
        Length of each sequence, and number of tokens that will be scored.
    """
    lengths, scored = [], 0
    for index in range(len(sequences)):
        ids, labels, *_ = sequences[index]
        check_vocabulary({"input_ids": ids}, model)
        lengths.append(len(ids))
        scored += int((labels[1:] != IGNORE).sum())
    if scored == 0:
        raise ValueError(
            f"none of {len(sequences)} sequences has a token to score: needs labels beyond each first token"
        )
    most = longest_sequence(model.config)
    if most is not None and max(lengths) > most:
        log.warning("sequences of %d tokens, but the model was made for %d: lower data.seq_len", max(lengths), most)
    return lengths, scored


def _pass(model: nn.Module, samples: list[Sample], device: torch.device) -> float:
    """Run one forward pass, and sum the negative log-likelihoods of its scored tokens in fp64."""
    batch = collate(samples, pad=0)
    labels = batch.pop("labels").to(device)
    inputs = {name: value.to(device) for name, value in model_inputs(batch).items()}
    logits = model(**inputs, use_cache=False).logits
    total = torch.zeros((), dtype=torch.float64, device=device)
    for scores, answer in zip(logits[:, :-1], labels[:, 1:], strict=True):  # one at a time, to limit the fp32 copy
        total += F.cross_entropy(scores.float(), answer, ignore_index=IGNORE, reduction="none").double().sum()
    return float(total)
