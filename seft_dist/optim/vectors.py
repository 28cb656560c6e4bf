"""Norms and biases that train beside the deltas (``train_norms``).

They are so few that every rank keeps all of them: values in fp32, and Adam moments. No engine knows that they are
trained. To FSDP2, DDP and DeepSpeed they are frozen like all other parameters, so they are sharded and gathered as
before, and their gradients go the way of the deltas' gradients:

    forward      the module gets a copy of the parameter, a leaf of its own in each forward pass
    backward     the leaf's gradient is added to this rank's fp32 sum
    step()       the sums of all ranks are averaged, every rank takes the same step of AdamW and stores its part
"""

import hashlib
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from seft_dist.backends import Backend
from seft_dist.backends.attachment import attachment_of
from seft_dist.backends.shards import is_sharded, store_whole, stored_part, whole_shape
from seft_dist.kernels.adamw import AdamW
from seft_dist.modules.kinds import Target
from seft_dist.modules.vectors import find_vectors
from seft_dist.optim.collectives import differing_ranks
from seft_dist.sparsity.partition import Partition

KEYS = ("values", "exp_avg", "exp_avg_sq")
"""Tensors of each vector's state, by their names in checkpoints."""
VectorStates = Mapping[str, Mapping[str, Tensor]]
"""The tensors of each vector by its name."""


class VectorSlot:
    """The gradient of one vector since the last step."""

    def __init__(self) -> None:
        self.armed = False
        """True once there is an optimizer that steps."""
        self.grad: Tensor | None = None
        """fp32 [n], sum over this rank's backward passes."""
        self.before_record: Callable[[], None] = _nothing
        """Called before each record."""

    def __deepcopy__(self, memo: object) -> "VectorSlot":
        """Return an empty slot, so that a copy of the model leaves no gradient with the optimizer of the original."""
        return VectorSlot()

    def watch(self, parameter: Tensor) -> Tensor:
        """Return a leaf with the parameter's values; a backward pass leaves its gradient in the slot.

        Args:
            parameter: [n], gathered.
        """
        if not self.armed:
            return parameter
        # A copy, since engines free or reuse the memory of what they have gathered
        leaf = parameter.detach().clone().requires_grad_()
        leaf.register_post_accumulate_grad_hook(self._record)
        return leaf

    def _record(self, leaf: Tensor) -> None:
        self.before_record()
        grad, leaf.grad = leaf.grad, None
        assert grad is not None
        self.grad = grad.float() if self.grad is None else self.grad.add_(grad.float())


