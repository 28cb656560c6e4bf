"""Stop signals: a signal to any rank becomes a number that the ranks agree on between two steps.

This file imports no torch: programs catch signals before they load it, which takes many seconds on a busy file system.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals of Slurm, of ``kill``, of Ctrl-C, and of a terminal that is closed.

Slurm sends its own before a time limit or a preemption; torchrun passes Ctrl-C on to its ranks.
"""
_ONE_KEYSTROKE = 3.0
"""Seconds within which several SIGINTs are one Ctrl-C: the terminal sends it, and launchers pass it on."""


class StopRequest:
    """Remembers the first stop signal; later ones change nothing, but a second Ctrl-C interrupts at once.

    A launcher that is gone counts as SIGTERM: torchrun killed by SIGKILL, or deepspeed by anything, leave their ranks
    behind, which would go on for days where nobody sees them.
    """

    def __init__(self) -> None:
        self._number = 0
        self._since = 0.0
        self._ancestors = _ancestors()
        self._terminals = [number for number in (0, 1, 2) if _is_terminal(number)]
        self._find_launcher: Callable[[], tuple[int, ...]] = tuple
        self._launcher: tuple[int, ...] = ()

    def watch(self, find_launcher: Callable[[], tuple[int, ...]]) -> None:
        """Check from now on that the launcher is still there.

        Args:
            find_launcher: Finds its processes. Once one of them has ended, it returns others.
        """
        self._find_launcher, self._launcher = find_launcher, find_launcher()
        # Compare with the parents at the start, so that a launcher that has ended since is noticed.
        self._launcher = self._ancestors[: len(self._launcher)]

    @property
    def number(self) -> int:
        """The signal, 0 for none."""
        if not self._number and self._find_launcher() != self._launcher:
            print("the launcher of this rank has ended: saving and stopping", file=sys.stderr, flush=True)
            self._number = signal.SIGTERM
        return self._number

    def remember(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: nothing is interrupted, the training loop looks at ``number`` after each step."""
        if number == signal.SIGHUP:
            self._leave_terminal()
        if not self._number:
            self._number, self._since = number, time.monotonic()
        elif number == self._number == signal.SIGINT and time.monotonic() > self._since + _ONE_KEYSTROKE:
            raise KeyboardInterrupt

    def _leave_terminal(self) -> None:
        """Discard what is printed: a closed terminal answers with errors, which would end the run before it saves."""
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number in self._terminals:
            os.dup2(nowhere, number)
        os.close(nowhere)


def name_of(number: int) -> str:
    """Return the name of a signal, e.g. "SIGUSR1"."""
    return signal.Signals(number).name


@contextmanager
def stop_requests(process_ends: bool = False) -> Iterator[StopRequest]:
    """Catch stop signals while the context lasts. In the main thread.

    SIGHUP (nohup) and SIGINT (a shell's background job) stay ignored where the process was started so. SIGUSR1 is
    caught in any case: slurm/ starts ranks with it ignored, lest it ends one that has no handler yet.

    Args:
        process_ends: True where nothing is left to do but to exit afterwards: signals are then ignored. Leaving Python
            takes a second once torch is loaded, and a signal in it would turn a finished run into a killed one.
    """
    request = StopRequest()
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    ignored = {number for number in (signal.SIGHUP, signal.SIGINT) if before[number] == signal.SIG_IGN}
    caught = {number: handler for number, handler in before.items() if number not in ignored}
    for number in caught:
        signal.signal(number, request.remember)
    try:
        yield request
    finally:
        for number, handler in caught.items():
            signal.signal(number, signal.SIG_IGN if process_ends else handler)


def _ancestors() -> tuple[int, ...]:
    """Find the parent of this process, and the parent's parent if that is known."""
    parent = os.getppid()
    try:
        stat = Path(f"/proc/{parent}/stat").read_text()
    except OSError:
        return (parent,)
    return parent, int(stat.rpartition(")")[2].split()[1])


def _is_terminal(number: int) -> bool:
    with contextlib.suppress(OSError):
        return os.isatty(number)
    return False
