"""The few collectives that everything else is made of, on one process or many, with a count of the bytes sent.

Sums that go to owners (``sum_to_owners``) are made in rank order from the ranks' own terms, so they have the same bits
whatever algorithm the communication library chooses; ``sum`` leaves the order to the library.
"""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup as ProcessGroup  # subpackages that may not import the library take it here
from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


def all_gather_single(
    output: Tensor, tensor: Tensor, group: dist.ProcessGroup | None = None, async_op: bool = False
) -> dist.Work | None:
    """Gather equally large tensors into one, by the name that this torch has for it. Collective.

    Args:
        output: Receives the ranks' values, in rank order; as many times larger as there are ranks.
        tensor: This rank's values.
        group: The ranks; None: all.
        async_op: True: return at once.

    Returns:
        What to wait for, if ``async_op``.
    """
    newer = getattr(dist, "all_gather_single", None)  # since torch 2.13, which warns of the older name
    gather = dist.all_gather_into_tensor if newer is None else newer
    work: dist.Work | None = gather(output, tensor, group=group, async_op=async_op)
    return work


class Group:
    """Ranks that act together; ``None`` is one process alone, which calls no library.

    Every method that is not a property is Collective: all ranks of the group must enter it, in the same order, also
    with nothing to send. Bytes are counted as a ring would send them.
    """

    def __init__(self, group: dist.ProcessGroup | None, counted_with: "Group | None" = None) -> None:
        """Args:
        group: The ranks.
        counted_with: A group with which this one shares the count of bytes.
        """
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self._sent: list[int] = [0] if counted_with is None else counted_with._sent
        # NCCL moves device tensors only (never run here); offloaded shards are staged through the device.
        self._nccl = group is not None and dist.get_backend(group) == "nccl"
        # gloo does not have every collective for device tensors: they are staged through the host.
        self._gloo = group is not None and dist.get_backend(group) == "gloo"

    @property
    def bytes_sent(self) -> int:
        """Bytes this rank has sent so far."""
        return self._sent[0]

    def _stage(self, tensor: Tensor) -> Tensor:
        if self._gloo and tensor.device.type != "cpu":
            return tensor.cpu()
        return tensor.cuda() if self._nccl and tensor.device.type == "cpu" else tensor.contiguous()

    def _reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        if self.group is not None:
            staged = self._stage(tensor)
            dist.all_reduce(staged, op=op, group=self.group)
            self._sent[0] += 2 * tensor.numel() * tensor.element_size() * (self.size - 1) // self.size
            if staged is not tensor:
                tensor.copy_(staged)
        return tensor

    def sum(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over the ranks, in place; every rank gets the same bits."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def max(self, tensor: Tensor) -> Tensor:
        """Take the largest value over the ranks, elementwise and in place."""
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def stack(self, tensor: Tensor) -> Tensor:
        """Gather equally shaped tensors.

        Args:
            tensor: Any shape, the same on every rank.

        Returns:
            [size, *shape], in rank order.
        """
        if self.group is None:
            return tensor.unsqueeze(0)
        staged = self._stage(tensor)
        out = torch.empty((self.size * tensor.numel(),), dtype=tensor.dtype, device=staged.device)
        all_gather_single(out, staged.view(-1), group=self.group)
        self._sent[0] += tensor.numel() * tensor.element_size() * (self.size - 1)
        return out.view(self.size, *tensor.shape).to(tensor.device)

    def gather(self, tensor: Tensor, lengths: list[int] | None = None) -> list[Tensor]:
        """Gather one-dimensional tensors of different lengths.

        Args:
            tensor: [n], n of each rank's own.
            lengths: Every rank's n, the same list on every rank. None: ranks are asked, for which the host waits.

        Returns:
            Every rank's tensor, in rank order.
        """
        assert tensor.dim() == 1
        if self.group is None:
            return [tensor]
        if lengths is None:
            lengths = self.stack(torch.tensor([tensor.numel()], device=tensor.device)).view(-1).tolist()
        # Padded to the longest: an uneven all-gather does not exist everywhere.
        padded = tensor.new_zeros(max(lengths))
        padded[: tensor.numel()] = tensor
        return [row[:length] for row, length in zip(self.stack(padded), lengths, strict=True)]

    def gather_objects(self, item: T) -> list[T]:
        """Gather one picklable object from each rank, in rank order; their bytes are not counted."""
        if self.group is None:
            return [item]
        items = [item] * self.size
        dist.all_gather_object(items, item, group=self.group)
        return items

    def twin(self) -> "Group":
        """Make a group of the same ranks with a queue of its own, whose calls may come between those of this group."""
        if self.group is None:
            return self
        ranks = dist.get_process_group_ranks(self.group)
        return Group(dist.new_group(ranks, use_local_synchronization=True), counted_with=self)

    def start_sum_to_owners(self, tensor: Tensor, sizes: list[int]) -> "Sum":
        """Begin to add a vector up over the ranks; each rank keeps its own segment.

        Args:
            tensor: fp32 [sum(sizes)], segments in rank order; unchanged until waited for.
            sizes: Length of each rank's segment, the same list on every rank.

        Returns:
            What gives fp32 [sizes[rank]], summed in rank order.
        """
        assert tensor.numel() == sum(sizes)
        if self.group is None:
            return Sum(tensor, tensor, 1, tensor.device, None)
        staged = self._stage(tensor)
        own = sizes[self.rank]
        terms = torch.empty(self.size * own, dtype=tensor.dtype, device=staged.device)
        work = dist.all_to_all_single(terms, staged, [own] * self.size, sizes, group=self.group, async_op=True)
        self._sent[0] += (tensor.numel() - own) * tensor.element_size()
        return Sum(staged, terms, self.size, tensor.device, work)

    def sum_to_owners(self, tensor: Tensor, sizes: list[int]) -> Tensor:
        """Add a vector up over the ranks as ``start_sum_to_owners`` does, and wait for it."""
        return self.start_sum_to_owners(tensor, sizes).wait()


def shard_groups(mesh: DeviceMesh) -> tuple[Group, Group]:
    """Return the ranks that divide weights among themselves (owners), and those that hold the same part (replicas).

    Args:
        mesh: [shards], or [replicas, shards] for hybrid sharding (HSDP).
    """
    axis = mesh.ndim - 1
    owners = Group(mesh.get_group(axis) if mesh.size(axis) > 1 else None)
    return owners, Group(mesh.get_group(0) if mesh.ndim == 2 and mesh.size(0) > 1 else None)


def world_group() -> Group:
    """Return all ranks of this run as a group; one process alone if no process group was started."""
    many = dist.is_initialized() and dist.get_world_size() > 1
    return Group(dist.group.WORLD if many else None)


class Sum:
    """A sum over ranks that is under way."""

    def __init__(self, sent: Tensor, terms: Tensor, count: int, device: torch.device, work: dist.Work | None) -> None:
        self._sent = sent  # must live until the work is done
        self._terms, self._count, self._device, self._work = terms, count, device, work

    def wait(self) -> Tensor:
        """Return the sum, on the device of what was sent. On CUDA the stream waits, not the host."""
        if self._work is None:
            return self._terms
        self._work.wait()
        total = self._terms.new_zeros(self._terms.numel() // self._count)
        for term in self._terms.view(self._count, -1) if total.numel() else ():
            total += term
        return total.to(self._device)
