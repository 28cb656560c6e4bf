"""The rendezvous before there is a process group: a store at rank 0, a bounded wait, and the names of missing ranks.

The environment is read in ``distributed``; here it only appears in messages.
"""

import re
import socket
import sys
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from seft_dist.session.extras import require

LONGEST_WAIT = 600.0
"""Most seconds that ranks wait for each other at the start; some file systems take minutes to load libraries."""
_FIRST_NOTICE, _NOTICES = 20.0, 60.0
"""Seconds until rank 0 prints which ranks are missing, and between further such lines."""
_HERE, _ARRIVED, _ALL = "seft_dist/here/", "seft_dist/arrived", "seft_dist/all"


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """Address of the store through which the ranks find each other, and this rank."""

    address: str
    """Machine of rank 0."""
    port: int
    """Port on which rank 0 listens."""
    rank: int
    world_size: int
    variables: str
    """Environment variables that the numbers came from, with their values, e.g. "RANK=0, WORLD_SIZE=8"."""

    @property
    def endpoint(self) -> str:
        """Address and port, for messages."""
        return f"{self.address}:{self.port} (MASTER_ADDR, MASTER_PORT)"


class RanksMissingError(TimeoutError):
    """Ranks did not come, or were lost while the others waited."""

    from_any_rank = True
    """Rank 0 may be the one that is missing, so any rank reports it."""


def wait_for_ranks(rendezvous: Rendezvous, seconds: float, notice: float = _FIRST_NOTICE) -> dist.Store:
    """Wait until every rank has come, and return the store through which they find each other. Collective.

    Args:
        rendezvous: Address of the store, and this rank.
        seconds: Longest wait.
        notice: Seconds after which rank 0 prints which ranks are missing.

    Raises:
        OSError: The port is in use, rank 0 cannot be reached, or (``RanksMissingError``) ranks did not come.
        ValueError: Another process says that it is this rank.
    """
    end = time.monotonic() + seconds
    store = _open_store(rendezvous, seconds)
    try:
        if store.add(f"{_HERE}{rendezvous.rank}", 1) > 1:
            raise ValueError(
                f"two processes are rank {rendezvous.rank} at {rendezvous.endpoint}: variables of an earlier or "
                f"another run are set ({rendezvous.variables}), or another run uses this port; unset them, or set "
                "another MASTER_PORT"
            )
        if store.add(_ARRIVED, 1) == rendezvous.world_size:
            store.set(_ALL, "")
        _wait_for_all(store, rendezvous, seconds, end, notice)
    except dist.DistNetworkError as error:
        raise RanksMissingError(
            f"rank {rendezvous.rank} lost rank 0 at {rendezvous.endpoint} while ranks were meeting: see what rank 0 "
            "said"
        ) from error
    return store


def _open_store(rendezvous: Rendezvous, seconds: float) -> dist.Store:
    """Open the store on rank 0, or connect to it. Blocks for at most ``seconds``."""
    rank, limit = rendezvous.rank, timedelta(seconds=seconds)
    try:
        return dist.TCPStore(
            rendezvous.address, rendezvous.port, rendezvous.world_size, rank == 0, timeout=limit, wait_for_workers=False
        )
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        if rank == 0 and ("EADDRINUSE" in reason or "in use" in reason):
            raise OSError(
                f"MASTER_PORT={rendezvous.port} is in use on {socket.gethostname()}: set MASTER_PORT to a free port, "
                "or stop the run that uses it"
            ) from error
        if rank == 0:
            raise OSError(
                f"rank 0 on {socket.gethostname()} cannot be reached at {rendezvous.endpoint} ({reason}): MASTER_ADDR "
                "must name this machine"
            ) from error
        raise RanksMissingError(
            f"rank {rank} found no rank 0 at {rendezvous.endpoint} within {seconds:g} s. {_advice(rendezvous)}"
        ) from error


def _wait_for_all(store: dist.Store, rendezvous: Rendezvous, seconds: float, end: float, notice: float) -> None:
    """Wait until every rank has come; say from time to time which have not."""
    has_notified = False
    while True:
        left = end - time.monotonic()
        pause = min(_NOTICES if has_notified else notice, left)
        try:
            store.wait([_ALL], timedelta(seconds=max(pause, 0.001)))
            return
        except dist.DistNetworkError:
            raise
        except dist.DistError:  # a timeout: no rank was lost so far
            pass
        missing = [rank for rank in range(rendezvous.world_size) if not store.check([f"{_HERE}{rank}"])]
        if time.monotonic() >= end and missing:
            raise RanksMissingError(
                f"{_listed(missing)} of {rendezvous.world_size} did not come within {seconds:g} s. "
                f"{_advice(rendezvous)}"
            )
        if rendezvous.rank == 0 and missing:
            print(
                f"waiting for {_listed(missing)} of {rendezvous.world_size} ({rendezvous.variables})", file=sys.stderr
            )
            has_notified = True


def _advice(rendezvous: Rendezvous) -> str:
    names = " ".join(entry.partition("=")[0] for entry in rendezvous.variables.split(", "))
    return (
        f"{rendezvous.variables} say that there are {rendezvous.world_size}: see whether the others have started and "
        f"reach {rendezvous.endpoint}; if this was to be one process, the variables are left over: unset {names}"
    )


def _listed(ranks: list[int]) -> str:
    """Write ranks as text: neighbours as ranges, the end of a long list left out."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    texts = [str(first) if first == last else f"{first} to {last}" for first, last in spans]
    return f"rank {', '.join(texts[:8])}{', ...' if len(texts) > 8 else ''}"


def mpi_rendezvous_address(world_size: int, variables: str) -> tuple[str, int]:
    """Agree through MPI on the machine of rank 0 and a free port there. Collective.

    Args:
        world_size: Number of ranks, from the environment.
        variables: Environment variables that the number came from, for the message.

    Raises:
        ValueError: mpi4py is not installed, or MPI itself knows another number of ranks.
    """
    require(
        "mpi4py",
        "a start by MPI",
        ", or set MASTER_ADDR and MASTER_PORT to the name of rank 0's machine and a free port on it",
    )
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    if world.Get_size() != world_size:
        raise ValueError(
            f"{variables}, but MPI itself knows {world.Get_size()} ranks: the variables are left over from a shell "
            "that mpirun has started (unset them), or mpi4py was built for another MPI than this mpirun's"
        )
    hosts = world.allgather(socket.gethostname())
    address = "127.0.0.1" if len(set(hosts)) == 1 else hosts[0]
    return address, world.bcast(_free_port() if world.Get_rank() == 0 else None, root=0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def first_host(nodelist: str) -> str:
    """Return the first machine of a Slurm node list, e.g. "gpu017" of "gpu[017-031,040],big1".

    Raises:
        ValueError: It cannot be read.
    """
    match = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodelist)
    if match is None:
        raise ValueError(f"cannot read the Slurm node list {nodelist!r}: set MASTER_ADDR and MASTER_PORT")
    return "".join(part or "" for part in match.groups())
