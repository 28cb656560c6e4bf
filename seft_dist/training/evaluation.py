"""How well a model predicts a text, and how many of its weights are 0."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import nn
from tqdm import tqdm

from seft_dist.config import EvaluateConfig, ModelConfig
from seft_dist.io.data import (
    IGNORE,
    Sample,
    check_vocabulary,
    collate,
    count_loss_tokens,
    load_sequences,
    load_tokenizer,
)
from seft_dist.io.models import load_model, open_source
from seft_dist.optim.targets import find_targets
from seft_dist.sparsity.zeros import ZeroCount, count_zeros, total_sparsity


@dataclass(frozen=True)
class PerplexityResult:
    """A model's fit to a text."""

    perplexity: float
    """exp(loss)."""
    loss: float
    """Mean negative log-likelihood of a scored token, in nats."""
    num_tokens: int
    """Scored tokens: those with a label, but not the first of a sequence."""


@dataclass(frozen=True)
class Evaluation:
    """One model's results."""

    name: str
    path: str
    result: PerplexityResult
    zeros: list[ZeroCount]


@torch.no_grad()
def perplexity(
    model: nn.Module, sequences: Sequence[Sample], batch_size: int = 4, *, progress: Callable[[], Any] | None = None
) -> PerplexityResult:
    """Measure perplexity, every token weighing the same. Local, or **collective** if the weights are sharded.

    Args:
        model: A causal LM; its training mode is restored afterwards.
        sequences: ``(input_ids, labels)`` pairs, 1-D int64; labels of -100 are not scored.
        batch_size: Sequences in one forward pass.
        progress: Called after each pass.

    Returns:
        The result over all sequences.

    Raises:
        ValueError: Nothing to score, or the tokens are not the model's.
        FloatingPointError: The loss is not finite.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, scored = 0.0, 0
    try:
        for start in range(0, len(sequences), batch_size):
            stop = min(start + batch_size, len(sequences))
            batch = collate([sequences[index] for index in range(start, stop)], pad=0)
            check_vocabulary(batch, model)
            scored += count_loss_tokens(batch)
            labels = batch.pop("labels").to(device)
            logits = model(**{name: value.to(device) for name, value in batch.items()}, use_cache=False).logits
            for scores, answer in zip(logits[:, :-1], labels[:, 1:], strict=True):  # fp32 copies one sequence at a time
                total += float(F.cross_entropy(scores.float(), answer, ignore_index=IGNORE, reduction="sum"))
            if progress is not None:
                progress()
    finally:
        model.train(was_training)
    if scored == 0:
        raise ValueError(
            f"none of {len(sequences)} sequences has a token to score: needs labels beyond each first token"
        )
    loss = total / scored
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}: the model's weights or activations are not finite")
    return PerplexityResult(math.exp(loss) if loss < 700 else math.inf, loss, scored)


def limit_tokens(sequences: Sequence[Sample], max_tokens: int | None) -> Sequence[Sample]:
    """The first sequences that together have at most ``max_tokens`` tokens; None: all. Local.

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


def evaluate(config: EvaluateConfig, *, show: bool = True) -> list[Evaluation]:
    """Evaluate models one after the other on the same data. Local.

    Args:
        config: Which models and data; ``config.output`` gets the results as JSON.
        show: Show progress bars.

    Returns:
        One evaluation for each model, in the order of the configuration.

    Raises:
        ValueError: A model or the data cannot be used.
    """
    sources = [ModelConfig(path=path, dtype=config.dtype) for path in config.models.values()]
    opened = [open_source(source) for source in sources]  # a wrong name is found before the first model runs
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = []
    for (name, path), settings, source in zip(config.models.items(), sources, opened, strict=True):
        tokenizer = load_tokenizer(settings)
        sequences = limit_tokens(load_sequences(config.data, tokenizer, progress=show), config.max_tokens)
        model = load_model(source, device=device)
        passes = math.ceil(len(sequences) / config.batch_size)
        with tqdm(total=passes, desc=f"Evaluating {name}", disable=not show) as bar:
            result = perplexity(model, sequences, config.batch_size, progress=bar.update)
        results.append(Evaluation(name, path, result, count_zeros(find_targets(model, config.targets))))
        del model  # before the next one is loaded
    if config.output is not None:
        write_json(results, config, Path(config.output).expanduser())
    return results


def write_json(results: list[Evaluation], config: EvaluateConfig, path: Path) -> None:
    """Write evaluations as JSON; the file appears complete. Local."""
    models = {
        entry.name: {
            "path": entry.path,
            **dataclasses.asdict(entry.result),
            "sparsity": total_sparsity(entry.zeros),
            "layers": {c.name: {"weights": c.numel, "zeros": c.zeros, "share": c.sparsity} for c in entry.zeros},
        }
        for entry in results
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps({"data": dataclasses.asdict(config.data), "models": models}, indent=2) + "\n")
    part.replace(path)


def result_table(results: list[Evaluation]) -> Table:
    """Perplexity and sparsity, one row a model. Local."""
    table = Table(title="Perplexity")
    for column in ("model", "perplexity", "loss", "tokens scored", "zeros"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for entry in results:
        fit = entry.result
        share = f"{100 * total_sparsity(entry.zeros):.2f} %"
        table.add_row(entry.name, f"{fit.perplexity:.3f}", f"{fit.loss:.4f}", f"{fit.num_tokens:,}", share)
    if len({entry.result.num_tokens for entry in results}) > 1:
        table.caption = "Different tokenizers: these perplexities cannot be compared."
    return table
