"""Pruning of a dense model folder to a pruned model folder, with the same result on one process or many ranks.

No rank ever holds the whole model: the export requests one weight after the other, and the request for the first weight
of a decoder layer prunes that layer.
"""

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seft_dist.backends.group import Group
from seft_dist.config import PruneConfig
from seft_dist.data.load import load_sequences
from seft_dist.data.tokenizer import load_tokenizer
from seft_dist.export.export import export_model
from seft_dist.export.folders import check_path_is_new
from seft_dist.files.writing import write_json
from seft_dist.io.source import locate, open_source
from seft_dist.modules.kinds import Target
from seft_dist.pruning.calibrate import find_layers, sample_sequences
from seft_dist.pruning.mask_file import MaskFile
from seft_dist.pruning.masks import Ranking
from seft_dist.pruning.methods import Pruner
from seft_dist.pruning.owl import read_sparsities
from seft_dist.pruning.stored_zeros import check_not_pruned, count_stored_zeros, describe_zeros
from seft_dist.pruning.stream import StreamedModel
from seft_dist.sparsity.zeros import ZeroCount, total_sparsity

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PruningPlan:
    """The checked inputs of a pruning run that has not begun."""

    config: PruneConfig
    stream: StreamedModel
    targets: dict[str, Target]
    """Weights to prune, by name."""
    shapes: dict[str, tuple[int, int]]
    """Shape [out, in] of each target's weight as a matrix."""
    sparsities: dict[str, float]
    """Sparsity of each target; those of OWL are not known yet."""
    sequences: list[Tensor]
    """Calibration text; empty if the method needs none."""
    masks: MaskFile | None
    """Masks for method "mask"."""


def prepare(config: PruneConfig, *, device: torch.device | None = None, progress: bool = True) -> PruningPlan:
    """Check everything that can be checked before the work begins.

    Args:
        config: The model, the method and its settings.
        device: Device on which layers compute; None: the CPU.
        progress: Show progress bars.

    Raises:
        ValueError: There is no such model or data, the output exists, there is too little text, or the targets cannot
            be pruned by this method.
    """
    if config.method != "none":
        check_path_is_new(Path(config.output).expanduser(), "output")
    stream = StreamedModel(open_source(config.model), device or torch.device("cpu"))
    targets = stream.find_targets(config.targets)
    shapes = {name: target.matrix_shape for name, target in targets.items()}
    for name, (_, columns) in shapes.items():
        Ranking(config.ranking, config.share).check(name, columns)
    sparsities = dict.fromkeys(shapes, config.share)
    if config.layer_ratios not in ("uniform", "owl"):
        sparsities = read_sparsities(config.layer_ratios, shapes, config.sparsity)
    stored = {name: tuple(target.weight.shape) for name, target in targets.items()}
    masks = MaskFile(config.mask, stored) if config.mask is not None else None
    sequences: list[Tensor] = []
    if config.needs_text:
        prefix, _ = find_layers(stream.model)
        outside = [name for name in targets if not name.startswith(f"{prefix}.")]
        if outside:
            raise ValueError(
                f"target {outside[0]} is outside the decoder layers ({prefix}): choose other --targets, or "
                "--method magnitude without --compensate"
            )
        assert config.data is not None
        data = load_sequences(config.data, load_tokenizer(config.model), progress=progress)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, date=data.date))
        sequences = sample_sequences(data, config.sequences, config.seed)
    return PruningPlan(config, stream, targets, shapes, sparsities, sequences, masks)


def prune(plan: PruningPlan, ranks: Group | None = None, *, progress: bool = True) -> list[ZeroCount]:
    """Prune a model, and write it, its tokenizer and ``pruning.json`` to ``config.output``. Collective.

    The first rank writes the folder, which is either complete or absent.

    Args:
        plan: The inputs, from ``prepare``; the same on every rank.
        ranks: Ranks that share the work; None: this process alone.
        progress: Show progress bars.

    Returns:
        Zeros of each target; with method "none", those that the model has already.

    Raises:
        ValueError: The model is pruned already, or weights or statistics are not usable; raised on every rank.
    """
    ranks = ranks or Group(None)
    config, stream = plan.config, plan.stream
    counts, pattern = count_stored_zeros(stream, plan.shapes, ranks)
    if config.method == "none":
        if ranks.rank == 0:
            print(f"{stream.source.folder}: {describe_zeros(counts, pattern)}")
        return counts
    if config.method != "mask":
        check_not_pruned(stream, counts, pattern)
    pruner = Pruner(
        config, stream, plan.targets, plan.shapes, plan.sparsities, plan.sequences, plan.masks, ranks, progress
    )
    weights = _LazyWeights(stream, pruner.pruned(), plan.targets)
    _write(plan, weights, pruner, ranks)
    return [weights.counts[name] for name in plan.shapes]


