"""Who am I among the ranks: the only file of the project that reads the environment.

The same script runs under ``python``, ``torchrun``, ``deepspeed``, ``accelerate launch``, ``mpirun`` and ``srun``; each
tells a process its rank in its own way. Nothing here was ever run on a GPU: the nccl lines are untested.
"""

import hashlib
import importlib.util
import os
import re
import socket
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

T = TypeVar("T")

# Ports for rendezvous that we choose ourselves lie below the range from which Linux hands out outgoing ports.
_FIRST_PORT, _NUM_PORTS = 20000, 12000
RENDEZVOUS_SECONDS = 300.0
"""Longest wait for ranks that do not come at the start, if collectives may take longer: they are started together, and
one that is lost before they have met is noticed by nothing else."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among all processes of the run."""

    rank: int = 0
    """Number of this process, 0 to world_size - 1."""
    local_rank: int = 0
    """Number of this process on its machine."""
    world_size: int = 1
    """Processes of the run."""
    launcher: str = "python"
    """Where the numbers came from: "python", "torch" (torchrun, deepspeed, accelerate), "mpi" or "slurm"."""
    device: torch.device = torch.device("cpu")
    """Where this process computes."""

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes files."""
        return self.rank == 0


def find_ranks(env: Mapping[str, str] | None = None) -> Ranks:
    """Find this process's rank from what its launcher left in the environment. Local.

    Args:
        env: The environment; None: the process's own.

    Returns:
        The ranks, with the device this process should use.

    Raises:
        ValueError: The launcher's variables are incomplete or contradict each other.
    """
    env = os.environ if env is None else env
    for launcher, rank, world_size, local_rank in (
        ("torch", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("mpi", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
        ("mpi", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
        ("slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ):
        # A batch script has SLURM_PROCID too, but only a process started by srun has SLURM_STEP_NUM_TASKS. With its PMI
        # plug-in srun also sets PMI_RANK, but no local rank beside it: that is Slurm's business, not MPI's.
        if rank not in env or world_size not in env or (launcher == "mpi" and local_rank not in env):
            continue
        number, size, local = int(env[rank]), int(env[world_size]), int(env.get(local_rank, "0"))
        if not 0 <= number < size:
            raise ValueError(f"{rank}={number} with {world_size}={size}: needs a rank below the number of ranks")
        if size > 1 and local_rank not in env and torch.cuda.device_count() > 1:
            raise ValueError(f"{rank} is set but {local_rank} is not: it is needed to choose this rank's GPU")
        return Ranks(rank=number, local_rank=local, world_size=size, launcher=launcher, device=_device(local))
    return Ranks(device=_device(0))


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # Slurm and containers may show a rank only its own GPU, which then is number 0 whatever the local rank.
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def start(
    *, deepspeed: bool = False, group: bool = False, timeout: float = 1800.0, threads: int | None = None
) -> Ranks:
    """Find the ranks, choose device and CPU threads, and start the default process group. **Collective.**

    Args:
        deepspeed: Also prepare the process for DeepSpeed (its accelerator choice, its rank variables).
        group: Start a process group even for a single rank (FSDP2 needs one; so does DeepSpeed).
        timeout: Seconds after which a collective that a rank did not enter fails, in groups made later too; at most
            ``RENDEZVOUS_SECONDS`` of them are waited for ranks that never came.
        threads: CPU threads of this rank. None: cores of this machine divided by the ranks on it, on CPU.

    Returns:
        This process's ranks.
    """
    ranks = find_ranks()
    if (ranks.world_size > 1 or group or deepspeed) and not dist.is_initialized():
        _set_rendezvous(ranks)
        if ranks.device.type == "cuda":
            torch.cuda.set_device(ranks.device)
        limit, meeting = timedelta(seconds=timeout), timedelta(seconds=min(timeout, RENDEZVOUS_SECONDS))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if ranks.device.type == "cuda" else "gloo",
            store=_store_of_attempt(ranks, meeting),
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=meeting,
        )
        distributed_c10d._set_pg_timeout(limit)
        distributed_c10d._get_default_store().set_timeout(limit)
        # The groups of a device mesh (HSDP) and of DeepSpeed take these, whatever the default group has: 30 minutes
        distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = limit
    if threads is None and ranks.device.type == "cpu":
        threads = max(1, len(os.sched_getaffinity(0)) // _ranks_on_this_machine())
    if threads is not None:
        torch.set_num_threads(threads)
    if deepspeed:
        _prepare_deepspeed(ranks)
    return ranks


# Variables that may change a result, or say how it was made; none of them holds a secret.
_TELLING = (
    "OMP_",
    "MKL_",
    "KMP_",
    "ATEN_",
    "ONEDNN_",
    "CUDA_",
    "CUBLAS_",
    "NVIDIA_TF32_",
    "NCCL_",
    "GLOO_",
    "TORCH_",
    "DS_",
)


def launch_facts(env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What the environment says about this process's start, for the manifest of a run. Local.

    Args:
        env: The environment; None: the process's own.

    Returns:
        ``host``; ``slurm`` (job, restarts, nodes) or None; ``environment``, variables of libraries that may change a result.
    """
    env = os.environ if env is None else env
    slurm = {
        "job_id": env.get("SLURM_JOB_ID"),
        "restart_count": int(env.get("SLURM_RESTART_COUNT", "0")),
        "nodes": env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST"),
    }
    return {
        "host": socket.gethostname(),
        "slurm": slurm if slurm["job_id"] else None,
        "environment": {name: env[name] for name in sorted(env) if name.startswith(_TELLING)},
    }


