"""Variables that launchers set for their ranks: those meant for this process, and those that were left over.

The environment itself is read in ``distributed``; here it is a mapping.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Launcher, and its variables for rank, number of ranks, rank on the machine.
_LAUNCHERS = (
    ("torch", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("mpi", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("mpi", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


@dataclass(frozen=True, kw_only=True)
class LauncherRanks:
    """Rank and world size that a launcher has given this process."""

    launcher: str
    """"torch" (torchrun, deepspeed, accelerate, or by hand), "mpi" or "slurm"."""
    rank: int
    world_size: int
    local_rank: int | None
    """None: the launcher has set no variable for it."""
    variables: str
    """The variables that the numbers came from, for messages, e.g. "RANK=0, WORLD_SIZE=8"."""


def read_ranks(env: Mapping[str, str]) -> LauncherRanks | None:
    """Find the rank and world size that a launcher has given this process.

    Launchers are asked from the innermost outwards: under ``srun torchrun`` it is torchrun that counts.

    Args:
        env: The environment, without empty variables.

    Returns:
        Rank and world size; None if no launcher has started this process as one of its ranks.

    Raises:
        ValueError: Variables are no numbers, or contradict each other or an outer launcher's.
    """
    for launcher, rank, world_size, local_rank in _LAUNCHERS:
        if not _complete(env, launcher, rank, world_size, local_rank):
            continue
        number, size = read_integer(env, rank), read_integer(env, world_size)
        local = read_integer(env, local_rank) if local_rank in env else None
        if not 0 <= number < size:
            raise ValueError(f"{rank}={number} with {world_size}={size}: needs a rank below the number of ranks")
        if local is not None and local < 0:
            raise ValueError(f"{local_rank}={local}: needs this rank's number on its machine, 0 or more")
        if launcher == "torch" and size > 1:
            _check_launchers_agree(env, number, size)
        variables = f"{rank}={number}, {world_size}={size}"
        return LauncherRanks(launcher=launcher, rank=number, world_size=size, local_rank=local, variables=variables)
    return None


def read_integer(env: Mapping[str, str], name: str) -> int:
    """Read a variable that must be a whole number.

    Raises:
        ValueError: It is none; names the variable and its value.
    """
    try:
        return int(env[name])
    except ValueError:
        raise ValueError(
            f"{name}={env[name]!r} in the environment: needs a whole number; unset it if no launcher is meant"
        ) from None


def variables_of_ranks(env: Mapping[str, str]) -> str:
    """List variables of several ranks, for a process that no launcher has started; "" if there are none.

    Args:
        env: The environment, without empty variables.
    """
    names = [name for name in ("RANK", "WORLD_SIZE") if name in env]
    names += [name for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE") if env.get(name, "1") != "1"]
    return ", ".join(f"{name}={env[name]}" for name in names)


def without_local_rank(argv: Sequence[str]) -> list[str]:
    """Leave out the option ``--local_rank``, which DeepSpeed's launcher adds: the environment says the rank."""
    kept, skip = [], False
    for argument in argv:
        if skip:
            skip = False
        elif argument in ("--local_rank", "--local-rank"):
            skip = True
        elif not argument.startswith(("--local_rank=", "--local-rank=")):
            kept.append(argument)
    return kept


def _complete(env: Mapping[str, str], launcher: str, rank: str, world_size: str, local_rank: str) -> bool:
    """Return whether a launcher has set its variables for this process itself."""
    # A batch script has SLURM_PROCID too, but only a process started by srun has SLURM_STEP_NUM_TASKS. With its PMI
    # plug-in srun also sets PMI_RANK, but no local rank beside it: that is Slurm's business, not MPI's.
    if rank not in env or world_size not in env or (launcher == "mpi" and local_rank not in env):
        return False
    return launcher != "slurm" or not _typed_in_a_step(env)


def _typed_in_a_step(env: Mapping[str, str]) -> bool:
    """Return whether this process was typed into a shell that srun --pty has opened: then the shell is the step's task.

    A step that was started from such a shell has the variable too, but no terminal; srun --pty python has no shell.
    """
    return "SLURM_PTY_PORT" in env and _has_terminal() and not _is_task_of_slurm()


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _is_task_of_slurm() -> bool:
    try:
        return Path(f"/proc/{os.getppid()}/comm").read_text().strip() == "slurmstepd"
    except OSError:  # not Linux
        return False


def _check_launchers_agree(env: Mapping[str, str], number: int, size: int) -> None:
    """Refuse RANK and WORLD_SIZE that an earlier shell has left over to processes that mpirun or srun has started."""
    # torchrun and deepspeed start one agent for each outer task, whose variables remain.
    if "TORCHELASTIC_RUN_ID" in env or "CROSS_RANK" in env:
        return
    for launcher, rank, world_size, local_rank in _LAUNCHERS[1:]:
        if not _complete(env, launcher, rank, world_size, local_rank):
            continue
        outer, tasks = read_integer(env, rank), read_integer(env, world_size)
        if tasks > 1 and (size % tasks or number * tasks // size != outer):
            raise ValueError(
                f"RANK={number}, WORLD_SIZE={size}, but {rank}={outer}, {world_size}={tasks}: one of them is left over "
                f"from another launcher; unset RANK and WORLD_SIZE, or {rank} and {world_size}"
            )
