"""The sparse gradients of all targets on their way to the ranks that own them, in a few large calls.

    backward of the last micro-batch     layer 5  4  3 | 2  1  0
    buckets, in backward order                 bucket 0 | bucket 1
    on its way                                  0 ------------->            while layers 2, 1, 0 are still computed
                                                             1 -------->    step() waits for both

A bucket leaves as soon as all its layers have recorded as often as in the backward pass before. Buckets leave in order, on
every rank in the same one, over a group of their own: the engine's collectives cannot come in between. What has not left
by then leaves in ``finish``, so the result does not depend on when anything left.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from seft_dist.backends import Backend
from seft_dist.backends.group import Sum
from seft_dist.optim.delta import Support
from seft_dist.optim.slot import Slot

BUCKET_BYTES = 25 << 20
"""Of gradients; a bucket is closed when it has that many. What DistributedDataParallel takes by default."""
_LEAST_BUCKETS = 4
"""Small models have buckets of a quarter of their gradients: else nothing would leave before the end."""


def buckets_of(sizes: list[int], bucket_bytes: int = BUCKET_BYTES) -> list[list[int]]:
    """Layers in backward order, cut where a bucket has enough bytes.

    Args:
        sizes: Deltas of each layer, in forward order.
        bucket_bytes: Of fp32 gradients.
    """
    enough = min(bucket_bytes, max(1, -(-4 * sum(sizes) // _LEAST_BUCKETS)))
    buckets: list[list[int]] = [[]]
    held = 0
    for layer in reversed(range(len(sizes))):
        if held >= enough:
            buckets.append([])
            held = 0
        buckets[-1].append(layer)
        held += 4 * sizes[layer]
    return buckets


class Exchange:
    """Brings this rank's gradients at all ranks' deltas to their owners. Lists have one item for each target."""

    def __init__(self, backend: Backend, slots: list[Slot]) -> None:
        """Collective on several ranks.

        Args:
            backend: Says who owns what.
            slots: Where backward puts the gradients; they tell this object when one is there.
        """
        self.backend, self.slots = backend, slots
        self.group = backend.owners.twin()
        self._overlaps = False
        self._expected = [0] * len(slots)
        self._seen = [0] * len(slots)
        self._buckets: list[list[int]] = []
        self._bucket_of: list[int] = []
        self._waits_for: list[int] = []
        self._sums: list[Sum] = []
        self._supports: list[Support] = []
        for i, slot in enumerate(slots):
            slot.on_record(self._recorder(i))

    @property
    def num_sent(self) -> int:
        """Buckets of this step that have left."""
        return len(self._sums)

    def prepare(self, supports: list[Support]) -> None:
        """Expect the gradients of a step.

        Args:
            supports: Where they are.
        """
        if len(supports) != len(self._supports) or any(
            a is not b for a, b in zip(supports, self._supports, strict=True)
        ):
            self._supports = supports
            sizes = [len(support) for support in supports]
            self._buckets = buckets_of(sizes) if self.group.size > 1 else [list(range(len(sizes)))]
            self._bucket_of = [0] * len(supports)
            for bucket, layers in enumerate(self._buckets):
                for layer in layers:
                    self._bucket_of[layer] = bucket
        self.forget()

    def forget(self) -> None:
        """Forget what was recorded since the last step. What has left is waited for."""
        for total in self._sums:
            total.wait()
        self._sums = []
        self._overlaps = False
        self._seen = [0] * len(self.slots)

    def set_last(self, is_last: bool) -> None:
        """Say whether the coming backward pass is the last one of the step, on every rank.

        Args:
            is_last: True: gradients may leave while it runs.
        """
        # Whatever the step had before is in the slots already and leaves with this pass.
        self._overlaps = is_last and self.group.size > 1
        self._seen = [0] * len(self.slots)
        self._waits_for = [sum(self._expected[layer] for layer in layers) for layers in self._buckets]
        # A layer that never recorded may do so now; its bucket leaves at the end.
        for bucket, layers in enumerate(self._buckets):
            if not all(self._expected[layer] for layer in layers):
                self._waits_for[bucket] = -1

    def _recorder(self, i: int) -> Callable[[], None]:
        def recorded() -> None:
            self._seen[i] += 1
            if not self._overlaps:
                return
            bucket = self._bucket_of[i]
            if bucket < self.num_sent:
                raise RuntimeError(
                    f"{self.backend.names[i]} took part in this backward pass more often than in the one before, and its "
                    "gradient had already left: call set_is_last_backward(False) where a module is used a varying number "
                    "of times"
                )
            self._waits_for[bucket] -= 1
            while self.num_sent < len(self._buckets) and self._waits_for[self.num_sent] == 0:
                self._send()

        return recorded

    def _send(self) -> None:
        """Let the next bucket go. Collective, without waiting."""
        layers = self._buckets[self.num_sent]
        ranks = range(self.group.size)
        parts = [self._take_gradient(i).split(self._supports[i].sizes) for i in layers]
        sizes = [sum(part[rank].numel() for part in parts) for rank in ranks]
        flat = torch.cat([part[rank] for rank in ranks for part in parts])
        self._sums.append(self.group.start_sum_to_owners(flat, sizes))

    def _take_gradient(self, i: int) -> Tensor:
        grad = self.slots[i].take_grad()
        return grad if grad is not None else torch.zeros(len(self._supports[i]), device=self.backend.device)

    @torch.no_grad()
    def finish(self) -> Tensor:
        """Wait for all gradients. Collective.

        Returns:
            fp32 [own], own entries' gradient averaged over all ranks, layers in forward order.
        """
        while self.num_sent < len(self._buckets):
            self._send()
        self._expected = self._seen
        layers = [i for bucket in self._buckets for i in bucket]
        lengths = [self._supports[i].sizes[self.group.rank] for i in layers]
        totals = [total.wait() for total in self._sums]
        own = totals[0] if len(totals) == 1 else torch.cat(totals)
        self._sums = []
        if layers != sorted(layers):
            parts = dict(zip(layers, own.split(lengths), strict=True))
            own = torch.cat([parts[i] for i in range(len(layers))])
        if self.backend.world_size > 1:
            own = self.backend.replicas.sum(own) / self.backend.world_size
        return own.to(self.backend.device)
