"""The base class of the comparison methods: what they have in common from the loaded model to the exported one."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seft_dist.backends import Backend, find_backend
from seft_dist.backends.zeros import count_zeros_over_ranks
from seft_dist.baselines.saving import BaselineSaver, load
from seft_dist.baselines.trained import TrainedParameters
from seft_dist.config import TrainConfig
from seft_dist.data.sequences import Sample
from seft_dist.io.checkpoint import BackgroundSaver
from seft_dist.io.library_types import PreTrainedModel
from seft_dist.io.source import Source
from seft_dist.kernels.bits import pack
from seft_dist.modules.targets import check_criteria, find_targets
from seft_dist.optim.setup import LEAST_SPARSITY, check_pattern, prepare_weights, survey
from seft_dist.optim.state import LayerSparsity


@dataclass(frozen=True)
class FinalizeInputs:
    """Inputs of ``Baseline.finalize``, which turns the trainable parameters into a plain model."""

    folder: Path
    """Folder of the run."""
    source: Source
    """The pruned model."""
    sequences: Sequence[Sample]
    """Training text."""
    device: torch.device
    is_main: bool
    """True on the rank that writes files."""


class Baseline(ABC):
    """A method that trains some parameters with torch's AdamW and freezes all others.

    It is constructed before the first forward pass and attached before the first step. Weights may be held by one
    process, by every rank, or in FSDP2 shards.
    """

    evolution = None
    """Report of the last step's evolution: there is none, because masks stay as they are."""
    prunes_in_the_end = False
    """True if ``finalize`` prunes what was trained."""
    supported_kinds: tuple[str, ...] = ("Linear", "Conv1D", "fused experts")
    """Kinds of targets (``Target.kind``) that the method can train."""
    allows_dense = False
    """True if the method can also train a model without zeros."""
    config_fields: tuple[str, ...] = ()
    """Fields of BaselineConfig that decide what is trained."""

    def __init__(self, model: PreTrainedModel, config: TrainConfig, adam: dict[str, Any]) -> None:
        """Find the targets; no weight is read yet.

        Args:
            model: The model as it was loaded, whole or sharded by FSDP2.
            config: The run.
            adam: ``lr``, ``betas``, ``eps``, ``weight_decay`` and ``max_grad_norm``.

        Raises:
            ValueError: A target cannot be trained by this method.
        """
        self.model, self.config, self.name = model, config, str(config.method)
        self.num_steps = 0
        """Optimizer steps done."""
        self.grad_norm = 0.0
        """Global norm of the last step's gradient before clipping."""
        self.targets = find_targets(model, config.seft.targets)
        self.fingerprints: list[int] = []
        """Hash of each target's weight as it was loaded; filled by ``attach``."""
        self.active_counts: list[int] = []
        """Number of non-zero weights of each target as it was loaded, which is also the number wanted at the end;
        filled by ``attach``."""
        self._adam = {key: value for key, value in adam.items() if key != "max_grad_norm"}
        self._max_grad_norm: float | None = adam["max_grad_norm"]
        self._backend: Backend | None = None
        self._trained: TrainedParameters | None = None
        check_criteria(self.targets, config.seft)
        for name, target in self.targets.items():
            if target.kind not in self.supported_kinds:
                raise ValueError(
                    f"method={self.name} is not supported for {name}, a weight of {target.kind}: needs "
                    f"{' or '.join(self.supported_kinds)}; choose seft.targets without it, or another method "
                    "(docs/baselines.md)"
                )

    @abstractmethod
    def install(self) -> dict[str, nn.Parameter]:
        """Add to the model what the method trains. All parameters that the model had are frozen before.

        Returns:
            The parameters to train, by name.
        """

    def finalize(self, inputs: FinalizeInputs) -> dict[str, Any]:
        """Turn what was trained into weights of a plain model. Collective.

        Args:
            inputs: Everything beside the trainable parameters that some method needs for it.

        Returns:
            Entries for result.json.
        """
        return {}

    def active_mask(self, i: int) -> Tensor | None:
        """Return the mask of trained parameter i, if its zeros are to stay.

        Args:
            i: Number of the parameter in ``trained.parts``.

        Returns:
            bool [n], for this rank's part: True values are trained and must not become 0, the others stay 0. None:
            every value is trained, and may become 0.
        """
        return None

    @property
    def changed_names(self) -> list[str]:
        """Names of the targets or parameters that training may have changed."""
        return list(self.targets)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of a whole run."""
        return self.config.total_steps

    @property
    def target_names(self) -> list[str]:
        """Names of the targets, in order."""
        return list(self.targets)

    @property
    def backend(self) -> Backend:
        """Backend that holds the weights; known once the method is attached."""
        assert self._backend is not None, "not attached"
        return self._backend

    @property
    def trained(self) -> TrainedParameters:
        """The parameters that are trained, and their optimizer; known once the method is attached."""
        assert self._trained is not None, "not attached"
        return self._trained

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """One group, whose "lr" a schedule sets."""
        return self.trained.param_groups

    @property
    def trainable(self) -> int:
        """Number of values that are trained, in all ranks together."""
        return sum(part.numel for part in self.trained.parts)

    @property
    def density(self) -> float:
        """Trained values as a share of the targets' weights."""
        return self.trainable / sum(prod(shape) for shape in self.backend.shapes)

    def attach(self) -> None:
        """Check the weights and install what is trained. Collective. A second call does nothing.

        Raises:
            ValueError: The weights cannot be trained by this method; every rank raises the same.
        """
        if self._backend is not None:
            return
        backend = find_backend(self.model, self.targets, None)
        prepare_weights(backend)
        self._survey(backend)
        self._backend = backend
        self.model.requires_grad_(False)
        # The first values must be the same on every rank, and drawing them must not move the run's own generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.baseline.seed)
            parameters = self.install()
        self._trained = TrainedParameters(parameters, backend, self._adam)

    def _survey(self, backend: Backend) -> None:
        """Count and check the targets' weights. Collective."""
        masks, self.active_counts, self.fingerprints = survey(backend)
        sparsity = 1 - sum(self.active_counts) / sum(prod(shape) for shape in backend.shapes)
        if sparsity < LEAST_SPARSITY and not (self.allows_dense or self.config.seft.allow_dense):
            raise ValueError(
                f"the targets are dense ({sparsity:.2%} of their weights are 0), and method={self.name} is about "
                "keeping zeros: prune the model first (seft prune), choose method lora, or set seft.allow_dense"
            )
        self.check_pattern(backend, masks)

    def check_pattern(self, backend: Backend, masks: list[Tensor]) -> None:
        """Check that the model has the pattern that was named, if there is one. Collective.

        Masks stay as they are, so a pattern that was not named is not lost.
        """
        seft = self.config.seft
        check_pattern(backend, dataclasses.replace(seft, pattern=seft.known_pattern), masks)

    # No method needs to override it, so it is not abstract.
    def set_is_last_backward(self, is_last_backward: bool) -> None:  # noqa: B027
        """Do nothing: gradients are exchanged in ``step()``, or by FSDP2 in every backward pass."""

    def changes_topology(self, step: int) -> bool:
        """Tell whether masks or supports change in a step, which they never do here."""
        return False

    @torch.no_grad()
    def step(self) -> None:
        """Average the gradients over the ranks, clip them and update the trainable parameters. Collective.

        Raises:
            FloatingPointError: A gradient is not finite; nothing was changed.
        """
        grads = self.trained.grads()
        for i, grad in enumerate(grads):
            active = self.active_mask(i)
            if active is not None:
                grad.masked_fill_(~active, 0.0)
        self.grad_norm = self.trained.norm(grads, self.num_steps + 1)
        if self._max_grad_norm is not None:
            self.trained.clip_(grads, self.grad_norm, self._max_grad_norm)
        with self.backend.writing():
            self.trained.update(grads, self.active_mask)
        self.num_steps += 1

    def zero_grad(self) -> None:
        """Forget the gradients since the last step."""
        self.trained.zero_grad()

    def sparsity(self) -> list[LayerSparsity]:
        """Count the zeros of every target as its weights are now. Collective."""
        backend = self.backend
        backend.drop_gathered()  # shards, not gathered copies, are counted
        zeros = [count.zeros for count in count_zeros_over_ranks(backend)]
        numels = [prod(shape) for shape in backend.shapes]
        rows = zip(backend.names, numels, self.active_counts, zeros, strict=True)
        return [LayerSparsity(name, numel, target, numel - zero, zero, 0) for name, numel, target, zero in rows]

    def exact_zeros(self) -> AbstractContextManager[None]:
        """Do nothing: masks stay as they are, so nothing is on trial."""
        return nullcontext()

    def topology(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each target's positions of a support (none), and the packed mask of its weights, of its interval."""
        none = torch.empty(0, dtype=torch.int64, device=self.backend.device)
        for i in range(len(self.backend.names)):
            yield none, pack(self.backend.own(i) != 0)

    def states(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield this rank's trainable parameters and their moments, by the parameters' names."""
        for part in self.trained.parts:
            yield part.name, self.trained.state(part)

    def saver(self, folder: Path, keep: int) -> BackgroundSaver:
        """Make the object that writes this method's checkpoints."""
        return BaselineSaver(self, folder, keep)

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Go on from a checkpoint. Collective.

        Returns:
            The ``extra`` that was saved.

        Raises:
            DamagedError: A file is missing, cut or altered; nothing was changed.
            ValueError: It is of another model, method or format.
        """
        return load(self, checkpoint)

    def rewind(self, checkpoint: Path, source: Source) -> None:
        """Go back to an earlier checkpoint of the same run: it holds every value that training changes. Collective."""
        self.load(checkpoint)