def find_launcher(env: Mapping[str, str] | None = None) -> tuple[int, ...]:
    """Processes of the launcher above this rank that should outlive it; others, when one has ended. Local.

    Args:
        env: The environment; None: the process's own.

    Returns:
        The parent under torchrun and accelerate, the parent and its parent under deepspeed; empty under launchers whose
        ranks end with them (mpirun, srun) and without one.
    """
    env = os.environ if env is None else env
    parent = os.getppid()
    if "TORCHELASTIC_RUN_ID" in env:
        return (parent,)
    if "CROSS_RANK" not in env:  # set by deepspeed's process on each machine, itself started by what the user started
        return ()
    try:
        stat = Path(f"/proc/{parent}/stat").read_text()
    except OSError:  # the parent has ended in this moment, or this is no Linux
        return (os.getppid(),)
    return parent, int(stat.rpartition(")")[2].split()[1])


def shutdown() -> None:
    """End the process group, if there is one. **Collective.**"""
    if dist.is_initialized():
        dist.destroy_process_group()


def check_agreement(ranks: Ranks, settings: str) -> None:
    """Check that every rank was started with the same settings. **Collective.**

    Args:
        ranks: This process.
        settings: The run's settings as text, e.g. the configuration as JSON.

    Raises:
        ValueError: Ranks differ from rank 0; raised on every rank, naming those that differ.
    """
    if not dist.is_initialized():
        return
    digests: list[str] = [""] * ranks.world_size
    dist.all_gather_object(digests, hashlib.sha256(settings.encode()).hexdigest())
    different = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
    if different:
        raise ValueError(
            f"rank {', '.join(different)} was given another configuration than rank 0: every rank needs the same "
            "options and the same recipe and ds_config files"
        )


def together(ranks: Ranks, work: Callable[[], T]) -> T:
    """Do something local on every rank, such that a user's error on one of them stops all. **Collective.**

    Without it the other ranks would wait in their next collective for the one that failed.

    Args:
        ranks: This process.
        work: Must not enter collectives.

    Returns:
        What ``work`` returned.

    Raises:
        ValueError: Of this rank, or naming the rank where it happened.
    """
    result, problem = None, None
    try:
        result = work()
    except ValueError as error:
        if ranks.world_size == 1:
            raise
        problem = str(error)
    if ranks.world_size > 1:
        problems: list[str | None] = [None] * ranks.world_size
        dist.all_gather_object(problems, problem)
        failed = [rank for rank, text in enumerate(problems) if text is not None]
        if failed:
            where = "" if len(failed) == ranks.world_size else f"rank {failed[0]}: "
            raise ValueError(f"{where}{problems[failed[0]]}")
    return cast(T, result)


def _ranks_on_this_machine() -> int:
    if not dist.is_initialized():
        return 1
    names: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    return names.count(socket.gethostname())


def _set_rendezvous(ranks: Ranks) -> None:
    """Set MASTER_ADDR and MASTER_PORT where the launcher did not."""
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        return
    if ranks.world_size == 1:
        address, port = "127.0.0.1", _free_port()
    elif ranks.launcher == "mpi":
        address, port = _mpi_rendezvous()
    elif ranks.launcher == "slurm":
        job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ.get("SLURM_STEP_ID", "0"))
        address = first_host(os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"])
        port = _FIRST_PORT + (7 * job + step) % _NUM_PORTS
    else:
        raise ValueError(
            "RANK and WORLD_SIZE are set but MASTER_ADDR and MASTER_PORT are not: set them, or use torchrun"
        )
    os.environ.setdefault("MASTER_ADDR", address)
    os.environ.setdefault("MASTER_PORT", str(port))


def _store_of_attempt(ranks: Ranks, timeout: timedelta) -> dist.Store | None:
    """Where the ranks of one attempt under torchrun on one machine find each other; None: where torch would look.

    With a static rendezvous (torchrun --master-port) torchrun 2.13 keeps one store for all its restarts, and there a new
    rank would find the addresses of the ranks that are gone. Several agents may have counted different restarts.
    """
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or env.get("GROUP_WORLD_SIZE") != "1":
        return None
    address, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    store = dist.TCPStore(address, port, ranks.world_size, is_master=False, timeout=timeout)
    return dist.PrefixStore(f"attempt {env['TORCHELASTIC_RESTART_COUNT']}", store)


def _mpi_rendezvous() -> tuple[str, int]:
    if importlib.util.find_spec("mpi4py") is None:
        raise ValueError(
            "started by MPI, but mpi4py is not installed: `pip install mpi4py`, or set MASTER_ADDR and MASTER_PORT to "
            "the name of rank 0's machine and a free port on it"
        )
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    hosts = world.allgather(socket.gethostname())
    address = "127.0.0.1" if len(set(hosts)) == 1 else hosts[0]
    return address, world.bcast(_free_port() if world.Get_rank() == 0 else None, root=0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def first_host(nodelist: str) -> str:
    """First machine of a Slurm node list, e.g. "gpu017" of "gpu[017-031,040],big1". Local."""
    found = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodelist)
    if found is None:
        raise ValueError(f"cannot read the Slurm node list {nodelist!r}: set MASTER_ADDR and MASTER_PORT")
    return "".join(part or "" for part in found.groups())


def _prepare_deepspeed(ranks: Ranks) -> None:
    # DeepSpeed reads the rank from the environment in many places, whoever started the process group.
    os.environ.update(RANK=str(ranks.rank), WORLD_SIZE=str(ranks.world_size), LOCAL_RANK=str(ranks.local_rank))
    if ranks.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # DeepSpeed calls collectives by the names they had before torch 2.13: nothing that its user could change.
    warnings.filterwarnings("ignore", message="`torch.distributed.*` is deprecated", category=FutureWarning)
    if ranks.device.type == "cpu":
        # Else the first init compiles a shared-memory extension: minutes, and a lock that blocks later runs if killed.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False, verbose=False)
