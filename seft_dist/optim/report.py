"""What evolutions do and what they cost, as the optimizer reports it."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Phase:
    """What one part of an evolution cost this rank."""

    seconds: float
    """On a GPU, until its work was queued."""
    bytes_sent: int


@dataclass(frozen=True)
class EvolutionReport:
    """What one evolution did, over all ranks and targets."""

    step: int
    first: bool
    """True if this was the choice of the first support."""
    dropped: int
    grown: int
    reactivated: int
    """Grown entries that were pruned positions."""
    pruned: int
    """Active positions that left the mask."""
    support: int
    """Number of deltas afterwards."""
    replaced: float
    """Grown entries as a share of the support."""
    seconds: float
    """Time from drop to verify."""
    bytes_sent: int
    """Bytes sent by this rank, from drop to verify."""
    phases: dict[str, Phase]
    """window (computing and reducing dense gradients in the steps before, choosing candidates), drop, grow, adapt, commit
    (everybody learns the new positions) and verify; docs/evolution.md says what each sends."""
    digest: str
    """Digest of all masks and supports; the same for every layout."""
    near_ties: list[int] | None = None
    """Number of candidates of each target that a selection took or left by so little that rounding of their terms could have
    decided (``collectives.near_ties``), candidates of a window included. None: not counted."""


@dataclass
class WindowRecord:
    """What the coming evolution will report of the steps before it: one object for the windows of all targets."""

    seconds: float = 0.0
    """Time for dense gradients and the choice of candidates."""
    bytes_sent: int = 0
    """Bytes sent by this rank for the same."""
    near_ties: list[int] = field(default_factory=list)
    """Near-ties of each target that the choice of candidates had; empty: none were counted."""
