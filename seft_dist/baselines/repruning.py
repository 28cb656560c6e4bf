"""Pruning a merged model again, to as many zeros as each row had before.

It is done by Wanda, as seft prune does it: the merged model is written to a folder and read back one decoder
layer at a time, and each layer sees what the pruned layers before it produce. So no rank ever holds more than its own
part and one layer.
"""

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from seft_dist.backends.group import Group
from seft_dist.config import ModelConfig, PruneConfig, TrainConfig
from seft_dist.config.pattern import pattern_sizes
from seft_dist.data.sequences import Sample
from seft_dist.export.export import export_model
from seft_dist.io.source import Source, open_source
from seft_dist.pruning.calibrate import find_layers, sample_sequences
from seft_dist.pruning.methods import Pruner, open_calibration
from seft_dist.pruning.stream import StreamedModel

if TYPE_CHECKING:
    from seft_dist.baselines.baseline import Baseline, FinalizeInputs

MERGED = "merged"
"""Folder of a run with the merged model, while it is pruned again."""


def check_repruning(config: TrainConfig, source: Source, sequences: Sequence[Sample]) -> None:
    """Check before training that the model can be pruned again after it. Takes two forward passes of one sequence.

    Args:
        config: The run.
        source: The pruned model.
        sequences: Training text.

    Raises:
        ValueError: Too little text, targets outside the decoder layers, or a model that is not a chain of layers.
    """
    chosen = _calibration_text(config, sequences)
    stream = StreamedModel(source, torch.device("cpu"))
    prefix, _ = find_layers(stream.model)
    outside = [name for name in stream.find_targets(config.seft.targets) if not name.startswith(f"{prefix}.")]
    if outside:
        raise ValueError(
            f"target {outside[0]} is outside the decoder layers ({prefix}), which is all that lora_merged can prune "
            "again: choose other seft.targets, or method masked_lora"
        )
    open_calibration(stream, chosen[:1], Group(None))


def prune_again(method: "Baseline", inputs: "FinalizeInputs") -> Iterator[tuple[str, Tensor]]:
    """Prune a model whose targets are merged. Collective.

    Args:
        method: Holds the merged weights.
        inputs: The pruned model that the run began with, and training text.

    Yields:
        Name of a target and its whole weight, in the shape in which it is stored, on every rank.
    """
    config, backend = method.config, method.backend
    folder, ranks = inputs.folder / MERGED, backend.owners
    if inputs.is_main:
        shutil.rmtree(folder, ignore_errors=True)  # left by an attempt that was stopped here
    export_model(method.model, backend.full, folder, inputs.source, writes=inputs.is_main, targets=method.target_names)
    ranks.sum(torch.zeros(1))  # no rank reads before the folder is there
    merged = StreamedModel(open_source(ModelConfig(path=str(folder))), inputs.device)
    before = StreamedModel(inputs.source, torch.device("cpu"))
    targets = merged.find_targets(config.seft.targets)
    before.find_targets(config.seft.targets)
    pattern = config.seft.known_pattern
    width = None if pattern is None else pattern_sizes(pattern)[1]

    def zeros(name: str, first: int, last: int) -> Tensor:
        rows = before.read_rows(name, first, last)
        return (rows == 0).view(-1, width or rows.shape[1]).sum(1)

    # The text is chosen here, with its separate documents cut apart; `seft prune` itself does not read such text.
    text = dataclasses.replace(config.data, separate=False)
    pruner = Pruner(
        PruneConfig(model=ModelConfig(path=str(folder)), data=text, pattern=pattern, output="-"),
        merged,
        targets,
        {name: target.matrix_shape for name, target in targets.items()},
        dict.fromkeys(targets, 0.0),
        _calibration_text(config, inputs.sequences),
        None,
        ranks,
        inputs.is_main,
        zeros,
    )
    for name, weight in pruner.pruned():
        yield name, targets[name].from_rows(weight)
    ranks.sum(torch.zeros(1))  # every rank has read it
    if inputs.is_main:
        shutil.rmtree(folder, ignore_errors=True)


def _calibration_text(config: TrainConfig, sequences: Sequence[Sample]) -> list[Tensor]:
    wanted, available = config.baseline.sequences, len(sequences)
    if available < wanted:
        raise ValueError(
            f"baseline.sequences={wanted}, but the training data has {available} sequences: lower it, or use more text"
        )
    return sample_sequences(sequences, wanted, config.baseline.seed)
