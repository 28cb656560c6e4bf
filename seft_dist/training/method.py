"""The interface between the trainer and a method, and SEFT behind it; the other methods are in baselines/."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from seft_dist.backends import Backend
from seft_dist.baselines.adapted import MaskedLora, Spp
from seft_dist.baselines.baseline import Baseline, FinalizeInputs
from seft_dist.baselines.lora import Lora, LoraMerged
from seft_dist.baselines.weights import MaskedFull, NoRepair, NormsAndBiases
from seft_dist.io import checkpoint
from seft_dist.io.source import Source
from seft_dist.kernels.bits import pack
from seft_dist.optim.optimizer import SeftOptimizer
from seft_dist.optim.report import EvolutionReport
from seft_dist.optim.state import LayerSparsity
from seft_dist.sparsity.casts import cast_weight
from seft_dist.sparsity.schedule import is_evolution, is_first_support

BASELINES: dict[str, type[Baseline]] = {
    "none": NoRepair,
    "lora": Lora,
    "lora_merged": LoraMerged,
    "masked_lora": MaskedLora,
    "spp": Spp,
    "masked_full": MaskedFull,
    "norms_and_biases": NormsAndBiases,
}
"""The methods that are not SEFT."""


class Method(Protocol):
    """A method that the trainer can drive, whatever backend holds the weights."""

    num_steps: int
    """Optimizer steps done."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""

    prunes_in_the_end: bool
    """True if ``finalize`` prunes what was trained, so that another model is written than was evaluated."""

    @property
    def evolution(self) -> EvolutionReport | None:
        """Report of the last step's evolution, if it had one."""

    @property
    def grad_norm(self) -> float:
        """Global norm of the last step's gradient before clipping."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups; the first one's "lr" is the learning rate of the coming step."""

    @property
    def backend(self) -> Backend:
        """Backend that holds the weights; it is known once the method is attached."""

    @property
    def target_names(self) -> list[str]:
        """Names of the targets, in order."""

    @property
    def fingerprints(self) -> list[int]:
        """Hash of each target's weight as it was loaded."""

    @property
    def changed_names(self) -> list[str]:
        """Names of targets or parameters that training may change."""

    @property
    def trainable(self) -> int:
        """Number of values that are trained, in all ranks together."""

    @property
    def density(self) -> float:
        """Trained values as a share of the targets' weights."""

    def attach(self) -> None:
        """Find the backend, check the weights and install what is trained. Collective."""

    def set_is_last_backward(self, is_last_backward: bool) -> None:
        """Announce before a backward pass whether it is the last one of a step."""

    def changes_topology(self, step: int) -> bool:
        """Tell whether masks or supports change in a step."""

    def step(self) -> Any:
        """Take an optimizer step. Collective."""

    def zero_grad(self) -> None:
        """Forget the gradients."""

    def sparsity(self) -> list[LayerSparsity]:
        """Count zeros and deltas of every target. Collective."""

    def exact_zeros(self) -> AbstractContextManager[None]:
        """Give every layer its exact number of zeros inside the context, for evaluations and exports. Collective."""

    def topology(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the positions of each target's support, and its packed mask, in this rank's interval."""

    def states(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield this rank's trained ``values``, ``exp_avg`` and ``exp_avg_sq``, by names."""

    def saver(self, folder: Path, keep: int) -> checkpoint.BackgroundSaver:
        """Make the object that writes the checkpoints, and keeps so many."""

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Restore a checkpoint and return its ``extra``. Collective."""

    def rewind(self, checkpoint: Path, source: Source) -> None:
        """Go back to an earlier checkpoint of the same run, whose pruned model is ``source``. Collective."""

    def finalize(self, inputs: FinalizeInputs) -> dict[str, Any]:
        """Turn the weights into those of a plain model and return entries for result.json. Collective."""


class TrainedSeft(SeftOptimizer):
    """SEFT as a method that the trainer can drive."""

    prunes_in_the_end = False

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        assert self.config.steps is not None
        return self.config.steps

    @property
    def fingerprints(self) -> list[int]:
        """Hash of each target's weight as it was loaded."""
        return self.sparse_state.fingerprints

    @property
    def changed_names(self) -> list[str]:
        """Names of the targets, and of the norms and biases that train beside them."""
        return self.target_names + self.vectors.names

    @property
    def trainable(self) -> int:
        """Number of deltas of all ranks, and of trained norms and biases."""
        return sum(len(support) for support in self.sparse_state.supports) + len(self.vectors)

    @property
    def density(self) -> float:
        """Density of the deltas, as it was configured."""
        return self.config.density

    def changes_topology(self, step: int) -> bool:
        """Tell whether a step chooses the first support or evolves."""
        return is_first_support(self.config, step) or is_evolution(self.config, step)

    def topology(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the positions of each target's support, and its packed mask, in this rank's interval."""
        for layer in self.deltas():
            yield layer.columns.indices, layer.mask

    def states(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield this rank's deltas and their moments by the targets' names, then those of norms and biases."""
        for name, entries in zip(self.target_names, self.sparse_state.layers(), strict=True):
            yield name, {key: getattr(entries, key) for key in ("values", "exp_avg", "exp_avg_sq")}
        yield from self.vectors.states()

    def saver(self, folder: Path, keep: int) -> checkpoint.BackgroundSaver:
        """Make the object that writes masks and deltas."""
        return checkpoint.Saver(self, folder, keep)

    def load(self, path: Path) -> dict[str, Any]:
        """Restore masks and deltas from a checkpoint. Collective."""
        return checkpoint.load(self, path)

    def rewind(self, path: Path, source: Source) -> None:
        """Go back to an earlier checkpoint of the same run. Collective.

        A checkpoint is taken over by the pruned model, of which weights that were pruned again are lost here: so each
        rank reads its part of the targets anew.
        """
        backend = self.backend
        with backend.writing():
            for i, (name, holder) in enumerate(zip(backend.names, backend.holders, strict=True)):
                interval, stored = backend.interval(i), source.weights.find(holder.weight_name(name))
                assert stored is not None, name  # it was loaded from there
                values, _ = cast_weight(source.weights.read(stored, interval.start, interval.stop), backend.dtypes[i])
                backend.put_own(i, values.to(backend.device), pack(values != 0).to(backend.device))
            backend.sync_mask_counts()
        source.weights.release()
        self.num_steps = 0  # the model is the pruned one again, as a checkpoint's reader expects of a new optimizer
        checkpoint.load(self, path)

    def finalize(self, inputs: FinalizeInputs) -> dict[str, Any]:
        """Do nothing: the weights hold base + delta at every moment."""
        return {}
