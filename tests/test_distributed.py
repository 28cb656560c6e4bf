"""Ranks find themselves under every launcher, and fail together."""

import os
import socket
import time

import pytest
import torch
import torch.distributed as dist

from seft_dist.training.distributed import check_agreement, find_ranks, start, together
from seft_dist.training.rendezvous import first_host
from tests.ranks import run_ranks


def test_an_error_on_one_rank_stops_all() -> None:
    def on_rank(rank: int, world: int) -> str:
        def work() -> None:
            if rank == 1:
                raise ValueError("no disk")

        with pytest.raises(ValueError) as caught:
            together(start(), work)
        return str(caught.value)

    assert run_ranks(on_rank, 2) == ["rank 1: no disk"] * 2


def test_groups_made_later_have_the_timeout_too() -> None:
    """Those of a device mesh, as HSDP makes it, and of DeepSpeed would wait for half an hour."""

    def on_rank(rank: int, world: int, port: str) -> float:
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


def test_impossible_rank() -> None:
    with pytest.raises(ValueError, match="below the number of ranks"):
        find_ranks({"RANK": "4", "WORLD_SIZE": "4", "LOCAL_RANK": "0"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu017", "gpu017"), ("gpu[017-031,040],big1", "gpu017"), ("big1,gpu[1-2]", "big1"), ("r[1-2]n", "r1n")],
)
def test_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
