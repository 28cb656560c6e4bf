"""Evaluation of several models side by side: perplexity, tasks of lm-evaluation-harness, and the number of zeros.

A single process holds each model whole. Several ranks (torchrun, srun, ...) hold each model in FSDP2 shards and divide
the work; their results are those of a single process.
"""

import dataclasses
import gc
import json
import logging
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from seft_dist.backends.fsdp import FsdpBackend, reshard
from seft_dist.backends.group import world_group
from seft_dist.backends.zeros import count_zeros_over_ranks
from seft_dist.config import EvaluateConfig, ModelConfig
from seft_dist.data.load import load_source
from seft_dist.data.tokenizer import load_tokenizer
from seft_dist.evaluation.perplexity import PerplexityResult, perplexity, scored_sequences
from seft_dist.evaluation.policy import Policy, describe_policy, policy_of
from seft_dist.files import writing
from seft_dist.io.library_types import PreTrainedModel
from seft_dist.io.models import load_model
from seft_dist.io.source import Source, open_source
from seft_dist.modules.targets import find_targets
from seft_dist.results.run_files import list_differences
from seft_dist.session import facts
from seft_dist.session.agreement import check_agreement, on_all_ranks, one_rank_per_machine_first
from seft_dist.session.cli import to_dict
from seft_dist.session.distributed import Ranks
from seft_dist.session.extras import require
from seft_dist.sparsity.zeros import ZeroCount, count_zeros, total_sparsity

log = logging.getLogger(__name__)

Metrics = dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """The results of one model."""

    name: str
    """Name of the model in the configuration."""
    path: str
    """Folder or hub name of the model."""
    zeros: list[ZeroCount]
    """Zeros of each target."""
    result: PerplexityResult | None = None
    """Perplexity; None if no data was given."""
    policy: Policy | None = None
    """Conditions under which the perplexity was measured; None if no data was given."""
    tasks: dict[str, Metrics] = field(default_factory=dict)
    """Metrics of each task of lm_eval."""
    seconds: float = 0.0
    """Duration of the evaluation, including the loading of the model."""


