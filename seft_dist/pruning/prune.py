"""A dense model folder in, a pruned model folder out; on one process or many ranks, with the same result.

No rank ever holds the model: writing it asks for one weight after the other, and asking for the first weight of a decoder
layer is what prunes that layer.
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
from seft_dist.export.folders import refuse_existing
from seft_dist.files.writing import write_json
from seft_dist.io.source import locate, open_source
from seft_dist.modules.kinds import Target
from seft_dist.pruning.calibrate import find_layers, sample_sequences
from seft_dist.pruning.kept import KeptIndex
from seft_dist.pruning.masks import Ranking
from seft_dist.pruning.methods import Pruner
from seft_dist.pruning.owl import read_sparsities
from seft_dist.pruning.stream import StreamedModel
from seft_dist.pruning.survey import count_stored_zeros, describe, refuse_pruned
from seft_dist.sparsity.zeros import ZeroCount, num_zeros, total_sparsity

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A checked pruning run, nothing of it done yet."""

    config: PruneConfig
    stream: StreamedModel
    targets: dict[str, Target]
    shapes: dict[str, tuple[int, int]]
    """Of the targets' weights as matrices [out, in]."""
    sparsities: dict[str, float]
    """Of each target; OWL's are not known yet."""
    sequences: list[Tensor]
    """Calibration text, if the method needs it."""
    kept: KeptIndex | None
    """Of method "mask"."""


def prepare(config: PruneConfig, *, device: torch.device | None = None, progress: bool = True) -> Plan:
    """Check everything that can be checked before work starts.

    Args:
        config: What to prune, and how.
        device: Where layers compute; None: the CPU.
        progress: Show progress bars.

    Raises:
        ValueError: No such model or data, output exists, too little text, targets that cannot be pruned so.
    """
    if config.method != "none":
        refuse_existing(Path(config.output).expanduser(), "output")
    stream = StreamedModel(open_source(config.model), device or torch.device("cpu"))
    targets = stream.find_targets(config.targets)
    shapes = {name: target.matrix_shape for name, target in targets.items()}
    for name, (_, columns) in shapes.items():
        Ranking(config.ranking, config.share).check(name, columns)
    sparsities = dict.fromkeys(shapes, config.share)
    if config.layer_ratios not in ("uniform", "owl"):
        sparsities = read_sparsities(config.layer_ratios, shapes, config.sparsity)
    stored = {name: tuple(target.weight.shape) for name, target in targets.items()}
    kept = KeptIndex(config.mask, stored) if config.mask is not None else None
    sequences: list[Tensor] = []
    if needs_text(config):
        prefix, _ = find_layers(stream.model)
        outside = [name for name in targets if not name.startswith(f"{prefix}.")]
        if outside:
            raise ValueError(
                f"target {outside[0]} is outside the decoder layers ({prefix}): choose other --targets, or "
                "--method magnitude"
            )
        assert config.data is not None
        data = load_sequences(config.data, load_tokenizer(config.model), progress=progress)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, date=data.origin.date))
        sequences = sample_sequences(data, config.sequences, config.seed)
    return Plan(config, stream, targets, shapes, sparsities, sequences, kept)


def needs_text(config: PruneConfig) -> bool:
    """Whether a run looks at activations."""
    return config.method in ("wanda", "sparsegpt") or (config.method == "magnitude" and config.layer_ratios == "owl")


def prune(plan: Plan, ranks: Group | None = None, *, progress: bool = True) -> list[ZeroCount]:
    """Prune a model and write it, its tokenizer and ``pruning.json`` to ``config.output``. Collective.

    The folder appears complete or not at all; the first rank writes it.

    Args:
        plan: From ``prepare``, the same on every rank.
        ranks: Who shares the work; None: this process alone.
        progress: Show progress bars.

    Returns:
        Zeros of each target; with method "none", those it has.

    Raises:
        ValueError: Model pruned already or not finite, or statistics that cannot be used; on every rank.
    """
    ranks = ranks or Group(None)
    config, stream = plan.config, plan.stream
    counts, pattern = count_stored_zeros(stream, plan.shapes, ranks)
    if config.method == "none":
        if ranks.rank == 0:
            print(f"{stream.source.folder}: {describe(counts, pattern)}")
        return counts
    if config.method != "mask":
        refuse_pruned(stream, counts, pattern)
    pruner = Pruner(
        config, stream, plan.targets, plan.shapes, plan.sparsities, plan.sequences, plan.kept, ranks, progress
    )
    pulled = _Pulled(stream, pruner.pruned(), plan.targets)
    _write(plan, pulled, pruner, ranks)
    return [pulled.counts[name] for name in plan.shapes]


def prune_folder(config: PruneConfig, *, progress: bool = True) -> list[ZeroCount]:
    """Both in one: ``prepare`` and ``prune``. Collective."""
    return prune(prepare(config, progress=progress), progress=progress)


class _Pulled:
    """Gives each weight of the model when it is asked for; targets as they come out of the pruner."""

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
            found, weight = next(self._pruned)
            self.counts[found] = ZeroCount(found, weight.numel(), num_zeros(weight))
            self._waiting[found] = self._targets[found].from_rows(weight)
        return self._waiting.pop(target)


def _write(plan: Plan, pulled: _Pulled, pruner: Pruner, ranks: Group) -> None:
    config, source = plan.config, plan.stream.source
    output = Path(config.output).expanduser()
    tokenizer = locate(config.model.tokenizer) if config.model.tokenizer else None

    def write_record(folder: Path) -> None:
        _warn_off_target(list(pulled.counts.values()), plan, pruner)
        write_json(folder / "pruning.json", _record(plan, pulled, pruner))

    export_model(
        plan.stream.model,
        pulled,
        output,
        source,
        writes=ranks.rank == 0,
        tokenizer=tokenizer,
        targets=list(plan.targets),
        finish=write_record,
    )
    ranks.sum(torch.zeros(1))  # nobody goes on before the folder is there


def _warn_off_target(counts: list[ZeroCount], plan: Plan, pruner: Pruner) -> None:
    """Rows that are 0 in the dense model, dead inputs: the count is above what was asked for."""
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


def _record(plan: Plan, pulled: _Pulled, pruner: Pruner) -> dict[str, Any]:
    settings = dataclasses.asdict(plan.config)
    del settings["output"]
    if plan.config.method != "mask":
        settings |= {"sparsity": plan.config.share, "group": plan.config.ranking}
    counts = [pulled.counts[name] for name in plan.shapes]
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
