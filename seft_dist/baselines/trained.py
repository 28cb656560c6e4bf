"""Trained parameters as this rank holds them, and torch's AdamW on them.

    parameter          sharded by FSDP2            held whole by every rank (also adapters beside sharded weights)
    part               this rank's rows            all of it
    gradient           FSDP2 has averaged it       averaged here
    fp32 values        the part itself, or a copy if the model's type is another

The fp32 values are what is updated and saved; the parameter holds them rounded to its own type.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seft_dist.backends import Backend
from seft_dist.backends.shards import is_sharded, stored_part, whole_shape
from seft_dist.optim.delta import least_size

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of the two moments in the state of torch's AdamW."""
_BUCKET_NUMEL = 1 << 22
"""Most values in a bucket: several parts that are averaged over the ranks in one call."""


@dataclass(frozen=True)
class ParameterPart:
    """This rank's part of one trained parameter."""

    name: str
    parameter: nn.Parameter
    numel: int
    """Number of values in the whole parameter."""
    start: int
    """Flat position of the first value in the whole."""
    held: Tensor
    """[n], the parameter's own memory."""
    values: Tensor
    """fp32 [n]; ``held`` itself if it is fp32."""
    is_sharded: bool

    @classmethod
    def of(cls, name: str, parameter: nn.Parameter) -> "ParameterPart":
        """Make the part of a parameter that this rank stores."""
        held, start = stored_part(parameter)
        numel = math.prod(whole_shape(parameter))
        return cls(name, parameter, numel, start, held, held.float(), is_sharded(parameter))

    def grad(self) -> Tensor:
        """Return the gradient since the last step, fp32 [n]: this rank's, or if sharded the mean over the ranks."""
        grad = self.parameter.grad
        return torch.zeros_like(self.values) if grad is None else stored_part(grad)[0].float()


