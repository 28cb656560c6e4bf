"""Being asked to stop: a signal to any rank becomes a number that the ranks agree on between two steps."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from seft_dist.training.distributed import find_launcher

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
"""What Slurm sends before a time limit or a preemption, and what everybody sends to end a process."""


class StopRequest:
    """Remembers the first stop signal; later ones change nothing. Local.

    A launcher that is gone counts as SIGTERM: torchrun killed by SIGKILL, or deepspeed by anything, leave their ranks
    behind, which would go on for days where nobody sees them.
    """

    def __init__(self) -> None:
        self._number = 0
        self._launcher = find_launcher()

    @property
    def number(self) -> int:
        """The signal, 0 for none."""
        if not self._number and find_launcher() != self._launcher:
            print("the launcher of this rank has ended: saving and stopping", file=sys.stderr, flush=True)
            self._number = signal.SIGTERM
        return self._number

    def remember(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: nothing is interrupted, the training loop looks at ``number`` after each step."""
        self._number = self._number or number


def name_of(number: int) -> str:
    """Name of a signal, e.g. "SIGUSR1". Local."""
    return signal.Signals(number).name


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Catch stop signals while the context lasts. Local, in the main thread."""
    request = StopRequest()
    before = {number: signal.signal(number, request.remember) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
