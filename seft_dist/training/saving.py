"""When a run saves by the clock."""

import time


class SaveClock:
    """Says when a checkpoint is due by time. Only rank 0's counts: the ranks exchange what it says."""

    def __init__(self, minutes: float) -> None:
        """Args:
        minutes: Minutes between checkpoints; 0: never due.
        """
        self._seconds = 60 * minutes
        self._since = time.monotonic()

    @property
    def is_due(self) -> bool:
        """True if the last checkpoint, or the start of this attempt, is that long ago."""
        return self._seconds > 0 and time.monotonic() - self._since >= self._seconds

    def restart(self) -> None:
        """Count from now on: a checkpoint has begun."""
        self._since = time.monotonic()
