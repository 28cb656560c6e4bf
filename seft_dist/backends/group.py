"""The few collectives that everything else is made of, on one process or many, with a count of the bytes sent.

Sums that decide anything are made in rank order from the ranks' own terms, so two runs on one layout are bitwise equal
whatever algorithm the communication library chooses.
"""

import torch
import torch.distributed as dist
from torch import Tensor


class Group:
    """Ranks that act together; ``None`` is one process alone, with the same code path.

    Every method that is not a property is **collective**: all ranks of the group must enter it, in the same order, also
    with nothing to send. ``bytes_sent`` counts what this rank sends, as a ring would.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.bytes_sent = 0
        # NCCL moves device tensors only (never run here); offloaded shards are staged through the device.
        self._nccl = group is not None and dist.get_backend(group) == "nccl"

    def _stage(self, tensor: Tensor) -> Tensor:
        return tensor.cuda() if self._nccl and tensor.device.type == "cpu" else tensor.contiguous()

    def _reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size > 1:
            staged = self._stage(tensor)
            dist.all_reduce(staged, op=op, group=self.group)
            self.bytes_sent += 2 * tensor.numel() * tensor.element_size() * (self.size - 1) // self.size
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
        if self.size == 1:
            return tensor.unsqueeze(0)
        staged = self._stage(tensor)
        out = torch.empty((self.size * tensor.numel(),), dtype=tensor.dtype, device=staged.device)
        dist.all_gather_single(out, staged.view(-1), group=self.group)
        self.bytes_sent += tensor.numel() * tensor.element_size() * (self.size - 1)
        return out.view(self.size, *tensor.shape).to(tensor.device)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Gather one-dimensional tensors of different lengths.

        Args:
            tensor: [n], n of each rank's own.

        Returns:
            Every rank's tensor, in rank order.
        """
        assert tensor.dim() == 1
        if self.size == 1:
            return [tensor]
        lengths = self.stack(torch.tensor([tensor.numel()], device=tensor.device)).view(-1).tolist()
        # Padded to the longest: an uneven all-gather does not exist everywhere.
        padded = tensor.new_zeros(max(lengths))
        padded[: tensor.numel()] = tensor
        return [row[:length] for row, length in zip(self.stack(padded), lengths, strict=True)]

    def sum_to_owners(self, tensor: Tensor, sizes: list[int]) -> Tensor:
        """Add a vector up over the ranks; each rank keeps its own segment.

        Args:
            tensor: fp32 [sum(sizes)], segments in rank order.
            sizes: Length of each rank's segment, the same list on every rank.

        Returns:
            fp32 [sizes[rank]], summed in rank order.
        """
        assert tensor.numel() == sum(sizes)
        if self.size == 1:
            return tensor
        staged = self._stage(tensor)
        own = sizes[self.rank]
        terms = torch.empty(self.size * own, dtype=tensor.dtype, device=staged.device)
        dist.all_to_all_single(terms, staged, [own] * self.size, sizes, group=self.group)
        self.bytes_sent += (tensor.numel() - own) * tensor.element_size()
        total = torch.zeros(own, dtype=tensor.dtype, device=staged.device)
        for term in terms.view(self.size, own):
            total += term
        return total.to(tensor.device)