class TrainedParameters:
    """The parameters that a method trains, with their optimizer."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], backend: Backend, adam: Mapping[str, Any]) -> None:
        """Args:
        parameters: Name to parameter; sharded ones as FSDP2 holds them between two steps. They get gradients from now
            on.
        backend: Knows the ranks.
        adam: ``lr``, ``betas``, ``eps`` and ``weight_decay``.
        """
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        self.parts = [ParameterPart.of(name, parameter) for name, parameter in parameters.items()]
        self._backend = backend
        self._adamw = torch.optim.AdamW([part.values for part in self.parts], **adam) if self.parts else None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """AdamW's, whose "lr" a schedule sets."""
        return self._adamw.param_groups if self._adamw is not None else [{"lr": 0.0}]

    def grads(self) -> list[Tensor]:
        """Return each part's gradient, averaged over the ranks, fp32 [n]. Collective."""
        grads = [part.grad() for part in self.parts]
        owners = self._backend.owners
        if owners.size == 1:
            return grads
        for bucket in self._buckets():
            mean = owners.sum(torch.cat([grads[i] for i in bucket])).div_(owners.size)
            for i, grad in zip(bucket, mean.split([grads[i].numel() for i in bucket]), strict=True):
                grads[i] = grad
        return grads

    def _buckets(self) -> Iterator[list[int]]:
        """Group the parts that are not sharded into buckets: lists of their numbers, many small parts or one large one.

        A bucket is copied while it is summed, so its size bounds the memory of that.
        """
        bucket: list[int] = []
        size = 0
        for i, part in enumerate(self.parts):
            if part.is_sharded:
                continue
            if bucket and size + part.values.numel() > _BUCKET_NUMEL:
                yield bucket
                bucket, size = [], 0
            bucket.append(i)
            size += part.values.numel()
        if bucket:
            yield bucket

    def norm(self, grads: list[Tensor], step: int) -> float:
        """Compute the global norm of the gradient, which waits for the device. Collective.

        Args:
            grads: The averaged gradients that ``grads`` returns.
            step: Step of the run, for the message.

        Raises:
            FloatingPointError: It is not finite; names the parameter, and is raised on every rank.
        """
        squares = torch.stack([torch.linalg.vector_norm(grad, dtype=torch.float64).square() for grad in grads])
        sharded = torch.tensor([part.is_sharded for part in self.parts], device=squares.device)
        squares = torch.where(sharded, self._backend.owners.sum(squares * sharded), squares)
        sums = squares.tolist()
        bad = [part.name for part, value in zip(self.parts, sums, strict=True) if not value < math.inf]
        if bad:
            raise FloatingPointError(
                f"step {step}: the gradient of {bad[0]} is not finite ({len(bad)} of {len(self.parts)} parameters); "
                "nothing was changed. Lower the learning rate, or look at this batch"
            )
        return math.sqrt(math.fsum(sums))

    def clip_(self, grads: list[Tensor], norm: float, max_norm: float) -> None:
        """Scale the gradients in place so that their global norm is at most ``max_norm``, as torch does it.

        Args:
            grads: The averaged gradients, fp32 [n] each.
            norm: Their global norm, over all ranks.
            max_norm: Largest norm that they may have.
        """
        for part, grad in zip(self.parts, grads, strict=True):
            part.values.grad = grad
        total = torch.tensor(norm, dtype=torch.float64)
        torch.nn.utils.clip_grads_with_norm_([part.values for part in self.parts], max_norm, total)

    def update(self, grads: list[Tensor], active_mask: Callable[[int], Tensor | None]) -> None:
        """Take one step of AdamW and write the new values into the parameters. Inside ``Backend.writing()``.

        Args:
            grads: Clipped gradients, fp32 [n] each.
            active_mask: ``Baseline.active_mask``, for the number of a part.
        """
        if self._adamw is None:
            return
        for part, grad in zip(self.parts, grads, strict=True):
            part.values.grad = grad
        self._adamw.step()
        for i, part in enumerate(self.parts):
            part.values.grad = None
            active = active_mask(i)
            if active is not None:
                keep_active_(part.values, active, part.held.dtype)
        self.publish()

    def publish(self) -> None:
        """Write the fp32 values into the parameters, in their own type. Inside ``Backend.writing()``.

        No active weight becomes 0 by that: ``keep_active_`` has seen to it.
        """
        for part in self.parts:
            if part.values is not part.held:
                part.held.copy_(part.values)

    def zero_grad(self) -> None:
        """Drop the gradients since the last step."""
        for part in self.parts:
            part.parameter.grad = None

    def state(self, part: ParameterPart) -> dict[str, Tensor]:
        """Return the values and AdamW's moments of a part, fp32 [n] each."""
        assert self._adamw is not None
        moments = self._adamw.state.get(part.values, {})
        return {"values": part.values} | {key: moments.get(key, torch.zeros_like(part.values)) for key in MOMENTS}

    def restore(self, part: ParameterPart, state: Mapping[str, Tensor], steps: int) -> None:
        """Load a part's values and moments after so many steps; call ``publish`` once after all parts."""
        assert self._adamw is not None
        part.values.copy_(state["values"])
        moments = {key: state[key].to(part.values.device) for key in MOMENTS}
        self._adamw.state[part.values] = {"step": torch.tensor(float(steps)), **moments}


def keep_active_(values: Tensor, active: Tensor, dtype: torch.dtype) -> None:
    """Keep active weights from becoming 0, in place: they would count as pruned.

    Args:
        values: The weights, fp32 of any shape.
        active: bool of the same shape, True for the active weights.
        dtype: Type that the weights will be held in.
    """
    least = torch.full((), least_size(dtype), dtype=values.dtype, device=values.device)
    lost = (values.abs() < least) & active
    # Not values[lost] = ...: indexing by a mask would wait for the device.
    values.copy_(torch.where(lost, torch.copysign(least, values), values))
