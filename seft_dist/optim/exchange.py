"""The sparse gradients of all targets on their way to the ranks that own them, in a few large calls.

    backward of the last micro-batch     layer 5  4  3 | 2  1  0
    buckets, in backward order                 bucket 0 | bucket 1
    on its way                                  0 ------------->            while layers 2, 1, 0 are still computed
                                                             1 -------->    step() waits for both

Inside a bucket, gradients are sorted by the rank that they go to, so that one all-to-all call moves all of them:

    to rank 0:  layer 5, layer 4, layer 3      to rank 1:  layer 5, layer 4, layer 3      ...

Nobody announces that a layer has recorded for the last time in a backward pass (a module may be used several times, or
not at all), so the pass before it is taken as the measure: a bucket leaves as soon as its layers have recorded as often
as then. What has not left by the end of the pass leaves in ``finish``. The sums are the same whenever a bucket leaves.

Buckets leave in their order, which is the same on every rank although layers may record in different orders there. They
use a process group of their own: FSDP2 and DeepSpeed start collectives during backward too, and over one group two
ranks could match the call of one with the call of the other.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from seft_dist.backends import Backend
from seft_dist.backends.group import Sum
from seft_dist.optim.delta import Support
from seft_dist.optim.slot import Slot

BUCKET_BYTES = 25 << 20
"""Size at which a bucket of gradients is closed: the default of DistributedDataParallel."""
_LEAST_BUCKETS = 4
"""Least number of buckets. With a single one, nothing of a small model could leave before the end."""


def buckets_of(sizes: list[int], bucket_bytes: int = BUCKET_BYTES) -> list[list[int]]:
    """Divide layers in backward order into buckets, cut where a bucket has enough bytes.

    Args:
        sizes: Number of deltas of each layer, in forward order.
        bucket_bytes: Bytes of fp32 gradients at which a bucket is closed.
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
        """Make a process group, and listen to the slots. Collective on several ranks.

        Args:
            backend: Knows which rank owns which positions.
            slots: Where backward puts the gradients; each calls this object when it has recorded one.
        """
        self.backend, self.slots = backend, slots
        self.group = backend.owners.twin()
        self._overlaps = False
        """True while buckets may leave during the backward pass."""
        self._expected = [0] * len(slots)
        """Records of each layer in the last backward pass of the step before."""
        self._seen = [0] * len(slots)
        """Records of each layer in this backward pass."""
        self._buckets: list[list[int]] = []
        """Layers of each bucket."""
        self._bucket_of: list[int] = []
        """Bucket of each layer."""
        self._waits_for: list[int] = []
        """Records that each bucket still waits for; -1: it leaves in ``finish``."""
        self._sums: list[Sum] = []
        """Sums of the buckets that have left."""
        self._supports: list[Support] = []
        for i, slot in enumerate(slots):
            slot.on_record(self._recorder(i))

    @property
    def num_sent(self) -> int:
        """Buckets of this step that have left."""
        return len(self._sums)

    def prepare(self, supports: list[Support]) -> None:
        """Get ready for the gradients of a step.

        Args:
            supports: Positions of each target's gradient.
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
        """Forget what was recorded since the last step. Waits for the buckets that have left."""
        for total in self._sums:
            total.wait()
        self._sums = []
        self._overlaps = False
        self._seen = [0] * len(self.slots)

    def set_last(self, is_last: bool) -> None:
        """Set whether the coming backward pass is the last one of the step; the same on every rank.

        Args:
            is_last: True to let gradients leave while it runs.
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
        """Make what slot i calls after each record: it sends every bucket that is complete. Collective when it does."""

        def recorded() -> None:
            self._seen[i] += 1
            if not self._overlaps:
                return
            bucket = self._bucket_of[i]
            if bucket < self.num_sent:
                raise RuntimeError(
                    f"{self.backend.names[i]} took part in this backward pass more often than in the one before, and "
                    "its gradient had already left: call set_is_last_backward(False) where a module is used a varying "
                    "number of times"
                )
            self._waits_for[bucket] -= 1
            while self.num_sent < len(self._buckets) and self._waits_for[self.num_sent] == 0:
                self._send()

        return recorded

    def _send(self) -> None:
        """Start to send the next bucket. Collective, without waiting."""
        layers = self._buckets[self.num_sent]
        ranks = range(self.group.size)
        parts = [self._take_gradient(i).split(self._supports[i].sizes) for i in layers]
        sizes = [sum(part[rank].numel() for part in parts) for rank in ranks]
        flat = torch.cat([part[rank] for rank in ranks for part in parts])
        self._sums.append(self.group.start_sum_to_owners(flat, sizes))

    def _take_gradient(self, i: int) -> Tensor:
        grad = self.slots[i].take_grad()
        if grad is not None:
            return grad
        return torch.zeros(len(self._supports[i]), dtype=torch.float32, device=self.backend.device)

    @torch.no_grad()
    def finish(self) -> Tensor:
        """Send what has not left, and wait for all gradients. Collective.

        Returns:
            fp32 [own], gradient of the own entries averaged over all ranks, layers in forward order.
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
