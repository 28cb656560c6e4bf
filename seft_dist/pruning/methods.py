"""The pruning methods, each as a generator of pruned weights in the order of the model's linears."""

from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor, nn
from tqdm import tqdm

from seft_dist.backends.group import Group
from seft_dist.config import PruneConfig
from seft_dist.modules.kinds import ExpertWeight, Target
from seft_dist.pruning.calibrate import Calibration, find_layers
from seft_dist.pruning.compensate import compensated, prune_in_rounds, scaled_hessian
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

Choice = Callable[[str], tuple[Tensor, Tensor]]
"""Function from the name of a target to this rank's rows [own rows, in] of its weight before pruning, and True where
they are pruned. Collective."""
Replacement = Callable[[str, Tensor, Tensor | None, int], Tensor]
"""Function from a target's name, its weight [out, in] or that of one expert, True where this rank's rows of it are
pruned (None: SparseGPT chooses), and the number of weights of earlier experts to the new weight. Collective."""


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
        choose = self._choice(calibration)
        if choose is None or config.compensate:
            assert calibration is not None
            yield from self._layer_by_layer(calibration, choose)
        else:
            for name in tqdm(self._shapes, desc="Pruning weights", disable=not self._progress):
                own, selected = choose(name)
                yield name, gather_rows(own.masked_fill_(selected, 0.0), self._ranks)

    def _choice(self, calibration: BackwardCalibration | None) -> Choice | None:
        """Measure the dense model, if the method does, to choose what is pruned. Collective.

        Returns:
            None if each decoder layer is measured and pruned with the inputs that the pruned layers before it produce.
        """
        config = self._config
        if config.method == "mask":
            return self._by_mask
        if config.ranking != "global" and config.method not in ("magnitude", "curvature"):
            return None
        if config.method == "wanda":
            assert calibration is not None
            self._measure_norms(calibration, lambda layer, norms: self._norms.update(norms))
        elif config.method == "curvature":
            assert calibration is not None
            self._measure_curvature(calibration)
        return self._by_threshold() if config.ranking == "global" else self._by_scores

    def _inside(self, layer_name: str) -> dict[str, Target]:
        return {name: linear for name, linear in self._linears.items() if name.startswith(f"{layer_name}.")}

    def _own(self, name: str) -> tuple[int, int]:
        return own_rows(self._shapes[name][0], self._ranks)

    def _ranking(self, name: str) -> Ranking:
        return Ranking(self._config.ranking, self.sparsities[name])

    def _read_own(self, name: str) -> Tensor:
        return self._stream.read_rows(name, *self._own(name))

    def _by_mask(self, name: str) -> tuple[Tensor, Tensor]:
        """Choose what the file of masks does not keep."""
        assert self._masks is not None
        first, last = self._own(name)
        return self._read_own(name), ~self._linears[name].rows_view(self._masks.read(name))[first:last]

    def _scores(self, name: str, own: Tensor) -> Tensor:
        """Score a target's own rows by what was measured of the dense model; magnitudes if nothing was."""
        if name not in self._norms:
            return magnitude_scores(own)
        first, last = self._own(name)
        scores = wanda_scores(own, _norm_of(self._norms[name], first, last).cpu())
        if name in self._output_norms:
            scores *= self._output_norms[name][first:last].cpu().unsqueeze(1)
        return scores

    def _by_scores(self, name: str) -> tuple[Tensor, Tensor]:
        """Choose inside each target of the dense model. Collective."""
        own = self._read_own(name)
        return own, select_pruned(self._scores(name, own), own, self._ranking(name), self._ranks)

    def _by_threshold(self) -> Choice:
        """Compare the scores of all targets; only this rank's rows of one weight are in memory at a time. Collective.

        The weights are read, and their keys computed, several times: keeping the keys of all targets would take
        4 bytes for each weight.
        """
        numbers = {name: number for number, name in enumerate(self._shapes)}
        names = list(self._shapes)

        def key(own: Tensor, name: str) -> Tensor:
            return pruning_keys(self._scores(name, own), own)

        wanted = num_pruned(self._config.share, sum(rows * columns for rows, columns in self._shapes.values()))
        threshold = find_threshold(
            self._ranks, lambda number: key(self._read_own(names[number]), names[number]), len(names), wanted
        )

        def choose(name: str) -> tuple[Tensor, Tensor]:
            own = self._read_own(name)
            return own, threshold.mask(key(own, name), numbers[name]).view_as(own)

        return choose

    def _layer_by_layer(self, calibration: Calibration, choose: Choice | None) -> Iterator[tuple[str, Tensor]]:
        """Prune one decoder layer after the other, each with the inputs that the pruned layers before it produce."""

        def visit(layer_name: str, layer: nn.Module, run: Callable[[], None]) -> None:
            linears = self._inside(layer_name)
            if linears and (self._config.method == "sparsegpt" or self._config.compensate):
                self._prune_with_hessians(linears, run, choose)
            elif linears:
                self._prune_by_wanda(linears, run)

        for layer_name in calibration.walk(visit, progress=self._progress):
            yield from ((name, linear.as_rows()) for name, linear in self._inside(layer_name).items())

    def _prune_by_wanda(self, linears: dict[str, Target], run: Callable[[], None]) -> None:
        """Prune a layer's linears row by row, and change nothing else. Collective."""
        choose = self._by_wanda(linears, run)
        for name, linear in linears.items():
            own, selected = choose(name)
            linear.weight.data = linear.from_rows(gather_rows(own.masked_fill(selected, 0.0), self._ranks))

    def _by_wanda(self, linears: dict[str, Target], run: Callable[[], None]) -> Choice:
        """Run a layer, and choose the weights with the smallest product of size and input norm. Collective."""
        observed = {name: InputNorm(linear) for name, linear in linears.items()}
        run()

        def choose(name: str) -> tuple[Tensor, Tensor]:
            norm = observed.pop(name).close(name, self._ranks)  # those of fused experts are as large as their weight
            first, last = self._own(name)
            own = linears[name].as_rows()[first:last]
            count = self._zeros(name, first, last) if self._zeros is not None else None
            scores = wanda_scores(own, _norm_of(norm, first, last))
            return own, select_pruned(scores, own, self._ranking(name), self._ranks, count)

        return choose

    def _prune_with_hessians(self, linears: dict[str, Target], run: Callable[[], None], choose: Choice | None) -> None:
        """Prune a layer's linears, whose weights that stay make up for what is pruned. Collective."""
        hessians = Hessians({name: linear for name, linear in linears.items() if not isinstance(linear, ExpertWeight)})
        experts = {name: ExpertHessians(t) for name, t in linears.items() if isinstance(t, ExpertWeight)}
        if choose is None and self._config.method == "wanda":
            choose = self._by_wanda(linears, run)
        else:
            run()
        for names, hessian in hessians.close(self._ranks):
            replace = self._replacement(hessian, names[0], choose is None)
            for name in names:
                selected = None if choose is None else choose(name)[1]
                linears[name].weight.data = linears[name].from_rows(replace(name, linears[name].as_rows(), selected, 0))
        for name, hessians_of_experts in experts.items():
            weight = linears[name].weight.detach()
            chosen = None if choose is None else gather_rows(choose(name)[1], self._ranks).view(weight.shape)
            for expert, hessian in enumerate(hessians_of_experts.close(name, self._ranks)):
                replace = self._replacement(hessian, f"{name}, expert {expert}", choose is None)
                first, last = own_rows(weight.shape[1], self._ranks)
                selected = None if chosen is None else chosen[expert, first:last]
                weight[expert] = replace(name, weight[expert], selected, expert * weight[expert].numel())

    def _replacement(self, hessian: Tensor, label: str, by_sparsegpt: bool) -> Replacement:
        """Prepare to replace weights that share a Hessian, which is changed.

        Args:
            hessian: The Hessian, fp64 [in, in].
            label: Name of the first weight, for messages.
            by_sparsegpt: True if SparseGPT chooses what is pruned.
        """
        config = self._config
        factor = dead = scaled = root = norm = None
        if by_sparsegpt:
            copy = hessian.clone() if config.compensate else hessian
            factor, dead = inverse_factor(copy, config.dampening, label)
        if config.compensate:
            norm = hessian.diagonal().sqrt().float()
            scaled, root = scaled_hessian(hessian, config.dampening)

        def replace(name: str, weight: Tensor, selected: Tensor | None, before: int) -> Tensor:
            """Prune a weight, or solve for what stays of it, each rank its own rows. Collective."""
            first, last = own_rows(len(weight), self._ranks)
            own = weight[first:last].float()
            new = own
            if factor is not None and dead is not None:
                new = sparsegpt(own, factor, dead, self._ranking(name), self._ranks, before)
                selected = new == 0  # positions of zeros that it has changed stay
            elif selected is not None:
                selected = selected.to(own.device) | (own == 0)
            if scaled is not None and root is not None and norm is not None:
                assert selected is not None
                if config.chooses_in_rounds:
                    choose = self._choice_in_rounds(name, selected, norm, before // weight.shape[1] + first)
                    new = prune_in_rounds(own, choose, scaled, root, config.compensate_rounds)
                else:
                    new = compensated(own, selected, scaled, root)
            new = gather_rows(cast_weight(new, weight.dtype)[0], self._ranks)
            if not new.isfinite().all():
                raise ValueError(
                    f"weights of {name} would not be finite after pruning: use more calibration text (--sequences), a "
                    "larger --dampening, or --model.dtype float32"
                )
            return new

        return replace

    def _choice_in_rounds(
        self, name: str, selected: Tensor, norm: Tensor, first: int
    ) -> Callable[[Tensor, float], Tensor]:
        """Return the function that ``prune_in_rounds`` chooses by. It is collective, as this is.

        Args:
            name: Name of the target.
            selected: Where the method would prune all at once, bool [own rows, in]; only its numbers count.
            norm: Norms of the inputs up to a factor, fp32 [in].
            first: Number of the first own row in the target.
        """
        ranking = self._ranking(name)
        if ranking.kept_of is None and ranking.kind != "row":
            ranking, count = Ranking("layer", 0.0), self._ranks.sum(selected.sum().view(1).cpu())
        else:
            count = selected.view(-1, selected.shape[1] if ranking.kept_of is None else ranking.kept_of[1]).sum(1)
        one = len(count) > 0 and ranking.kept_of is None and bool((count == count[0]).all())
        outputs: Tensor | float = 1.0
        if name in self._output_norms:
            outputs = self._output_norms[name][first : first + len(selected)].to(norm.device).unsqueeze(1)

        def choose(weight: Tensor, share: float) -> Tensor:
            now = num_pruned(share, int(count[0])) if one else (count.double() * share + 0.5).floor().long()
            return select_pruned(wanda_scores(weight, norm) * outputs, weight, ranking, self._ranks, now)

        return choose

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
