"""A dense model folder in, a pruned model folder out."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from seft_dist.config import PruneConfig
from seft_dist.io.data import load_sequences, load_tokenizer
from seft_dist.io.export import export_model
from seft_dist.io.models import Source, load_model, locate, open_source
from seft_dist.optim.targets import find_targets
from seft_dist.pruning.calibrate import find_layers, layer_by_layer, sample_sequences
from seft_dist.pruning.magnitude import magnitude_scores, num_pruned, prune_weight
from seft_dist.pruning.wanda import InputNorm, wanda_scores
from seft_dist.sparsity.zeros import ZeroCount, count_zeros, total_sparsity

log = logging.getLogger(__name__)

# A dense model has a few zeros by chance; more than this share was pruned on purpose.
_DENSE = 0.05


def prune_folder(config: PruneConfig, *, progress: bool = True) -> list[ZeroCount]:
    """Prune a model and write it, its tokenizer and ``pruning.json`` to ``config.output``. Local.

    The folder appears complete or not at all.

    Args:
        config: What to prune, and how.
        progress: Show progress bars.

    Returns:
        Zeros of each target.

    Raises:
        ValueError: No such model or data, output exists, model pruned already or not finite, too little text, targets
            that cannot be pruned.
    """
    output = Path(config.output).expanduser()
    if output.exists():
        raise ValueError(f"output={output} exists already: choose another folder, or remove it")
    source = open_source(config.model)
    model = load_model(source).eval()
    targets = find_targets(model, config.targets)
    _check_dense(targets, source)
    tokens = 0
    if config.method == "wanda":
        tokens = _prune_by_activation(model, targets, config, progress)
    else:
        for linear in tqdm(targets.values(), desc="Pruning weights", disable=not progress):
            prune_weight(linear.weight, magnitude_scores(linear.weight), config.sparsity, config.group)
    counts = count_zeros(targets)
    _warn_off_target(counts, targets, config)
    _write(model, source, config, counts, tokens, output)
    return counts


def _check_dense(targets: dict[str, nn.Linear], source: Source) -> None:
    for name, linear in targets.items():
        if not linear.weight.isfinite().all():
            raise ValueError(f"{source.folder}: {name}.weight has values that are not finite; needs a sound checkpoint")
    share = total_sparsity(count_zeros(targets))
    if share > _DENSE:
        raise ValueError(
            f"{source.folder}: {100 * share:.1f} % of the target weights are 0, it was pruned already: needs the "
            "dense model"
        )


def _prune_by_activation(
    model: PreTrainedModel, targets: dict[str, nn.Linear], config: PruneConfig, progress: bool
) -> int:
    """Prune by scores that look at the inputs of each linear; returns the calibration tokens read."""
    prefix, _ = find_layers(model)
    outside = [name for name in targets if not name.startswith(f"{prefix}.")]
    if outside:
        raise ValueError(
            f"target {outside[0]} is outside the decoder layers ({prefix}): choose other --targets, or "
            "--method magnitude"
        )
    assert config.data is not None
    tokenizer = load_tokenizer(config.model)
    data = load_sequences(config.data, tokenizer, progress=progress)
    sequences = sample_sequences(data, config.sequences, config.seed)

    def visit(layer_name: str, layer: nn.Module, run: Callable[[], None]) -> None:
        linears = {name: linear for name, linear in targets.items() if name.startswith(f"{layer_name}.")}
        if not linears:
            return
        norms = {name: InputNorm(linear) for name, linear in linears.items()}
        run()
        for name, linear in linears.items():
            scores = wanda_scores(linear.weight, norms[name].close(name))
            prune_weight(linear.weight, scores, config.sparsity, config.group)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layer_by_layer(model, sequences, visit, device, progress)
    return sum(len(sequence) for sequence in sequences)


def _warn_off_target(counts: list[ZeroCount], targets: dict[str, nn.Linear], config: PruneConfig) -> None:
    """Some dense models have rows that are 0 as a whole: those stay, and the count is above what was asked for."""
    for count in counts:
        rows, columns = targets[count.name].weight.shape
        by_row = num_pruned(config.sparsity, columns) * rows
        wanted = by_row if config.group == "row" else num_pruned(config.sparsity, rows * columns)
        assert count.zeros >= wanted
        if count.zeros > wanted:
            log.warning(
                "%s has %d zeros, %d asked for: the dense weight had more in places", count.name, count.zeros, wanted
            )


def _write(
    model: PreTrainedModel, source: Source, config: PruneConfig, counts: list[ZeroCount], tokens: int, output: Path
) -> None:
    tokenizer = locate(config.model.tokenizer) if config.model.tokenizer else None
    staged = output.with_name(output.name + ".new")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        export_model(model, lambda weight: weight.detach(), staged, source, writes=True, tokenizer=tokenizer)
        (staged / "pruning.json").write_text(json.dumps(_record(config, counts, tokens), indent=2) + "\n")
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    staged.rename(output)


def _record(config: PruneConfig, counts: list[ZeroCount], tokens: int) -> dict[str, Any]:
    settings = dataclasses.asdict(config)
    del settings["output"]
    return {
        **settings,
        "calibration_tokens": tokens,
        "reached": total_sparsity(counts),
        "targets_pruned": {
            count.name: {"weights": count.numel, "zeros": count.zeros, "share": count.sparsity} for count in counts
        },
    }
