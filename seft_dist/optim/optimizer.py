"""SEFT as a torch optimizer: the engine shards frozen weights, the optimizer owns the deltas.

The weights always hold base + delta, so the model is an ordinary Hugging Face model at every moment.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from seft_dist.backends import Backend, find_backend
from seft_dist.backends.group import ProcessGroup
from seft_dist.config import SeftConfig, check_adam
from seft_dist.kernels.adamw import AdamW
from seft_dist.modules.trainable import check_dtypes_unchanged, check_is_model, check_loaded
from seft_dist.optim import notices
from seft_dist.optim.anchors import BackwardWatch
from seft_dist.optim.delta import least_size
from seft_dist.optim.evolution import Evolution
from seft_dist.optim.exchange import Exchange
from seft_dist.optim.gradient_check import GradientCheck, check_gradient
from seft_dist.optim.install import checked_targets, install, uninstall
from seft_dist.optim.replaced import ReplacementCheck
from seft_dist.optim.report import EvolutionReport, ReportDraft
from seft_dist.optim.restoring import take_over
from seft_dist.optim.setup import agree_on_config, check_write, first_state, prepare_weights, random_support
from seft_dist.optim.state import LayerDelta, LayerSparsity, State
from seft_dist.optim.swap import Parent
from seft_dist.optim.torch_interface import TorchInterface
from seft_dist.optim.vectors import Vectors, VectorStates
from seft_dist.optim.window import (
    Needs,
    Window,
    gradient_at_entries,
    sampled_positions,
    share_positions,
    split_candidate_gradients,
)
from seft_dist.sparsity.schedule import drop_fraction, in_window, is_evolution, is_first_support


class SeftOptimizer(TorchInterface):
    """Fine-tunes a pruned model with sparse deltas whose positions evolve, at constant sparsity.

    Works on plain, DDP, FSDP2 and DeepSpeed ZeRO-0..3 models; the interface is that of any torch optimizer::

        seft = SeftOptimizer(model, SeftConfig(density=0.01, interval=60, steps=1000), lr=1e-3)
        fully_shard(model)                      # or deepspeed.initialize(model=model, optimizer=seft, ...), or nothing
        for batch in loader:
            model(**batch).loss.backward(); seft.step(); seft.zero_grad()

    All parameters of the model are frozen; ``train_norms`` trains norms and biases all the same. Learning-rate
    schedulers drive ``param_groups[0]["lr"]``.
    """

    evolution: EvolutionReport | None = None
    """Report of the last step's evolution; None if it had none."""
    counts_near_ties: bool = False
    """True lets evolutions count near-ties (``EvolutionReport.near_ties``), in further passes over the scores."""

    def __init__(
        self,
        model: nn.Module,
        config: SeftConfig | None = None,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        group: ProcessGroup | None = None,
        parent: Parent | None = None,
    ) -> None:
        """Patch the target linears. No weight is read yet.

        Args:
            model: The pruned model, before or after ``fully_shard``, before DDP or ``deepspeed.initialize``.
            config: The method; None for the defaults.
            lr: Learning rate.
            betas: Decay rates of the Adam moments.
            eps: Added to the root of the second moment.
            weight_decay: Decoupled weight decay (see ``SeftConfig.decay``).
            max_grad_norm: Largest global norm of the deltas' gradient; None for no clipping.
            group: Data-parallel ranks that share this model's weights unsharded; None for all ranks. Sharded weights
                name their own group.
            parent: Model before it was pruned, for ``swap_fraction`` (``seft_dist.ParentModel.open``).

        Raises:
            TypeError: ``model`` is no module, e.g. ``model.parameters()``, or ``config`` is no ``SeftConfig``.
            ValueError: The pattern of the targets matches nothing, or something that cannot be trained, or there is a
                parent without ``swap_fraction``, or the other way round.
        """
        check_is_model(model, config)
        check_adam(lr, betas, eps, weight_decay, max_grad_norm)
        self.config = config or SeftConfig()
        self.max_grad_norm = max_grad_norm
        self._model, self._group, self._parent = model, group, parent
        self._targets = checked_targets(model, self.config, parent)
        self._frozen = notices.frozen_targets(self._targets)
        self.vectors = Vectors(model, self._targets, self.config.train_norms)
        """Norms and biases that train beside the deltas; none unless ``train_norms`` is set."""
        model.requires_grad_(False)
        installed = list(map(install, self._targets.values()))
        self._slots = [slot for _, slot in installed]
        self._windows: list[Window | None] = [None] * len(installed)
        self._draft = ReportDraft()
        self._backend: Backend | None = None
        self._state: State | None = None
        self._needs = Needs.of(self.config)
        self._write_checked = False
        self._exchange: Exchange | None = None
        self._grad_norm = torch.zeros((), dtype=torch.float32)
        self._checks_late = False  # True: step() does not wait for the device to know whether the gradient is finite
        self._last_check: GradientCheck | None = None
        self._replacement_check = ReplacementCheck(model, self._targets)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__([anchor for anchor, _ in installed], defaults)
        # No method of this object: a deep copy of the model would copy the optimizer
        attach = torch.compiler.disable(lambda called, _: self._attach_to(called))
        self._attach_hook = model.register_forward_pre_hook(attach, prepend=True)

    @property
    def target_names(self) -> list[str]:
        """Names of the targets, in order."""
        return list(self._targets)

    @property
    def backend(self) -> Backend:
        """Backend that holds the weights; known once attached."""
        if self._backend is None:
            raise ValueError("the optimizer is not attached yet: run a forward pass with gradients, or call attach()")
        return self._backend

    @property
    def exchange(self) -> Exchange:
        """Exchange that brings gradients to their owners; known once attached."""
        assert self._exchange is not None, "not attached"
        return self._exchange

    @property
    def sparse_state(self) -> State:
        """Masks and deltas of this rank; known once attached."""
        assert self._state is not None, "not attached"
        return self._state

    @property
    def grad_norm(self) -> float:
        """Global norm of the last step's gradient before clipping. Waits for the device."""
        return float(self._grad_norm)

    def attach(self) -> None:
        """Divide the weights among their owners, and check that the model fits the configuration. Collective.

        The first forward pass with gradients does this by itself. A second call does nothing.

        Raises:
            ValueError: The model is dense or has fewer active weights than the density asks for, weights are not finite
                or cannot be written safely as they are held, or ranks disagree on the configuration.
        """
        if self._backend is not None:
            return
        check_loaded(self._model, self._targets)
        self.config.check_trials_end()
        backend = find_backend(self._model, self._targets, self._group)
        update = [self.param_groups[0][key] for key in ("betas", "eps", "weight_decay")]
        agree_on_config(backend, repr((self.config, self.max_grad_norm, update)))
        prepare_weights(backend)
        self._state = first_state(backend, self.config)
        # first_state has looked for a pattern
        self.config = dataclasses.replace(self.config, pattern=self.config.known_pattern)
        self.vectors.attach(backend)
        self._backend, self._exchange = backend, Exchange(backend, self._slots)
        targets, params = list(self._targets.values()), lambda: self.param_groups[0]["params"]
        self._watch = BackwardWatch(backend, targets, self._slots, params, self.zero_grad)
        self.vectors.before_record(self._watch.before_record)
        self._checks_late = backend.device.type != "cpu"
        self._attach_hook.remove()
        if self.config.init == "random":
            random_support(backend, self.config, self._state)
        notices.warn_at_start(backend, self.config, self._state, self._frozen, self._parent)
        self._prepare_step()

    def _attach_to(self, called: nn.Module) -> None:
        """Attach before the first forward pass with gradients, of the model itself and of no copy."""
        if called is self._model and torch.is_grad_enabled():
            self._check_awaited()
            self.attach()

    def _prepare_step(self) -> None:
        """Set what the coming step's backward passes record."""
        coming = self.num_steps + 1
        first = is_first_support(self.config, coming)
        if first or in_window(self.config, coming):
            self._windows = [
                self.new_window(i, coming) if window is None else window for i, window in enumerate(self._windows)
            ]
        else:
            self._close_windows()
        supports = sampled_positions(self._windows, self.sparse_state.supports)
        for slot, support, window in zip(self._slots, supports, self._windows, strict=True):
            slot.prepare(None if first else support, window)
        self.exchange.prepare(supports)

    def _close_windows(self) -> None:
        self._windows, self._draft = [None] * len(self._slots), ReportDraft()

    def new_window(self, i: int, step: int) -> Window:
        """Make an empty window of target i that begins in an optimizer step."""
        first = is_first_support(self.config, step)
        return Window(self.backend, i, self._needs.of_first_support() if first else self._needs, self._draft)

    def set_is_last_backward(self, is_last_backward: bool) -> None:
        """Set before a backward pass whether it is the last one before ``step()``. The same on every rank.

        During the last one, gradients leave for their owners while it still runs; without this call all of them leave
        in ``step()``. With gradient accumulation, pass True before the last micro-batch only.

        Args:
            is_last_backward: As for FSDP2's method of this name; holds for one step.
        """
        if self._exchange is not None:
            self._exchange.set_last(is_last_backward)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients since the last step, also those in a window."""
        super().zero_grad(set_to_none)
        self.vectors.forget()
        if self._exchange is not None:
            self._exchange.forget()
        for slot in self._slots:
            slot.forget()
        for window in self._windows:
            if window is not None:
                window.discard_step()

    def _begin_step(self) -> None:
        self._check_awaited()
        self.backend.drop_gathered()  # FSDP2 may have gathered the weights in the type that it computes with
        check_dtypes_unchanged(self._targets, self.backend.dtypes)
        self._watch.check_step(self.max_grad_norm, self.is_managed, may_wait=not self._checks_late)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Reduce, clip, update, write through, and evolve when due. Collective.

        Does nothing before the first backward pass. The gradients are used up: a second call without a backward pass in
        between does nothing either.

        Raises:
            FloatingPointError: A gradient is not finite; names the layer, nothing was changed. ``zero_grad()`` and go
                on, or stop. On a GPU, outside of windows, it is raised by the next call (see ``check_last_step``).
            RuntimeError: A write is not seen by the model, or ranks disagree on masks or supports.
        """
        loss = None if closure is None else torch.enable_grad()(closure)()
        self.evolution = None
        self.check_last_step()
        if self._backend is not None:
            self._watch.look(may_wait=not self._checks_late)
        if self._backend is None or not any(slot.touched for slot in self._slots):
            self._note_idle_step()
            return loss
        self._begin_step()
        # The order of what follows is part of the method:
        #   1. Gradients arrive at their owners, and are checked before anything is changed by them.
        #   2. Windows count the step, so that an evolution at its end sees its gradient.
        #   3. The first support is chosen by the gradient of the very step that then trains it.
        #   4. Deltas are updated and written into the weights.
        #   5. The evolution comes after the update: Drop compares deltas as the next forward pass will see them.
        #   6. The slots learn the positions of the coming step last, when the support no longer moves.
        step, first = self.num_steps + 1, is_first_support(self.config, self.num_steps + 1)
        grad = split_candidate_gradients(self._windows, self.exchange.finish(), self.sparse_state.layers())
        vector_grad = self.vectors.take_grad()
        windows = [window for window in self._windows if window is not None]
        check = self._check_gradient(step, grad, vector_grad)
        if windows or not self._checks_late:
            check.raise_if_nonfinite(self.target_names + self.vectors.names)
        else:
            self._last_check = check
        for window in windows:
            window.accumulate_step()
        with self.backend.writing():
            if windows or not self._checks_late:  # the host waits for the device only where it does anyway
                self._replacement_check.check(self.backend, self.sparse_state, step, with_masks=bool(windows))
            if first:
                self.evolution = self._evolve(windows, step, fraction=0.0, first=True)
                grad = gradient_at_entries(windows, self.sparse_state.layers())
                check = self._check_gradient(step, grad, vector_grad)
            self._update(grad, vector_grad, check)
            self.num_steps = step
            if is_evolution(self.config, step):
                self.evolution = self._evolve(windows, step, drop_fraction(self.config, step), first=False)
            elif in_window(self.config, step) and windows[0].narrows:
                self._new_evolution(windows, step).keep_candidates()
        if is_evolution(self.config, step) or not in_window(self.config, step):
            self._close_windows()
        if not self._write_checked:
            check_write(self.backend, self.sparse_state)
            notices.warn_without_gradient(self.backend, self.config, self.sparse_state, check, first)
            notices.warn_of_untrained_vectors(self.backend, self.vectors.names_without(vector_grad))
            self._write_checked = True
        self._prepare_step()
        return loss

    def check_last_step(self) -> None:
        """Wait until it is known whether the last step's gradient was finite, and raise if it was not.

        On a CPU, and in every step of a window, ``step()`` has done so itself. Otherwise the device decides whether it
        updates, and the host learns of it here: at the latest when the next step begins.

        Raises:
            FloatingPointError: The last step's gradient was not finite; it changed nothing and does not count.
        """
        check, self._last_check = self._last_check, None
        if check is not None and not check.passed:
            self.num_steps -= 1
            self.zero_grad()
            self._prepare_step()
            check.raise_if_nonfinite(self.target_names + self.vectors.names)

    def _check_gradient(self, step: int, grad: Tensor, vector_grad: Tensor) -> GradientCheck:
        parts, vectors = grad.split(self.sparse_state.lengths), vector_grad.split(self.vectors.lengths)
        return check_gradient(self.backend, step, parts, self._windows, vectors)

    def _new_evolution(self, windows: list[Window], step: int) -> Evolution:
        inputs = (self.backend, self.config, self.sparse_state, windows, self._draft)
        return Evolution(*inputs, step=step, counts_near_ties=self.counts_near_ties, parent=self._parent)

    def _evolve(self, windows: list[Window], step: int, fraction: float, first: bool) -> EvolutionReport:
        return self._new_evolution(windows, step).run(fraction, self.param_groups[0]["betas"], first)

    def _update(self, grad: Tensor, vector_grad: Tensor, check: GradientCheck) -> None:
        self._grad_norm = check.norm
        scale = check.clipping_factor(self.max_grad_norm)
        oldest = self.num_steps + self.config.window  # moments that were seeded are as old as their window
        rule = AdamW.of_group(self.param_groups[0], self.config.decay == "weight", oldest)
        least = least_size(self.backend.dtypes[0])
        weight = self.sparse_state.columns.update_(grad, scale, check.is_finite, rule, least)
        self.sparse_state.write_weights(self.backend, weight)
        no_decay = dataclasses.replace(rule, weight_decay=0.0)
        self.vectors.update_(vector_grad, scale, check.is_finite, no_decay, self.num_steps)

    def sparsity(self) -> list[LayerSparsity]:
        """Count what is wanted, active, zero and trained in every target. Collective."""
        self.check_last_step()
        return self.sparse_state.sparsity(self.backend)

    def exact_zeros(self) -> AbstractContextManager[None]:
        """Make exactly the active weights that are not on trial differ from 0 inside the context. Collective.

        So the number of zeros is exact. Those that an evolution has reactivated in this step are the smallest normal
        number there. For exports and evaluations; do not train inside it.
        """
        self.check_last_step()
        return self.sparse_state.exact_zeros(self.backend)

    def deltas(self) -> Iterator[LayerDelta]:
        """Return this rank's masks and deltas, target by target."""
        self.check_last_step()
        self.backend.drop_gathered()
        return self.sparse_state.layer_deltas(self.backend, self._windows)

    def restore(self, num_steps: int, layers: Iterable[LayerDelta], vectors: VectorStates | None = None) -> None:
        """Take over masks and deltas, e.g. from a checkpoint, on the model as it was when the run began. Collective.

        Args:
            num_steps: Optimizer steps done.
            layers: This rank's part of every target, in order.
            vectors: ``Vectors.states`` of the same moment, the same on every rank; None if there are no vectors.

        Raises:
            ValueError: The layers or vectors are no state of this run: out of bounds, out of order, not finite, of
                other shapes or counts. Names the target; every rank raises it, nothing was changed.
            RuntimeError: The layers break a promise about masks or supports.
        """
        self.attach()
        self._last_check = None  # of a step that is undone
        backend, state, given = self.backend, self.sparse_state, list(layers)
        self.vectors.check_state(vectors or {})
        take_over(given, backend, self.config, state, num_steps)
        with backend.writing():
            self.vectors.restore(vectors or {})
        self._windows = [layer.window for layer in given]
        share_positions(backend, self._windows)
        state.verify(backend, self.config)
        self.num_steps = num_steps
        self._prepare_step()

    def detach(self) -> None:
        """Turn the model back into plain modules with the trained weights. The optimizer is of no use afterwards."""
        self._attach_hook.remove()
        for target in self._targets.values():
            uninstall(target)
        self.vectors.uninstall()
