"""Ranks find themselves under every launcher, and fail together."""

import os
import socket
import sys
import time
import types

import pytest
import torch
import torch.distributed as dist

from seft_dist.session import launchers
from seft_dist.session.agreement import check_agreement, on_all_ranks
from seft_dist.session.distributed import find_ranks, start
from seft_dist.session.rendezvous import Rendezvous, first_host, mpi_rendezvous_address, wait_for_ranks
from tests.ranks import run_ranks


def test_an_error_on_one_rank_stops_all() -> None:
    def on_rank(rank: int, world: int) -> str:
        def work() -> None:
            if rank == 1:
                raise ValueError("no disk")

        with pytest.raises(ValueError) as caught:
            on_all_ranks(start(), work)
        return str(caught.value)

    assert run_ranks(on_rank, 2) == ["rank 1: no disk"] * 2


def test_a_failing_disk_on_one_rank_stops_all() -> None:
    def on_rank(rank: int, world: int) -> str:
        def work() -> None:
            if rank == 0:
                raise PermissionError(13, "Permission denied", "metrics.jsonl")

        with pytest.raises(OSError) as caught:
            on_all_ranks(start(), work)
        return str(caught.value)

    assert run_ranks(on_rank, 2) == ["rank 0: [Errno 13] Permission denied: 'metrics.jsonl'"] * 2


@pytest.mark.long
def test_groups_made_later_have_the_timeout_too() -> None:
    """Those of a device mesh, as HSDP makes it, and of DeepSpeed would wait for half an hour."""

    def on_rank(rank: int, world: int, port: str) -> float:
        dist.barrier()  # the other one may still be connecting
        dist.destroy_process_group()  # of run_ranks
        os.environ["MASTER_PORT"] = port
        start(timeout=2)
        group = dist.init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")).get_group("replicate")
        begin = time.monotonic()
        if rank == 1:
            time.sleep(20)  # hangs, then is gone
        else:
            with pytest.raises(RuntimeError, match="[Tt]imed out"):
                dist.all_reduce(torch.ones(1), group=group)
        return time.monotonic() - begin

    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    assert run_ranks(on_rank, 2, port)[0] < 15