class Vectors:
    """All trained norms and biases of a model; none if ``train_norms`` is off."""

    def __init__(self, model: nn.Module, targets: Mapping[str, Target], enabled: bool) -> None:
        """Make the modules record the gradients.

        Args:
            model: The model, before or after it is sharded.
            targets: Targets, whose forward methods read their biases from the attachment.
            enabled: False: there are no vectors.

        Raises:
            ValueError: It is enabled, and the model has no norms with parameters and no biases.
        """
        # Weights that the model computes with in fp32 among others of 16 bits stay as they are, as in the baselines
        dtype = next(iter(targets.values())).weight.dtype
        vectors = list(find_vectors(model).values()) if enabled else []
        self._vectors = [vector for vector in vectors if vector.parameter.dtype == dtype]
        if enabled and not self._vectors:
            raise ValueError(
                f"train_norms: {type(model).__name__} has no norms with parameters and no biases of its linears' type "
                f"({dtype}): set train_norms to false"
            )
        self.names = [vector.name for vector in self._vectors]
        self.lengths = [whole_shape(vector.parameter)[0] for vector in self._vectors]
        self.values = self.exp_avg = self.exp_avg_sq = torch.empty(0, dtype=torch.float32)
        """fp32 [n], all vectors one after another; the moments alike."""
        self._slots = [VectorSlot() for _ in self._vectors]
        self._backend: Backend | None = None
        target_modules = {target.module for target in targets.values()}
        others = {module for vector in self._vectors for module, _ in vector.uses} - target_modules
        for module in others:  # all before the first is changed
            _check_forward(module)
        for vector, slot in zip(self._vectors, self._slots, strict=True):
            for module, key in vector.uses:
                attachment_of(module).vectors[key] = slot.watch
                if module in others:  # targets get a forward method of ours anyway
                    module.forward = types.MethodType(_watched_forward, module)

    def __len__(self) -> int:
        """Return the number of trainable parameters."""
        return sum(self.lengths)

    def attach(self, backend: Backend) -> None:
        """Read the values from the model. Collective.

        Raises:
            ValueError: They are not finite, or not the same on every rank; every rank raises the same.
        """
        self._backend = backend
        if not self._vectors:
            return
        for slot in self._slots:
            slot.armed = True
        self.values = self._read(backend).to(backend.device)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.values), torch.zeros_like(self.values)
        # First whether ranks have the same values: then all of them find the same about these, and raise together
        digest = hashlib.sha256(self.values.cpu().numpy().tobytes()).digest()
        wrong = differing_ranks(backend.owners, backend.replicas, int.from_bytes(digest[:7], "little"))
        if wrong:
            raise ValueError(f"norms or biases on ranks {wrong} differ from the others': load the same model on all")
        for name, part in zip(self.names, self.values.split(self.lengths), strict=True):
            if not part.isfinite().all():
                raise ValueError(f"{name} has values that are not finite: the checkpoint is damaged")

    def _read(self, backend: Backend) -> Tensor:
        """Return the whole values, fp32. Collective."""
        parts = [stored_part(vector.parameter)[0].float() for vector in self._vectors]
        lengths = backend.owners.stack(torch.tensor([part.numel() for part in parts])).tolist()
        ranks = [
            flat.split(rank_lengths)
            for flat, rank_lengths in zip(backend.owners.gather(torch.cat(parts)), lengths, strict=True)
        ]
        return torch.cat(
            [
                torch.cat([rank[i] for rank in ranks]) if is_sharded(vector.parameter) else parts[i]
                for i, vector in enumerate(self._vectors)
            ]
        )

    def before_record(self, callback: Callable[[], None]) -> None:
        """Set what is called before each record of a gradient."""
        for slot in self._slots:
            slot.before_record = callback

    def forget(self) -> None:
        """Drop the gradients since the last step."""
        for slot in self._slots:
            slot.grad = None

    def take_grad(self) -> Tensor:
        """Average the gradients over all ranks, and forget them. Collective.

        Returns:
            fp32 [n], the same on every rank, summed in rank order.
        """
        assert self._backend is not None
        if not self._vectors:
            return self.values
        owners, device = self._backend.owners, self._backend.device
        grads = [
            torch.zeros(length, dtype=torch.float32, device=device) if slot.grad is None else slot.grad.to(device)
            for slot, length in zip(self._slots, self.lengths, strict=True)
        ]
        self.forget()
        sizes = Partition.even(len(self), owners.size).sizes()
        own = self._backend.replicas.sum(owners.sum_to_owners(torch.cat(grads), sizes))
        return torch.cat(owners.gather(own, sizes)).div_(self._backend.world_size)

    def names_without(self, grad: Tensor) -> list[str]:
        """List the vectors whose gradient is 0. Waits for the device.

        Args:
            grad: fp32 [n], what ``take_grad`` has returned: other ranks may have a gradient where this one has none.
        """
        parts = zip(self.names, grad.split(self.lengths), strict=True)
        return [name for name, part in parts if not part.any()]

    def update_(self, grad: Tensor, scale: Tensor, is_finite: Tensor, rule: AdamW, steps: int) -> None:
        """Take one step of AdamW and store the values in the model. Inside ``Backend.writing()``.

        Args:
            grad: fp32 [n], the same on every rank.
            scale: fp32 [], factor of the gradient (clipping).
            is_finite: bool [] on the device; False leaves every bit as it is.
            rule: AdamW with the rates of this step; nothing decays, as is usual for norms and biases.
            steps: Optimizer steps done before, in each of which all values were updated.
        """
        if self._vectors:
            base, age = torch.zeros_like(self.values), torch.full_like(self.values, steps, dtype=torch.int32)
            rule.update_(grad, scale, is_finite, base, self.values, [self.exp_avg, self.exp_avg_sq], age)
            self.store()

    def store(self) -> None:
        """Put the values into the model, in its type. Inside ``Backend.writing()``."""
        for vector, part in zip(self._vectors, self.values.split(self.lengths), strict=True):
            store_whole(vector.parameter, part)

    def states(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield each vector's state by its name: ``KEYS``, fp32 [n] (views)."""
        columns = {key: getattr(self, key).split(self.lengths) for key in KEYS}
        for i, name in enumerate(self.names):
            yield name, {key: column[i] for key, column in columns.items()}

    def check_state(self, state: VectorStates) -> None:
        """Check that training could have left such a state.

        Args:
            state: The tensors of each vector by its name.

        Raises:
            ValueError: Names the vector and what is needed.
        """
        for name, length in zip(self.names, self.lengths, strict=True):
            for key in KEYS:
                tensor = state.get(name, {}).get(key)
                if tensor is None:
                    raise ValueError(f"{name}.{key} is missing; needs it")
                if tensor.dtype != torch.float32 or tensor.shape != (length,):
                    raise ValueError(f"{name}.{key} is {tensor.dtype} {list(tensor.shape)}; needs fp32 [{length}]")
                if not tensor.isfinite().all() or (key == "exp_avg_sq" and bool((tensor < 0).any())):
                    raise ValueError(f"{name}.{key} has values that are not finite, or squares below 0")

    def restore(self, state: VectorStates) -> None:
        """Take over a checked state, and store the values in the model. Inside ``Backend.writing()``."""
        for name, columns in self.states():
            for key, column in columns.items():
                column.copy_(state[name][key])
        self.store()

    def uninstall(self) -> None:
        """Give the modules their own forward methods again."""
        for vector in self._vectors:
            for module, key in vector.uses:
                attachment_of(module).vectors.pop(key, None)
                if _is_bound(module):
                    del module.__dict__["forward"]


def _is_bound(module: nn.Module) -> bool:
    return getattr(module.__dict__.get("forward"), "__func__", None) is _watched_forward


def _check_forward(module: nn.Module) -> None:
    if "forward" in module.__dict__ and not _is_bound(module):
        raise ValueError(
            f"train_norms: a {type(module).__name__} has a forward method on the object itself, not of its class "
            "(hooks of accelerate, device_map?): load the model without it, or set train_norms to false"
        )


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a leaf cannot be made inside a graph
def _watched_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Compute what the class's forward method does, with watched parameters in place of the module's own."""
    forward = type(module).forward
    if not torch.is_grad_enabled():
        return forward(module, *args, **kwargs)
    own = module._parameters
    kept = {key: own[key] for key in attachment_of(module).vectors}
    try:
        own.update({key: watched(module, key) for key in kept})  # type: ignore[misc]
        return forward(module, *args, **kwargs)
    finally:
        own.update(kept)


def watched(module: nn.Module, key: str) -> Tensor | None:
    """Return a parameter of a module as it is or, if it is trained, a leaf that records its gradient."""
    parameter: Tensor | None = getattr(module, key)
    watch = attachment_of(module).vectors.get(key)
    return parameter if watch is None or parameter is None else watch(parameter)


def _nothing() -> None:
    pass
