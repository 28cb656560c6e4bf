"""Reports of what evolutions did and what they cost."""

from dataclasses import dataclass, field


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
    """Grown entries that were pruned positions."""
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

    The phases are window (computing and reducing dense gradients in the steps before, choosing candidates), drop, grow,
    adapt, commit (all ranks learn the new positions) and verify.
    """
    digest: str
    """Digest of all masks and supports; the same for every layout."""
    near_ties: list[int] | None = None
    """Number of each target's candidates whose selection rounding could have decided; None: not counted.

    A selection took or left them by so little that rounding of their terms matters (``collectives.near_ties``).
    Candidates of a window are included.
    """


@dataclass
class ReportDraft:
    """The part of the coming evolution's report that is known before it: one object for the windows of all targets."""

    seconds: float = 0.0
    """Time for dense gradients and the choice of candidates."""
    bytes_sent: int = 0
    """Bytes sent by this rank for the same."""
    near_ties: list[int] = field(default_factory=list)
    """Near-ties of each target that the choice of candidates had; empty: none were counted."""