def prune_folder(config: PruneConfig, *, progress: bool = True) -> list[ZeroCount]:
    """Prune a model in one call, as ``prepare`` and ``prune`` do. Collective."""
    return prune(prepare(config, progress=progress), progress=progress)


class _LazyWeights:
    """Function from a parameter of the model to its pruned value, which is computed when it is requested.

    The pruner yields the targets in its own order. Those that it yields before the requested one are kept until their
    turn comes; the rest of the model is read from its files.
    """

    def __init__(self, stream: StreamedModel, pruned: Iterator[tuple[str, Tensor]], targets: dict[str, Target]) -> None:
        self.counts: dict[str, ZeroCount] = {}
        self._stream, self._pruned, self._targets = stream, pruned, targets
        self._names = {target.weight_name(name): name for name, target in targets.items()}
        self._waiting: dict[str, Tensor] = {}

    def __call__(self, value: Tensor) -> Tensor:
        name = self._stream.name_of(value)
        target = self._names.get(name)
        if target is None:
            return self._stream.read(name)
        while target not in self._waiting:
            pruned, weight = next(self._pruned)
            self.counts[pruned] = ZeroCount.of(pruned, weight)
            self._waiting[pruned] = self._targets[pruned].from_rows(weight)
        return self._waiting.pop(target)


def _write(plan: PruningPlan, weights: _LazyWeights, pruner: Pruner, ranks: Group) -> None:
    """Export the model, which prunes it, and add the record. Collective."""
    config, source = plan.config, plan.stream.source
    output = Path(config.output).expanduser()
    tokenizer = locate(config.model.tokenizer) if config.model.tokenizer else None

    def write_record(folder: Path) -> None:
        _warn_off_target(list(weights.counts.values()), plan, pruner)
        write_json(folder / "pruning.json", _record(plan, weights, pruner))

    export_model(
        plan.stream.model,
        weights,
        output,
        source,
        writes=ranks.rank == 0,
        tokenizer=tokenizer,
        targets=list(plan.targets),
        finish=write_record,
    )
    ranks.sum(torch.zeros(1))  # no rank continues before the folder exists


def _warn_off_target(counts: list[ZeroCount], plan: PruningPlan, pruner: Pruner) -> None:
    """Warn about targets with more zeros than asked for, because of zero rows in the dense model or dead inputs."""
    if plan.config.ranking == "global" or plan.config.method == "mask":
        return
    for count in counts:
        wanted = Ranking(plan.config.ranking, pruner.sparsities[count.name]).zeros(*plan.shapes[count.name])
        assert count.zeros >= wanted, (count, wanted)
        if count.zeros > wanted:
            log.warning(
                "%s has %d zeros, %d asked for: the dense weight had more in places, or inputs that are always 0",
                count.name,
                count.zeros,
                wanted,
            )


def _record(plan: PruningPlan, weights: _LazyWeights, pruner: Pruner) -> dict[str, Any]:
    """Content of pruning.json: the settings, the sparsity reached, and the zeros of each target."""
    settings = dataclasses.asdict(plan.config)
    for name in ("output", "threads"):  # which change nothing
        del settings[name]
    if not plan.config.chooses_in_rounds:
        del settings["compensate_rounds"]
    if plan.config.method != "mask":
        settings |= {"sparsity": plan.config.share, "group": plan.config.ranking}
    counts = [weights.counts[name] for name in plan.shapes]
    asked = pruner.sparsities if plan.config.layer_ratios != "uniform" else {}
    return {
        **settings,
        "calibration_tokens": sum(len(sequence) for sequence in plan.sequences),
        "reached": total_sparsity(counts),
        "targets_pruned": {
            count.name: {"weights": count.numel, "zeros": count.zeros, "share": count.sparsity}
            | ({"asked": asked[count.name]} if count.name in asked else {})
            for count in counts
        },
    }
