"""The lock of a run's folder: one process writes at a time, on this machine and, where the file system can, on all.

There are two locks, since each has a gap. A name in the kernel works whatever the file system, but each container
(each network namespace) has names of its own. A lock on a file in the folder reaches other containers and other
machines, but some file systems have none (Lustre without the mount option flock) or only pretend (Lustre with
localflock, NFS with nolock). The kernel drops both when their process ends, however that happens.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = "run.lock"
"""File in the folder while a run writes to it. One that a killed run has left behind blocks no other run."""
PATIENCE = 30.0
"""Seconds that an earlier attempt gets to end before this one is refused."""
_PAUSE = 0.1


class TakenError(ValueError):
    """Another process is writing to the folder."""


@contextmanager
def only_writer(folder: Path, patience: float | None = None) -> Iterator[int]:
    """Hold the lock of a folder while the context lasts. On rank 0.

    Makes the folder, and removes it at the end if nothing was written there.

    Args:
        folder: Folder of the run; may be missing.
        patience: Seconds to wait for another process that has it; None for ``PATIENCE``.

    Yields:
        A descriptor. A process that inherits it keeps other processes of this machine out of the folder until it ends,
        even if this process ends before.

    Raises:
        TakenError: It is still there after that.
        ValueError: The folder cannot be written.
    """
    deadline = time.monotonic() + (PATIENCE if patience is None else patience)
    with _claimed_name(folder.resolve(), deadline) as claim, _made(folder), _locked_file(folder, deadline):
        yield claim


@contextmanager
def _claimed_name(folder: Path, deadline: float) -> Iterator[int]:
    name = f"\0seft_dist {hashlib.sha256(bytes(folder)).hexdigest()}"
    with socket.socket(socket.AF_UNIX) as claim:
        while True:
            try:
                claim.bind(name)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise TakenError(
                        f"another process on this machine is writing to {folder}: stop it, or choose another output"
                    ) from error
            time.sleep(_PAUSE)
        yield claim.fileno()


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder and those above it, and at the end remove those of them that are empty."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        if not folder.exists():  # if it is a file, check_run_folder refuses it with a better message
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output={folder} cannot be made: {error}") from error
    try:
        yield
    finally:
        for path in missing:
            with contextlib.suppress(OSError):  # a folder that is not empty belongs to the run
                path.rmdir()


@contextmanager
def _locked_file(folder: Path, deadline: float) -> Iterator[None]:
    if not folder.is_dir():
        yield
        return
    path = folder / LOCK
    handle = _lock(path, deadline)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before closing: a process that has opened it finds in _lock that it is gone
        os.close(handle)


def _lock(path: Path, deadline: float) -> int:
    """Open and lock a file, waiting for the process that has it, and return its descriptor."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)  # the process that made it may have removed it again
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ValueError(f"output={path.parent} cannot be written: {error}") from error
        try:
            # Byte ranges are what NFS and Lustre know, too. Such a lock goes when its process closes any descriptor of
            # the file, so nothing else here may open it.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                print(
                    f"warning: the file system of {path.parent} has no locks ({error.strerror}): a second run is kept "
                    "out on this machine only, so do not start one elsewhere",
                    file=sys.stderr,
                    flush=True,
                )
                return handle
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(handle)
            if time.monotonic() > deadline:
                raise TakenError(
                    f"another run ({holder}) is writing to {path.parent}: stop it, or choose another output"
                ) from error
            time.sleep(_PAUSE)
            continue
        if _is_at(handle, path):
            os.truncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return handle
        os.close(handle)  # its owner has just ended and removed it


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