def evaluate(config: EvaluateConfig, *, ranks: Ranks | None = None, show: bool = True) -> list[Evaluation]:
    """Evaluate models one after the other on the same data. Collective over the ranks.

    A model whose loss is not finite has an infinite perplexity, and the others are evaluated all the same.

    Args:
        config: The models, data and tasks. Rank 0 writes the results to ``config.output`` as JSON.
        ranks: The ranks, from ``distributed.start``. None: this process alone.
        show: Show progress bars (rank 0).

    Returns:
        One evaluation for each model, in the order of the configuration; the same on every rank.

    Raises:
        ValueError: A model, the data or a task cannot be used.
    """
    ranks = ranks or Ranks(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    check_agreement(ranks, json.dumps(to_dict(config)))
    on_all_ranks(ranks, lambda: _check_output(config) if ranks.is_main else None)  # the rank that writes it
    sources = on_all_ranks(ranks, lambda: _open_all(config))
    tasks = one_rank_per_machine_first(
        ranks, lambda: _tasks(config, show and ranks.is_main)
    )  # a wrong name is found before the first model runs
    results = []
    for (name, path), source in zip(config.models.items(), sources, strict=True):
        results.append(_evaluate_one(name, path, source, tasks, config, ranks, show and ranks.is_main))
        gc.collect()  # frees a sharded model, whose modules and hooks refer to each other
    if config.output is not None and ranks.is_main:
        write_evaluations(results, config, Path(config.output).expanduser(), ranks)
    return results


def _evaluate_one(
    name: str, path: str, source: Source, tasks: Any, config: EvaluateConfig, ranks: Ranks, show: bool
) -> Evaluation:
    """Load one model, measure its perplexity, tasks and zeros as configured, and free it. Collective."""
    begin = time.monotonic()
    group = world_group()
    tokenizer = on_all_ranks(ranks, lambda: load_tokenizer(ModelConfig(path=path)))
    data = config.data
    sequences: Any = None
    policy: Policy | None = None
    if data is not None:
        loaded = one_rank_per_machine_first(ranks, lambda: load_source(data, tokenizer, progress=show))
        policy = on_all_ranks(
            ranks, lambda: policy_of(loaded, tokenizer, config, str(source.dtype).removeprefix("torch."))
        )
        sequences = on_all_ranks(ranks, lambda: scored_sequences(loaded, data, config.stride, config.max_tokens))
    model = load_model(source, sharding="fsdp" if ranks.world_size > 1 else "none", device=ranks.device)
    zeros = _zeros(model, config.targets, ranks)
    result, metrics = None, {}
    if sequences is not None:
        label = f"Evaluating {name}" if show else None
        result = perplexity(model, sequences, config.batch_size, group=group, progress=label)
        if not math.isfinite(result.loss) and ranks.is_main:
            log.warning("%s has weights or activations that are not finite: its perplexity counts as infinite", name)
        reshard(model)
    if tasks is not None:
        from seft_dist.evaluation.tasks import run_tasks

        metrics = run_tasks(model, tokenizer, tasks, config, group=group, show=show)
    return Evaluation(name, path, zeros, result, policy, metrics, time.monotonic() - begin)


def _open_all(config: EvaluateConfig) -> list[Source]:
    return [_open(name, path, config) for name, path in config.models.items()]


def _check_output(config: EvaluateConfig) -> None:
    """Refuse a file that cannot be written, before anything is computed for it."""
    if config.output is None:
        return
    output = Path(config.output).expanduser()
    if output.is_dir():
        raise ValueError(f"output={output} is a folder: needs a JSON file to write")
    there = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not os.access(there, os.W_OK) or (there != output and not there.is_dir()):
        raise ValueError(f"output={output} cannot be written ({there}): needs a path in a folder of your own")


def _open(name: str, path: str, config: EvaluateConfig) -> Source:
    folder = Path(path).expanduser()
    if folder.is_dir() and not (folder / "config.json").exists():
        if (folder / "model" / "config.json").is_file():
            raise ValueError(
                f"models.{name}={path} is the folder of a run: needs its exported model, {folder / 'model'}"
            )
        if (folder / "checkpoints").is_dir():
            raise ValueError(
                f"models.{name}={path} is the folder of a run without an exported model: write it with "
                "seft export, then give its folder"
            )
    return open_source(ModelConfig(path=path, dtype=config.dtype), option="--dtype", path_option=f"models.{name}")


def _tasks(config: EvaluateConfig, show: bool) -> Any:
    if config.tasks is None:
        return None
    require("lm_eval", f"tasks={config.tasks}")
    from seft_dist.evaluation.tasks import load_tasks

    return load_tasks(config, show=show)


def _zeros(model: PreTrainedModel, pattern: str, ranks: Ranks) -> list[ZeroCount]:
    """Count the zeros of each target over all ranks. Collective if the model is sharded."""
    targets = find_targets(model, pattern)
    if ranks.world_size == 1:
        return count_zeros((name, target.weight) for name, target in targets.items())
    return count_zeros_over_ranks(FsdpBackend(model, targets))


def write_evaluations(results: list[Evaluation], config: EvaluateConfig, path: Path, ranks: Ranks) -> None:
    """Write evaluations as JSON; the file is either complete or absent.

    Args:
        results: The evaluations, from ``evaluate``.
        config: The configuration of the evaluation.
        path: The file; missing folders are created.
        ranks: The ranks that took part.
    """
    models = {}
    for entry in results:
        fit: dict[str, Any] = {}
        if entry.result is not None and config.data is not None:
            fit = dataclasses.asdict(entry.result) | {"window": config.data.seq_len, "stride": config.stride}
        if entry.policy is not None:
            fit["policy"] = dataclasses.asdict(entry.policy)
        models[entry.name] = {
            "path": entry.path,
            **fit,
            "tasks": entry.tasks,
            "sparsity": total_sparsity(entry.zeros),
            "seconds": round(entry.seconds, 3),
            "layers": {c.name: {"weights": c.numel, "zeros": c.zeros, "share": c.sparsity} for c in entry.zeros},
        }
    settings = to_dict(config)
    whole = {"data": settings.pop("data"), "models": models, "settings": settings}
    whole |= {"world_size": ranks.world_size, "threads": torch.get_num_threads(), "versions": _versions(config)}
    path.parent.mkdir(parents=True, exist_ok=True)
    writing.write_json(path, whole)


def _versions(config: EvaluateConfig) -> dict[str, str | None]:
    from importlib import metadata

    return facts.versions() | ({"lm_eval": metadata.version("lm_eval")} if config.tasks else {})


def result_table(results: list[Evaluation]) -> Table:
    """Tabulate perplexity and zeros, one row for each model, with a warning if the perplexities are not comparable."""
    table = Table(title="Perplexity")
    for column in ("model", "perplexity", "loss", "tokens scored", "zeros"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for entry in results:
        share = f"{100 * total_sparsity(entry.zeros):.2f} %"
        fit = entry.result
        row = ("-", "-", "-") if fit is None else (f"{fit.perplexity:.3f}", f"{fit.loss:.4f}", f"{fit.num_tokens:,}")
        table.add_row(entry.name, *row, share)
    policies = [entry.policy for entry in results if entry.policy is not None]
    if policies:
        table.caption = describe_policy(policies[0])
        conditions = {entry.name: dataclasses.asdict(entry.policy) for entry in results if entry.policy is not None}
        for entries in conditions.values():
            del entries["data"]  # the same text may lie in two places
        first = next(iter(conditions.values()))
        if any(entries | {"dtype": ""} != first | {"dtype": ""} for entries in conditions.values()):
            table.caption = f"These perplexities cannot be compared: {', '.join(list_differences(conditions))}."
        elif len({policy.dtype for policy in policies}) > 1:
            table.caption += "; the models are held in different types"
    return table


def task_table(results: list[Evaluation]) -> Table:
    """Tabulate the metrics of tasks with their standard errors, one row for each metric, one column for each model."""
    table = Table(title="Tasks")
    for column in ("task", "questions", "metric"):
        table.add_column(column, justify="right" if column == "questions" else "left")
    for entry in results:
        table.add_column(entry.name, justify="right")
    rows = {
        (task, metric): None
        for entry in results
        for task, metrics in entry.tasks.items()
        for metric in metrics
        if metric != "samples" and "_stderr" not in metric
    }
    for task, metric in rows:
        by_model = [entry.tasks.get(task, {}) for entry in results]
        questions = next((str(int(metrics["samples"])) for metrics in by_model if "samples" in metrics), "-")
        table.add_row(task, questions, metric, *(_cell(metrics, metric) for metrics in by_model))
    return table


def _cell(metrics: Metrics, metric: str) -> str:
    if metric not in metrics:
        return "-"
    name, comma, filtered = metric.partition(",")
    error = metrics.get(f"{name}_stderr{comma}{filtered}")
    return f"{metrics[metric]:.4f}" + (f" ± {error:.4f}" if error is not None else "")
