"""Reports of what evolutions did and what they cost."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from seft_dist.backends import Backend


@dataclass(frozen=True)
class Phase:
    """Costs of one part of an evolution on this rank."""

    seconds: float
    """On a GPU, until its work was queued."""
    bytes_sent: int


@dataclass(frozen=True)
class EvolutionReport:
    """Results and costs of one evolution, over all ranks and targets."""

    step: int
    first: bool
    """True if this was the choice of the first support."""
    dropped: int
    grown: int
    reactivated: int
    """Pruned positions that became active: grown entries, or what swaps brought back."""
    pruned: int
    """Active positions that left the mask."""
    tried: int
    """Positions whose trial ended (``reactivate: trial``)."""
    kept: int
    """Those of them that stay active."""
    support: int
    """Number of deltas afterwards."""
    replaced: float
    """Grown entries as a share of the support."""
    seconds: float
    """Time from drop to verify."""
    bytes_sent: int
    """Bytes sent by this rank, from drop to verify."""
    phases: dict[str, Phase]
    """Time and traffic by phase; docs/evolution.md lists what each sends.

    The phases are window (computing and reducing dense gradients in the steps before, choosing candidates), swap, drop,
    grow, adapt, commit (all ranks learn the new positions) and verify.
    """
    digest: str
    """Digest of all masks and supports; the same for every layout."""
    moved: list[list[int]] = field(default_factory=list)
    """Numbers of dropped, grown, reactivated and pruned positions, for each target."""
    near_ties: list[int] | None = None
    """Number of each target's candidates whose selection rounding could have decided; None: not counted.

    A selection took or left them by so little that rounding of their terms matters (``collectives.near_ties``).
    Candidates of a window are included.
    """


class ReportDraft:
    """The part of the coming evolution's report that is known before it: one object for the windows of all targets.

    It has the costs of dense gradients and of the choice of candidates, and the near-ties of that choice.
    """

    def __init__(self) -> None:
        self._seconds, self._bytes_sent = 0.0, 0
        self.near_ties: list[int] = []
        """Near-ties of each target that the choice of candidates had; empty: none were counted."""

    @contextmanager
    def measuring(self, backend: Backend) -> Iterator[None]:
        """Add the costs of what happens inside the context.

        Args:
            backend: Counts the bytes.
        """
        began, sent = time.perf_counter(), backend.bytes_sent
        yield
        self._seconds += time.perf_counter() - began
        self._bytes_sent += backend.bytes_sent - sent

    def take(self) -> Phase:
        """Hand the costs over to a report, and keep nothing for the next one."""
        phase = Phase(self._seconds, self._bytes_sent)
        self._seconds, self._bytes_sent, self.near_ties = 0.0, 0, []
        return phase
