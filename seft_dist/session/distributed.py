"""This process among the ranks, and its process group; the only file of the project that reads the environment.

The same script runs under ``python``, ``torchrun``, ``deepspeed``, ``accelerate launch``, ``mpirun`` and ``srun``,
each of which has its own variables for a process's rank. Nothing here was ever run on a GPU: the nccl lines are
untested.
"""

import os
import socket
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from seft_dist.session.launchers import read_integer, read_ranks, variables_of_ranks
from seft_dist.session.rendezvous import LONGEST_WAIT, Rendezvous, first_host, mpi_rendezvous_address, wait_for_ranks

# Ports for rendezvous that we choose ourselves lie below the range from which Linux hands out outgoing ports.
_FIRST_PORT, _NUM_PORTS = 20000, 12000


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
    """Launcher that the numbers came from: "python", "torch" (torchrun, deepspeed, accelerate), "mpi" or "slurm"."""
    device: torch.device = torch.device("cpu")
    """Device on which this process computes."""
    variables: str = ""
    """Environment variables that the numbers came from, with their values, for messages."""

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes files."""
        return self.rank == 0


def find_ranks(env: Mapping[str, str] | None = None) -> Ranks:
    """Find this process's rank from what its launcher left in the environment.

    Args:
        env: The environment; None: the process's own. Variables that are empty count as not set.

    Returns:
        The ranks, with the device this process should use.

    Raises:
        ValueError: The launcher's variables are incomplete, are no numbers, or contradict each other or an outer
            launcher's.
    """
    launched = read_ranks(_environment(env))
    if launched is None:
        return Ranks(device=_device(0))
    if launched.world_size > 1 and launched.local_rank is None and torch.cuda.device_count() > 1:
        raise ValueError(f"{launched.variables}, but no rank on this machine: it is needed to choose this rank's GPU")
    local = launched.local_rank or 0
    return Ranks(
        rank=launched.rank,
        local_rank=local,
        world_size=launched.world_size,
        launcher=launched.launcher,
        device=_device(local),
        variables=launched.variables,
    )


def _environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment variables that are not empty."""
    return {name: value for name, value in (os.environ if env is None else env).items() if value.strip()}


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # Slurm and containers may show a rank only its own GPU, which then is number 0 whatever the local rank.
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def start(
    *, deepspeed: bool = False, group: bool = False, timeout: float = 1800.0, threads: int | None = None
) -> Ranks:
    """Find the ranks, choose device and CPU threads, and start the default process group. Collective.

    Args:
        deepspeed: Also prepare the process for DeepSpeed (its accelerator choice, its rank variables).
        group: Start a process group even for a single rank (FSDP2 needs one; so does DeepSpeed).
        timeout: Seconds after which a collective that a rank did not enter fails, in groups made later too. Ranks wait
            for each other to start as long, but at most ``rendezvous.LONGEST_WAIT``.
        threads: CPU threads of this rank. None: cores of this machine divided by the ranks on it, on CPU.

    Returns:
        This process's ranks.

    Raises:
        ValueError: The environment's variables of ranks contradict each other.
        OSError: Ranks did not come, or cannot reach each other.
    """
    ranks = find_ranks()
    unused = variables_of_ranks(_environment()) if ranks.launcher == "python" else ""
    if unused:
        print(
            f"one process, although {unused}: no launcher (torchrun, srun, ...) started it as a rank", file=sys.stderr
        )
    if (ranks.world_size > 1 or group or deepspeed) and not dist.is_initialized():
        if ranks.device.type == "cuda":
            torch.cuda.set_device(ranks.device)
        limit, start_limit = timedelta(seconds=timeout), timedelta(seconds=min(timeout, LONGEST_WAIT))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if ranks.device.type == "cuda" else "gloo",
            store=_store(ranks, timeout),
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=start_limit,
        )
        distributed_c10d._set_pg_timeout(limit)
        distributed_c10d._get_default_store().set_timeout(limit)
        # Groups of a device mesh (HSDP) and of DeepSpeed take these defaults, 30 minutes, not the default group's.
        distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = limit
    if threads is None and ranks.device.type == "cpu":
        threads = max(1, len(os.sched_getaffinity(0)) // _ranks_on_this_machine())
    if threads is not None:
        torch.set_num_threads(threads)
    if deepspeed:
        _prepare_deepspeed(ranks)
    return ranks


# Variables that may change a result or show how it was made; none of them holds a secret.
_REPORTED_PREFIXES = (
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
    """Collect facts about this process's start from the environment, for the manifest of a run.

    Args:
        env: The environment; None: the process's own.

    Returns:
        ``host``; ``slurm`` (job, restarts, nodes) or None; ``environment``, variables of libraries that may change a
        result.
    """
    env = _environment(env)
    slurm = {
        "job_id": env.get("SLURM_JOB_ID"),
        "restart_count": read_integer(env, "SLURM_RESTART_COUNT") if "SLURM_RESTART_COUNT" in env else 0,
        "nodes": env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST"),
    }
    return {
        "host": socket.gethostname(),
        "slurm": slurm if slurm["job_id"] else None,
        "environment": {name: env[name] for name in sorted(env) if name.startswith(_REPORTED_PREFIXES)},
    }


def find_launcher(env: Mapping[str, str] | None = None) -> tuple[int, ...]:
    """Find the processes of the launcher above this rank that should outlive it.

    Once one of them has ended, other processes are returned.

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
    # deepspeed's process on each machine sets it; that process is a child of the one that the user started.
    if "CROSS_RANK" not in env:
        return ()
    try:
        stat = Path(f"/proc/{parent}/stat").read_text()
    except OSError:  # the parent has just ended, or this is not Linux
        return (os.getppid(),)
    return parent, int(stat.rpartition(")")[2].split()[1])


def shutdown() -> None:
    """End the process group, if there is one. Collective."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _ranks_on_this_machine() -> int:
    """Count the ranks with this rank's host name. Collective once there is a process group."""
    if not dist.is_initialized():
        return 1
    names: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    return names.count(socket.gethostname())


def _store(ranks: Ranks, timeout: float) -> dist.Store | None:
    """Open the store in which the ranks find each other; None: torch opens its own, under several agents of torchrun.

    Under torchrun the ranks have been started together, and its agent holds the store. With a static rendezvous
    (torchrun --master-port) torchrun 2.13 keeps one store for all its restarts, and there a new rank would find the
    addresses of the ranks that are gone. Several agents may have counted different restarts.
    """
    if ranks.world_size == 1:  # needs no address and no port, whatever an earlier launcher has left over
        return dist.HashStore()
    address, port = _rendezvous_address(ranks)
    wait, env = min(timeout, LONGEST_WAIT), os.environ
    if ranks.launcher == "torch" and env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        if env.get("GROUP_WORLD_SIZE") != "1":
            return None
        try:
            agent = dist.TCPStore(address, port, ranks.world_size, False, timeout=timedelta(seconds=wait))
        except dist.DistError as error:
            raise OSError(
                f"no torchrun at {address}:{port} (MASTER_ADDR, MASTER_PORT): the variables are left over from a shell "
                "that torchrun has started (unset TORCHELASTIC_USE_AGENT_STORE, RANK and WORLD_SIZE), or it has ended"
            ) from error
        agent.set_timeout(timedelta(seconds=timeout))
        return dist.PrefixStore(f"attempt {env['TORCHELASTIC_RESTART_COUNT']}", agent)
    variables = f"{ranks.variables}, MASTER_ADDR={address}, MASTER_PORT={port}"
    rendezvous = Rendezvous(
        address=address, port=port, rank=ranks.rank, world_size=ranks.world_size, variables=variables
    )
    store = wait_for_ranks(rendezvous, wait)
    store.set_timeout(timedelta(seconds=timeout))
    return store


def _rendezvous_address(ranks: Ranks) -> tuple[str, int]:
    """Return MASTER_ADDR and MASTER_PORT, and set them where the launcher did not."""
    env = _environment()
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env]
    if missing:
        if ranks.launcher == "mpi":
            address, port = mpi_rendezvous_address(ranks.world_size, ranks.variables)
        elif ranks.launcher == "slurm":
            job = read_integer(env, "SLURM_JOB_ID") if "SLURM_JOB_ID" in env else 0
            step = read_integer(env, "SLURM_STEP_ID") if "SLURM_STEP_ID" in env else 0
            address = first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", ""))
            port = _FIRST_PORT + (7 * job + step) % _NUM_PORTS
        else:
            raise ValueError(
                f"{ranks.variables}, but {' and '.join(missing)} not set: set them or use torchrun for several ranks; "
                "for one process unset RANK and WORLD_SIZE, which are left over"
            )
        env = {"MASTER_ADDR": address, "MASTER_PORT": str(port)} | env
        os.environ.update({name: env[name] for name in missing})
    port = read_integer(env, "MASTER_PORT")
    if not 0 < port < 1 << 16:
        raise ValueError(f"MASTER_PORT={port}: needs a port, 1 to 65535")
    return env["MASTER_ADDR"], port


def _prepare_deepspeed(ranks: Ranks) -> None:
    # DeepSpeed reads the rank from the environment in many places, whoever started the process group.
    os.environ.update(RANK=str(ranks.rank), WORLD_SIZE=str(ranks.world_size), LOCAL_RANK=str(ranks.local_rank))
    if ranks.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # DeepSpeed calls collectives by the names they had before torch 2.13: nothing that its user could change.
    warnings.filterwarnings("ignore", message="`torch.distributed.*` is deprecated", category=FutureWarning)
    if ranks.device.type == "cpu":
        # Else the first init compiles a shared-memory extension, which takes minutes and leaves a lock if killed.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False, verbose=False)
