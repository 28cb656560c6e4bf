"""The pruning methods, each as a generator of pruned weights in the order of the model's linears."""

from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor, nn
from tqdm import tqdm

from seft_dist.backends.group import Group
from seft_dist.config import PruneConfig
from seft_dist.modules.kinds import ExpertWeight, Target
from seft_dist.pruning.calibrate import Calibration, find_layers
from seft_dist.pruning.curvature import OutputGradientNorm
from seft_dist.pruning.gradients import BackwardCalibration
from seft_dist.pruning.magnitude import magnitude_scores
from seft_dist.pruning.mask_file import MaskFile
from seft_dist.pruning.masks import (
    Ranking,
    find_threshold,
    gather_rows,
    num_pruned,
    own_rows,
    pruning_keys,
    select_pruned,
)
from seft_dist.pruning.owl import outlier_share, owl_sparsities
from seft_dist.pruning.sparsegpt import ExpertHessians, Hessians, inverse_factor, sparsegpt
from seft_dist.pruning.stream import StreamedModel
from seft_dist.pruning.wanda import InputNorm, wanda_scores
from seft_dist.sparsity.casts import cast_weight


class Pruner:
    """One pruning run. Each rank prunes its own rows; every method that yields or returns weights is **collective**."""

    def __init__(
        self,
        config: PruneConfig,
        stream: StreamedModel,
        targets: dict[str, Target],
        shapes: dict[str, tuple[int, int]],
        sparsities: dict[str, float],
        sequences: list[Tensor],
        masks: MaskFile | None,
        ranks: Group,
        progress: bool,
        zeros: Callable[[str, int, int], Tensor] | None = None,
    ) -> None:
        """Args:
        config: The pruning method and its settings.
        stream: The model.
        targets: The weights to prune, by name.
        shapes: Shape [out, in] of each target's weight as a matrix.
        sparsities: Sparsity of each target; OWL replaces them.
        sequences: Calibration text; empty for methods that need none.
        masks: Masks for method "mask".
        ranks: Ranks that share the work.
        progress: Show progress bars.
        zeros: For Wanda by rows or with a pattern: function that returns the number of weights to prune in each row, or
            group, of the rows [first, last) of a target. None: as the sparsity says.
        """
        self.sparsities = dict(sparsities)
        self._config, self._stream, self._shapes, self._masks = config, stream, shapes, masks
        self._ranks, self._progress, self._sequences = ranks, progress, sequences
        self._linears, self._zeros = targets, zeros
        self._norms: dict[str, Tensor] = {}
        self._output_norms: dict[str, Tensor] = {}

    def pruned(self) -> Iterator[tuple[str, Tensor]]:
        """Prune the targets one after the other. Collective.

        Yields:
            Name of a target and its whole pruned weight [out, in], on every rank.
        """
        config = self._config
        calibration = open_calibration(self._stream, self._sequences, self._ranks) if self._sequences else None
        if config.layer_ratios == "owl":
            assert calibration is not None
            self.sparsities = self._owl(calibration)
        if config.method == "mask":
            yield from self._with_progress(self._by_masks())
        elif config.ranking == "global" or config.method in ("magnitude", "curvature"):
            if config.method == "wanda":
                assert calibration is not None
                self._measure_norms(calibration, lambda layer, norms: self._norms.update(norms))
            elif config.method == "curvature":
                assert calibration is not None
                self._measure_curvature(calibration)
            yield from self._with_progress(self._globally() if config.ranking == "global" else self._one_by_one())
        else:
            assert calibration is not None
            yield from self._layer_by_layer(calibration)

    def _with_progress(self, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        yield from tqdm(weights, desc="Pruning weights", total=len(self._shapes), disable=not self._progress)

    def _inside(self, layer_name: str) -> dict[str, Target]:
        return {name: linear for name, linear in self._linears.items() if name.startswith(f"{layer_name}.")}

    def _own(self, name: str) -> tuple[int, int]:
        return own_rows(self._shapes[name][0], self._ranks)

    def _ranking(self, name: str) -> Ranking:
        return Ranking(self._config.ranking, self.sparsities[name])

    def _by_masks(self) -> Iterator[tuple[str, Tensor]]:
        assert self._masks is not None
        for name in self._shapes:  # every rank reads every weight: there is no computation to share
            kept = self._linears[name].rows_view(self._masks.read(name))
            yield name, self._stream.read_rows(name).masked_fill_(~kept, 0.0)

    def _scores(self, name: str, own: Tensor) -> Tensor:
        """Score a target's own rows by what was measured of the dense model; magnitudes if nothing was."""
        if name not in self._norms:
            return magnitude_scores(own)
        first, last = self._own(name)
        scores = wanda_scores(own, _norm_of(self._norms[name], first, last).cpu())
        if name in self._output_norms:
            scores *= self._output_norms[name][first:last].cpu().unsqueeze(1)
        return scores

    def _one_by_one(self) -> Iterator[tuple[str, Tensor]]:
        """Prune each target of the dense model by itself. Collective."""
        for name in self._shapes:
            own = self._stream.read_rows(name, *self._own(name))
            selected = select_pruned(self._scores(name, own), own, self._ranking(name), self._ranks)
            yield name, gather_rows(own.masked_fill_(selected, 0.0), self._ranks)

    def _globally(self) -> Iterator[tuple[str, Tensor]]:
        """Compare the scores of all targets; only this rank's rows of one weight are in memory at a time. Collective.

        The weights are read, and their keys computed, several times: keeping the keys of all targets would take
        4 bytes for each weight.
        """
        names = list(self._shapes)

        def read(number: int) -> tuple[Tensor, Tensor]:
            name = names[number]
            own = self._stream.read_rows(name, *self._own(name))
            return own, pruning_keys(self._scores(name, own), own)

        wanted = num_pruned(self._config.share, sum(rows * columns for rows, columns in self._shapes.values()))
        threshold = find_threshold(self._ranks, lambda number: read(number)[1], len(names), wanted)
        for number, name in enumerate(names):
            own, key = read(number)
            yield name, gather_rows(own.masked_fill_(threshold.mask(key, number).view_as(own), 0.0), self._ranks)

    def _layer_by_layer(self, calibration: Calibration) -> Iterator[tuple[str, Tensor]]:
        """Prune one decoder layer after the other, each with the inputs that the pruned layers before it produce."""
        prune = self._by_wanda if self._config.method == "wanda" else self._by_sparsegpt

        def visit(layer_name: str, layer: nn.Module, run: Callable[[], None]) -> None:
            linears = self._inside(layer_name)
            if linears:
                prune(linears, run)

        for layer_name in calibration.walk(visit, progress=self._progress):
            yield from ((name, linear.as_rows()) for name, linear in self._inside(layer_name).items())

    def _by_wanda(self, linears: dict[str, Target], run: Callable[[], None]) -> None:
        """Prune the weights with the smallest product of size and input norm, row by row. Collective."""
        norms = {name: InputNorm(linear) for name, linear in linears.items()}
        run()
        for name, linear in linears.items():
            norm = norms[name].close(name, self._ranks)
            first, last = self._own(name)
            own = linear.as_rows()[first:last]
            count = self._zeros(name, first, last) if self._zeros is not None else None
            selected = select_pruned(
                wanda_scores(own, _norm_of(norm, first, last)), own, self._ranking(name), self._ranks, count
            )
            linear.weight.data = linear.from_rows(gather_rows(own.masked_fill(selected, 0.0), self._ranks))

    def _by_sparsegpt(self, linears: dict[str, Target], run: Callable[[], None]) -> None:
        """Prune column block by column block, and make up for it in the columns that follow. Collective."""
        experts = {name: ExpertHessians(t) for name, t in linears.items() if isinstance(t, ExpertWeight)}
        hessians = Hessians({name: target for name, target in linears.items() if name not in experts})
        run()
        for names, hessian in hessians.close(self._ranks):
            factor, dead = inverse_factor(hessian, self._config.dampening, names[0])
            for name in names:
                linears[name].weight.data = linears[name].from_rows(
                    self._compensated(name, linears[name].as_rows(), factor, dead)
                )
        for name, hessians_of_experts in experts.items():
            weight = linears[name].weight.detach()
            for expert, hessian in enumerate(hessians_of_experts.close(name, self._ranks)):
                factor, dead = inverse_factor(hessian, self._config.dampening, f"{name}, expert {expert}")
                before = expert * weight[expert].numel()
                weight[expert] = self._compensated(name, weight[expert], factor, dead, before)

    def _compensated(self, name: str, weight: Tensor, factor: Tensor, dead: Tensor, before: int = 0) -> Tensor:
        """Prune a weight [out, in], or one expert's part of it, by SparseGPT, each rank its own rows. Collective."""
        first, last = own_rows(len(weight), self._ranks)
        own = sparsegpt(weight[first:last].float(), factor, dead, self._ranking(name), self._ranks, before)
        return gather_rows(cast_weight(own, weight.dtype)[0], self._ranks)

    def _measure_norms(self, calibration: Calibration, receive: Callable[[str, dict[str, Tensor]], None]) -> None:
        """Measure input norms of the dense model; ``receive`` gets those of a layer in memory. Collective."""

        def visit(layer_name: str, layer: nn.Module, run: Callable[[], None]) -> None:
            observed = {name: InputNorm(linear) for name, linear in self._inside(layer_name).items()}
            run()
            receive(layer_name, {name: norm.close(name, self._ranks) for name, norm in observed.items()})

        for _ in calibration.walk(visit, changes=False, progress=self._progress):
            pass

    def _measure_curvature(self, calibration: BackwardCalibration) -> None:
        """Measure norms of the dense model's inputs and of the gradients of its outputs. Collective."""

        def visit(layer_name: str, layer: nn.Module, run: Callable[[], None]) -> None:
            inside = self._inside(layer_name)
            inputs = {name: InputNorm(linear) for name, linear in inside.items()}
            outputs = {name: OutputGradientNorm(linear) for name, linear in inside.items()}
            run()
            self._norms |= {name: norm.close(name, self._ranks) for name, norm in inputs.items()}
            self._output_norms |= {name: norm.close(name, self._ranks) for name, norm in outputs.items()}

        layers, _ = find_layers(self._stream.model)
        ends = partial(self._stream.materialize, "", without=layers)
        for _ in calibration.walk_back(visit, materialize_ends=ends, progress=self._progress):
            pass

    def _owl(self, calibration: Calibration) -> dict[str, float]:
        """Compute the sparsity of each target by the outliers of its decoder layer. Collective."""
        outliers: dict[str, float] = {}
        sizes: dict[str, int] = {}

        def count_outliers(layer_name: str, norms: dict[str, Tensor]) -> None:
            if norms:
                scores = [wanda_scores(self._linears[name].as_rows(), norm) for name, norm in norms.items()]
                outliers[layer_name] = outlier_share(scores, self._config.owl_threshold)
                sizes[layer_name] = sum(score.numel() for score in scores)

        self._measure_norms(calibration, count_outliers)
        layers = owl_sparsities(outliers, sizes, self._config.share, self._config.owl_lambda)
        return {
            name: next(sparsity for layer, sparsity in layers.items() if name.startswith(f"{layer}."))
            for name in self._shapes
        }


def open_calibration(stream: StreamedModel, sequences: list[Tensor], ranks: Group) -> BackwardCalibration:
    """Prepare calibration of a model of which only the layer that runs is in memory.

    Args:
        stream: The model.
        sequences: Token numbers, 1-D int64 each, the same on every rank.
        ranks: Ranks that share the work.
    """
    base = next(name for name, module in stream.model.named_modules() if module is stream.model.base_model)
    layers, _ = find_layers(stream.model)
    return BackwardCalibration(
        stream.model,
        sequences,
        ranks,
        materialize=stream.materialize,
        materialize_rest=lambda: stream.materialize(base, without=layers),
        device=stream.device,
    )


def _norm_of(norm: Tensor, first: int, last: int) -> Tensor:
    """Input norms of the rows [first, last) of a weight: one for all rows or, with fused experts, one for each row."""
    return norm if norm.dim() == 1 else norm[first:last]
