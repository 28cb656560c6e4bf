"""All-gathers of pruned weights that send bits and values instead of zeros.

    a rank's flat shards of one FSDP unit      a 0 0 b 0 c 0 0       as FSDP2 would send them
    what is sent instead                       3 | bits 1 0 0 1 0 1 0 0 | a b c . .      "." up to the agreed capacity

The shard stays as it is, so nothing else notices. Every bit of a value comes back, -0.0 and NaN too: only values whose
bits are all 0 are left out. The size of a message must be the same on every rank and known before: it is agreed
whenever masks change, from their number of active positions, which no update in between can exceed.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from seft_dist.backends.group import all_gather_single
from seft_dist.kernels.bits import pack
from seft_dist.kernels.packing import decode, encode

_WORTH = 0.9
"""Share of the dense bytes above which packing is not worth its time."""
_HEAD = 8  # bytes of the number of values, with which a message begins
_WORDS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class GatherSize:
    """Bytes that one FSDP unit's all-gather sends."""

    unit: str
    """Name of the module; empty for the root."""
    dense: int
    """Bytes that a rank sends without packing."""
    packed: int
    """Bytes that a rank sends when packed."""

    @property
    def pays(self) -> bool:
        """True if the unit is sent packed."""
        return self.packed < _WORTH * self.dense


class PackedAllGather:
    """The all-gather of one unit, for ``FSDPModule.set_custom_all_gather``.

    FSDP2 calls its methods with these keywords.
    """

    def __init__(self, name: str) -> None:
        """Args:
        name: Name of the unit.
        """
        self.name = name
        self.capacity: int | None = None
        """Most values that any rank may have to send; None: not agreed, sent dense."""
        self.bytes_sent = 0
        """Bytes this rank has sent, as a ring would."""

    def allocate(self, size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory for FSDP2's gathered weights."""
        return torch.empty(*size, dtype=dtype, device=device)

    def size(self, numel: int, itemsize: int) -> GatherSize:
        """Return the bytes that a shard of ``numel`` values takes."""
        dense = numel * itemsize
        if self.capacity is None or itemsize not in _WORDS:
            return GatherSize(self.name, dense, dense)
        return GatherSize(self.name, dense, _begin_of_values(numel) + -(-self.capacity * itemsize // 8) * 8)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Gather; complete when it returns, or in the order of the stream on a GPU. Collective.

        Args:
            output_tensor: [ranks * n]; gets every rank's shards.
            input_tensor: [n], this rank's; a part of output_tensor.
            group: The ranks.
            async_op: Makes no difference.

        Raises:
            RuntimeError: The shard has more values than was agreed.
        """
        numel, ranks = input_tensor.numel(), dist.get_world_size(group)
        size = self.size(numel, input_tensor.element_size())
        if not size.pays:
            self.bytes_sent += size.dense * (ranks - 1)
            all_gather_single(output_tensor, input_tensor, group=group)
            return
        words = input_tensor.view(_WORDS[input_tensor.element_size()])
        bits = pack(words != 0)
        values = encode(words, bits)
        if values.numel() > (self.capacity or 0):
            raise RuntimeError(
                f"{self.name}: {values.numel()} non-zero weights, {self.capacity} were agreed on: weights were changed "
                "behind the optimizer's back; call pack_gathers(model) again after changing them"
            )
        sent = torch.zeros(size.packed, dtype=torch.uint8, device=input_tensor.device)
        begin = _begin_of_values(numel)
        sent[:_HEAD].view(torch.int64).fill_(values.numel())
        sent[_HEAD : _HEAD + bits.numel()] = bits
        sent[begin : begin + values.nbytes].view(words.dtype).copy_(values)
        received = torch.empty(ranks * size.packed, dtype=torch.uint8, device=input_tensor.device)
        all_gather_single(received, sent, group=group)
        self.bytes_sent += size.packed * (ranks - 1)
        out, own = output_tensor.view(words.dtype).view(ranks, numel), dist.get_rank(group)
        for rank, row in enumerate(received.view(ranks, -1)):
            if rank != own:
                count = int(row[:_HEAD].view(torch.int64))
                their_values = row[begin : begin + count * words.element_size()].view(words.dtype)
                decode(row[_HEAD : _HEAD + bits.numel()], their_values, out[rank])


def _begin_of_values(numel: int) -> int:
    """Return the byte at which the values begin in a message: behind the bits, aligned."""
    return _HEAD + -(-numel // 64) * 8
