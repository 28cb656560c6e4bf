"""SEFT as a torch optimizer: the engine shards frozen weights, the optimizer owns the deltas.

The weights always hold base + delta, so the model is an ordinary Hugging Face model at every moment.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seft_dist.backends import Backend, find_backend
from seft_dist.backends.replicated import ReplicatedBackend
from seft_dist.config import SeftConfig
from seft_dist.optim.collectives import disagreeing
from seft_dist.optim.evolution import Evolution, EvolutionReport
from seft_dist.optim.linear import install, uninstall
from seft_dist.optim.setup import first_state, random_support
from seft_dist.optim.state import LayerDelta, LayerSparsity, State
from seft_dist.optim.targets import check_criteria, find_targets
from seft_dist.optim.window import Needs, Window, sampled, share_positions, take_kept
from seft_dist.sparsity.bitmask import unpack
from seft_dist.sparsity.schedule import drop_fraction, in_window, is_evolution

_NOT_IN_STATE_DICT = (
    "SEFT's masks and deltas are not in state_dict(), so neither in engine.save_checkpoint: save them with "
    "seft_dist.io.checkpoint.save(seft, folder, {}), for any number of ranks"
)
_CHECKED_LAYERS = 4
_CHECKED_POSITIONS = 64


class SeftOptimizer(torch.optim.Optimizer):
    """Fine-tunes a pruned model with sparse deltas whose positions evolve, at constant sparsity.

    Works on plain, DDP, FSDP2 and DeepSpeed ZeRO-0..3 models; the interface is that of any torch optimizer:

        seft = SeftOptimizer(model, SeftConfig(density=0.01, interval=60, steps=1000), lr=1e-3)
        fully_shard(model)                      # or deepspeed.initialize(model=model, optimizer=seft, ...), or nothing
        for batch in loader:
            model(**batch).loss.backward(); seft.step(); seft.zero_grad()

    All parameters of the model are frozen. Learning-rate schedulers drive ``param_groups[0]["lr"]``.
    """

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
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Patches the target linears; reads no weight yet. Local.

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

        Raises:
            ValueError: The targets' pattern matches nothing, or something that cannot carry deltas.
        """
        self.config = config or SeftConfig()
        self.max_grad_norm = max_grad_norm
        self.num_steps = 0
        self.grad_norm = 0.0
        self.evolution: EvolutionReport | None = None
        self._model, self._group = model, group
        self._targets = find_targets(model, self.config.targets)
        check_criteria(self._targets, self.config)
        model.requires_grad_(False)
        installed = {name: install(module) for name, module in self._targets.items()}
        self._slots = [slot for _, slot in installed.values()]
        self._backend: Backend | None = None
        self._state: State | None = None
        self._needs = Needs.of(self.config)
        self._write_checked = False
        super().__init__(
            [anchor for anchor, _ in installed.values()],
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
        )
        self._attach_hook = model.register_forward_pre_hook(self._attach_before_forward, prepend=True)

    @property
    def target_names(self) -> list[str]:
        """Module names of the targets, in order."""
        return list(self._targets)

    @property
    def backend(self) -> Backend:
        """What holds the weights; known once attached."""
        if self._backend is None:
            raise ValueError("the optimizer is not attached yet: run a forward pass with gradients, or call attach()")
        return self._backend

    @property
    def sparse_state(self) -> State:
        """Masks and deltas of this rank; known once attached."""
        assert self._state is not None, "not attached"
        return self._state

    def attach(self) -> None:
        """Find out who owns what, and check that the model fits the configuration. **Collective**, idempotent.

        Happens by itself at the first forward pass with gradients.

        Raises:
            ValueError: The model is dense, a layer cannot hold the density, weights are not finite or cannot be written
                safely as they are held, or ranks disagree on the configuration.
        """
        if self._backend is not None:
            return
        backend = find_backend(self._model, self._targets, self._group)
        self._agree_on_config(backend)
        if isinstance(backend, ReplicatedBackend):
            for i in range(len(backend.names)):
                backend.check_replicas(i)
        self._state = first_state(backend, self.config)
        self._backend = backend
        self._attach_hook.remove()
        if self.config.init == "random":
            random_support(backend, self.config, self._state)
        self._prepare_step()

    def _attach_before_forward(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self.attach()

    def _agree_on_config(self, backend: Backend) -> None:
        group = self.param_groups[0]
        told = repr((self.config, self.max_grad_norm, [group[key] for key in ("betas", "eps", "weight_decay")]))
        digest = int.from_bytes(hashlib.sha256(told.encode()).digest()[:7], "little")
        for ranks in (backend.owners, backend.replicas):
            wrong = disagreeing(ranks, torch.tensor([digest]))
            if wrong:
                raise ValueError(
                    f"ranks {wrong[0]} have another configuration than the rest: start all with the same; here {told}"
                )

    def _prepare_step(self) -> None:
        """Tell the slots what the coming step's backward must record. Local."""
        coming = self.num_steps + 1
        first = self._is_first(coming)
        for i, slot in enumerate(self._slots):
            slot.armed = True
            slot.forget()
            if not (first or in_window(self.config, coming)):
                slot.window = None
            elif slot.window is None:
                slot.window = self.new_window(i)
        for slot, support in zip(self._slots, sampled(self._windows(), self.sparse_state.supports), strict=True):
            slot.support = None if first else support

    def new_window(self, i: int) -> Window:
        """An empty window of target i for the coming step. Local."""
        # The first support's gradient is read from its window, whatever the criteria need.
        first = self._is_first(self.num_steps + 1)
        return Window(self.backend, i, self._needs.of_first_support() if first else self._needs)

    def _is_first(self, step: int) -> bool:
        return step == 1 and self.config.init == "gradient"

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients since the last step, also those of a window. Local."""
        super().zero_grad(set_to_none)
        for slot in self._slots:
            slot.forget()
            if slot.window is not None:
                slot.window.discard()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Reduce, clip, update, write through, and evolve when due. **Collective**.

        Does nothing before the first backward pass. The gradients are used up: a second call without a backward pass in
        between does nothing either.

        Raises:
            FloatingPointError: A gradient is not finite; names the layer, nothing was changed. ``zero_grad()`` and go on,
                or stop.
            RuntimeError: A write is not seen by the model, or ranks disagree on masks or supports.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.evolution = None
        if self._backend is None or not any(slot.touched for slot in self._slots):
            return loss
        step = self.num_steps + 1
        grad = take_kept(self._windows(), self._reduced_grad(), list(self.sparse_state.layers()))
        self._refuse_non_finite(grad)
        windows = [window for window in self._windows() if window is not None]
        for window in windows:
            window.fold()
        with self.backend.writing():
            if self._is_first(step):
                self.evolution = self._evolve(windows, step, fraction=0.0, first=True)
                grad = self._grad_of_first_support(windows)
            self._update(grad)
            self.num_steps = step
            if is_evolution(self.config, step):
                self.evolution = self._evolve(windows, step, drop_fraction(self.config, step), first=False)
            elif in_window(self.config, step) and windows[0].narrows:
                Evolution(self.backend, self.config, self.sparse_state, windows, step).keep_candidates()
        if is_evolution(self.config, step) or not in_window(self.config, step):
            for slot in self._slots:
                slot.window = None
        if not self._write_checked:
            self._check_write()
        self._prepare_step()
        return loss

    def _reduced_grad(self) -> Tensor:
        """Gradient at the own sampled positions, averaged over ranks, fp32 [own]. **Collective**; all layers in one call."""
        backend, supports = self.backend, sampled(self._windows(), self.sparse_state.supports)
        device = backend.device
        per_layer = [
            (slot.grad if slot.grad is not None else torch.zeros(len(support), device=device)).split(support.sizes)
            for slot, support in zip(self._slots, supports, strict=True)
        ]
        sizes = [sum(support.sizes[rank] for support in supports) for rank in range(backend.owners.size)]
        flat = torch.cat([part[rank] for rank in range(backend.owners.size) for part in per_layer])
        own = backend.owners.sum_to_owners(flat, sizes)
        return (backend.replicas.sum(own) / backend.world_size).to(device)

    def _windows(self) -> list[Window | None]:
        return [slot.window for slot in self._slots]

    def _squared_norms(self, grad: Tensor) -> Tensor:
        """Squared gradient norm of each target over all ranks, fp64 [targets]. **Collective**."""
        parts = grad.split(self.sparse_state.lengths)
        squared = torch.stack([part.double().square().sum() for part in parts])
        return self.backend.owners.sum(squared)

    def _refuse_non_finite(self, grad: Tensor) -> None:
        squared = self._squared_norms(grad)
        bad = torch.stack(
            [window.is_finite().logical_not().cpu() if window else torch.tensor(False) for window in self._windows()]
        )
        wrong = self.backend.owners.sum(bad.double()).bool() | torch.isfinite(squared).logical_not().cpu()
        if wrong.any():
            names = [name for name, is_wrong in zip(self.target_names, wrong.tolist(), strict=True) if is_wrong]
            raise FloatingPointError(
                f"step {self.num_steps + 1}: the gradient of {names[0]} is not finite ({len(names)} of {len(wrong)} layers); "
                "nothing was changed. Lower the learning rate, or look at this batch"
            )

    def _evolve(self, windows: list[Window], step: int, fraction: float, first: bool) -> EvolutionReport:
        evolution = Evolution(self.backend, self.config, self.sparse_state, windows, step)
        return evolution.run(fraction, self.param_groups[0]["betas"], first)

    def _grad_of_first_support(self, windows: list[Window]) -> Tensor:
        """The very first step's gradient at the support that was chosen by it, fp32 [own]. Local."""
        parts = []
        for i, entries in enumerate(self.sparse_state.layers()):
            parts.append(windows[i].at(entries.indices.long() - self.backend.interval(i).start))
        return torch.cat(parts)

    def _update(self, grad: Tensor) -> None:
        norm = float(self._squared_norms(grad).sum().sqrt())
        self.grad_norm = norm
        if self.max_grad_norm is not None:
            grad = grad * min(1.0, self.max_grad_norm / (norm + 1e-6))
        self.sparse_state.columns.adamw_(grad, self.param_groups[0], self.config.decay == "weight")
        self._write()

    def _write(self) -> None:
        """weight = cast(base + delta) at the support. **Collective** for replicated weights, else local."""
        backend, state = self.backend, self.sparse_state
        new = state.columns.weight().to(backend.dtypes[0])
        if not backend.replicates:
            for i, (values, places) in enumerate(zip(new.split(state.lengths), state.places, strict=True)):
                backend.store(i, places, values)
            return
        pieces = [
            part.split([support.sizes[rank] for support in state.supports])
            for rank, part in enumerate(backend.owners.gather(new))
        ]
        for i, support in enumerate(state.supports):
            backend.store(i, backend.places(i, support.positions()), torch.cat([piece[i] for piece in pieces]))

    def _check_write(self) -> None:
        """Refuse to go on if the model does not see what was written. **Collective**, once a run."""
        self._write_checked = True
        backend, count = self.backend, len(self._slots)
        smallest = min(range(count), key=lambda i: backend.partitions[i].numel)
        layers = sorted({0, smallest, count // 2, count - 1})[:_CHECKED_LAYERS]
        entries = list(self.sparse_state.layers())
        wrong = torch.zeros(len(layers), dtype=torch.int64)
        for row, i in enumerate(layers):
            some = entries[i].take(slice(0, _CHECKED_POSITIONS))
            seen = backend.read(i, some.indices.long()).to(some.base.device)
            wrong[row] = int((seen != some.weight().to(seen.dtype)).sum())
        ranks = backend.owners.stack(wrong).sum(1).nonzero().view(-1).tolist()
        if ranks:
            raise RuntimeError(
                f"the model does not see the updates of its weights (ranks {ranks}, e.g. {backend.names[layers[0]]}): a gathered "
                "copy hides the shard. Report how the model was sharded; nothing trained from here would be right"
            )

    def sparsity(self) -> list[LayerSparsity]:
        """Counts of every target: wanted, active, zeros, deltas. **Collective**."""
        return self.sparse_state.sparsity(self.backend)

    def deltas(self) -> Iterator[LayerDelta]:
        """This rank's masks and deltas, target by target. Local."""
        backend, state = self.backend, self.sparse_state
        backend.prepare_write()
        for i, entries in enumerate(state.layers()):
            interval = backend.interval(i)
            committed = state.committed[i]
            yield LayerDelta(
                name=backend.names[i],
                shape=backend.shapes[i],
                interval=interval,
                mask=state.masks[i],
                target=state.targets[i],
                columns=entries,
                committed=committed,
                committed_values=backend.load(i, backend.places(i, committed)),
                window=self._slots[i].window,
            )

    def restore(self, num_steps: int, layers: Iterable[LayerDelta]) -> None:
        """Take over masks and deltas, e.g. from a checkpoint, on the model as it was when the run began. **Collective**.

        Args:
            num_steps: Optimizer steps done.
            layers: This rank's part of every target, in order; only one is held at a time.

        Raises:
            RuntimeError: What was given breaks a promise about masks or supports.
        """
        self.attach()
        backend, state = self.backend, self.sparse_state
        entries = []
        with backend.writing():
            for i, layer in enumerate(layers):
                own, start = backend.own(i).clone(), layer.interval.start
                assert (layer.name, layer.interval) == (backend.names[i], backend.interval(i))
                own[layer.committed.long() - start] = layer.committed_values.to(own)
                own.masked_fill_(~unpack(layer.mask, len(layer.interval)), 0)
                own[layer.columns.indices.long() - start] = layer.columns.weight().to(own.dtype)
                backend.put_own(i, own, layer.mask)
                state.masks[i], state.targets[i], state.committed[i] = layer.mask, layer.target, layer.committed
                self._slots[i].window = layer.window
                entries.append(layer.columns)
            backend.settle()
            state.set_entries(backend, entries)
        share_positions(backend, self._windows())
        state.verify(backend, self.config)
        self.num_steps = num_steps
        self._prepare_step()

    def state_dict(self) -> dict[str, Any]:
        """The param group and the number of steps only; masks and deltas go into ``seft_dist.io.checkpoint``. Local.

        A rank's part of them is of no use on another number of ranks, and many savers keep rank 0's dict alone.
        """
        if self.num_steps:
            warnings.warn(_NOT_IN_STATE_DICT, stacklevel=2)
        return super().state_dict() | {"seft_steps": self.num_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the param group. Local.

        Raises:
            ValueError: It is of another step than the masks and deltas that are here.
        """
        steps = state_dict.get("seft_steps", 0)
        if steps != self.num_steps:
            raise ValueError(
                f"this optimizer has done {self.num_steps} steps, the state_dict is of step {steps}. {_NOT_IN_STATE_DICT}, and "
                "load them with seft_dist.io.checkpoint.load(seft, checkpoint) before anything that calls load_state_dict"
            )
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "seft_steps"})

    def detach(self) -> None:
        """Give the model back as plain modules, with the trained weights; the optimizer is of no use afterwards. Local."""
        self._attach_hook.remove()
        for module in self._targets.values():
            uninstall(module)