def test_agreement_of_one_process() -> None:
    check_agreement(find_ranks({}), "anything")


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, (0, 0, 1, "python")),
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "SLURM_PROCID": "0"}, (3, 1, 4, "torch")),
        (
            {
                "OMPI_COMM_WORLD_RANK": "2",
                "OMPI_COMM_WORLD_LOCAL_RANK": "0",
                "OMPI_COMM_WORLD_SIZE": "4",
                "SLURM_PROCID": "1",
            },
            (2, 0, 4, "mpi"),
        ),
        ({"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8"}, (5, 1, 8, "slurm")),
        (
            {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "PMI_RANK": "5", "PMI_SIZE": "8"},
            (5, 1, 8, "slurm"),
        ),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}, (0, 0, 1, "python")),  # a batch script
    ],
)
def test_ranks_are_found_under_every_launcher(env: dict[str, str], expected: tuple[int, int, int, str]) -> None:
    ranks = find_ranks(env)
    assert (ranks.rank, ranks.local_rank, ranks.world_size, ranks.launcher) == expected


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"RANK": "", "WORLD_SIZE": " "}, (0, 1, "python")),
        ({"RANK": "", "WORLD_SIZE": "8"}, (0, 1, "python")),
        ({"RANK": "3"}, (0, 1, "python")),
        # LaunchParameters=use_interactive_step: salloc opens a shell in a step of one task
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"}, (0, 1, "slurm")),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, (0, 1, "python")),
        # one torchrun on each node, numbered in its own way
        (
            {
                "RANK": "0",
                "WORLD_SIZE": "4",
                "SLURM_PROCID": "1",
                "SLURM_STEP_NUM_TASKS": "2",
                "TORCHELASTIC_RUN_ID": "x",
            },
            (0, 4, "torch"),
        ),
        # a launcher of one's own on each node
        ({"RANK": "2", "WORLD_SIZE": "4", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, (2, 4, "torch")),
        ({"RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}, (0, 1, "torch")),
    ],
)
def test_variables_that_were_left_over(env: dict[str, str], expected: tuple[int, int, str]) -> None:
    ranks = find_ranks(env)
    assert (ranks.rank, ranks.world_size, ranks.launcher) == expected


@pytest.mark.parametrize(
    ("terminal", "task", "expected"),
    [
        (True, False, (0, 1, "python")),  # srun --ntasks 4 --pty bash, and in it python: the shell is the step's task
        (True, True, (3, 4, "slurm")),  # srun --ntasks 4 --pty python
        (False, False, (3, 4, "slurm")),  # in such a shell: srun --ntasks 4 apptainer exec ... python
    ],
)
def test_a_shell_of_srun(
    terminal: bool, task: bool, expected: tuple[int, int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launchers, "_has_terminal", lambda: terminal)
    monkeypatch.setattr(launchers, "_is_task_of_slurm", lambda: task)
    ranks = find_ranks({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PTY_PORT": "40001"})
    assert (ranks.rank, ranks.world_size, ranks.launcher) == expected


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK=4 with WORLD_SIZE=4: needs a rank below the number of ranks"),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, "below the number of ranks"),
        ({"RANK": "first", "WORLD_SIZE": "4"}, "RANK='first' in the environment: needs a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "1e1"}, "WORLD_SIZE='1e1' in the environment"),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "none"}, "LOCAL_RANK='none' in the environment"),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "-2"}, "LOCAL_RANK=-2"),
        ({"SLURM_PROCID": "x", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID='x'"),
        # of a notebook's terminal, and then mpirun or srun
        (
            {
                **{"RANK": "0", "WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "1"},
                **{"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            },
            "RANK=0, WORLD_SIZE=8, but OMPI_COMM_WORLD_RANK=1, OMPI_COMM_WORLD_SIZE=2",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "8", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "3"},
            "RANK=0, WORLD_SIZE=8, but SLURM_PROCID=0, SLURM_STEP_NUM_TASKS=3",
        ),
    ],
)
def test_variables_that_cannot_be_are_named(env: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_ranks(env)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def rendezvous_of(port: int, rank: int, world_size: int) -> Rendezvous:
    variables = f"RANK={rank}, WORLD_SIZE={world_size}"
    return Rendezvous(address="127.0.0.1", port=port, rank=rank, world_size=world_size, variables=variables)


def test_ranks_meet_and_missing_ones_are_named(capfd: pytest.CaptureFixture[str]) -> None:
    def on_rank(rank: int, world: int, port: int, other: int) -> str:
        store = wait_for_ranks(rendezvous_of(port, rank, world), 60)
        store.set(f"at {rank}", "here")
        assert store.get(f"at {1 - rank}") == b"here"
        try:
            wait_for_ranks(rendezvous_of(other, 2 * rank, 5), 3, notice=1)  # as ranks 0 and 2 of 5
        except OSError as error:
            return str(error)
        return ""

    said = run_ranks(on_rank, 2, free_port(), free_port())
    assert said[0].startswith("rank 1, 3 to 4 of 5 did not come within 3 s. RANK=0, WORLD_SIZE=5 say that there are 5")
    assert "unset RANK WORLD_SIZE" in said[0]
    assert said[1].startswith(("rank 1, 3 to 4 of 5 did not come", "rank 2 lost rank 0 at 127.0.0.1:"))
    assert "waiting for rank 1, 3 to 4 of 5 (RANK=0, WORLD_SIZE=5)" in capfd.readouterr().err


def test_places_where_nobody_can_meet() -> None:
    with pytest.raises(TimeoutError, match="rank 1 found no rank 0 at 127.0.0.1:.* within 1 s. RANK=1, WORLD_SIZE=2"):
        wait_for_ranks(rendezvous_of(free_port(), 1, 2), 1)
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen(1)
        port = int(other.getsockname()[1])
        with pytest.raises(OSError, match=f"MASTER_PORT={port} is in use"):
            wait_for_ranks(rendezvous_of(port, 0, 2), 5)


def test_two_processes_of_one_rank() -> None:
    def on_rank(rank: int, world: int, port: int) -> str:
        try:
            wait_for_ranks(rendezvous_of(port, min(rank, 1), 3), 4)
        except (OSError, ValueError) as error:
            return type(error).__name__ + str(error)
        return ""

    said = run_ranks(on_rank, 3, free_port())
    assert any(text.startswith("ValueErrortwo processes are rank 1 at 127.0.0.1:") for text in said[1:])


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "8"}, "MASTER_ADDR and MASTER_PORT not set"),
        ({"RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ""}, "but MASTER_PORT not set"),
        ({"RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "here", "MASTER_PORT": "many"}, "MASTER_PORT='many'"),
        ({"RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "here", "MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
    ],
)
def test_start_names_what_is_wrong_with_the_place(
    env: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        start(timeout=2)


def test_one_process_needs_no_place(capfd: pytest.CaptureFixture[str]) -> None:
    """A busy port, or another machine's address, of an earlier launcher does not matter to it."""

    def on_rank(rank: int, world: int, port: str) -> float:
        dist.destroy_process_group()  # of run_ranks
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            del os.environ[name]
        os.environ.update(MASTER_ADDR="192.0.2.1", MASTER_PORT=port, SLURM_NTASKS="4", RANK="")
        ranks = start(group=True, timeout=5)
        assert (ranks.world_size, dist.get_world_size()) == (1, 1)
        total = torch.ones(1)
        dist.all_reduce(total, group=dist.new_group([0]))
        return float(total)

    with socket.socket() as other:
        other.bind(("", 0))
        other.listen(1)
        assert run_ranks(on_rank, 1, str(other.getsockname()[1])) == [1.0]
    assert "one process, although SLURM_NTASKS=4: no launcher" in capfd.readouterr().err


def test_mpi_that_knows_another_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell that mpirun has started: the variables are there, but no mpirun is behind this process."""
    alone = types.SimpleNamespace(Get_size=lambda: 1)
    fake = types.SimpleNamespace(MPI=types.SimpleNamespace(COMM_WORLD=alone), __spec__=object())
    monkeypatch.setitem(sys.modules, "mpi4py", fake)
    with pytest.raises(ValueError, match="OMPI_COMM_WORLD_SIZE=4, but MPI itself knows 1 ranks: .*unset them"):
        mpi_rendezvous_address(4, "OMPI_COMM_WORLD_RANK=0, OMPI_COMM_WORLD_SIZE=4")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu017", "gpu017"), ("gpu[017-031,040],big1", "gpu017"), ("big1,gpu[1-2]", "big1"), ("r[1-2]n", "r1n")],
)
def test_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
