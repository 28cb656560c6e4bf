"""Ranks are killed with SIGKILL while they save; whatever the moment, the newest complete checkpoint is whole."""

import ctypes
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from seft_dist.io import checkpoint
from tests.layouts import build
from tests.models import batch, moving, prune_, tiny_llama
from tests.ranks import run_ranks

STEPS, KILLS = 6, 30
CONFIG = moving(density=0.05, interval=2, steps=STEPS)
# What Python tells its audit hooks when a file or folder is touched
TOUCHES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.scandir", "shutil.rmtree")


def train_and_save(folder: Path, rank: int, world_size: int, keep: int = 2, done: Any = None) -> None:
    """Go on from the newest checkpoint to the last step, with a save after each."""
    model = prune_(tiny_llama())
    called, seft, backward, step = build("fsdp", CONFIG, model)
    newest = checkpoint.latest(folder)
    if newest is not None:
        checkpoint.load(seft, newest)
    saver = checkpoint.Saver(seft, folder, keep)
    for t in range(seft.num_steps, STEPS):
        part = {key: value[rank * 2 : rank * 2 + 2] for key, value in batch(t, size=2 * world_size).items()}
        backward(called(**part).loss)
        step()
        saver.start({"step": t + 1})
        saver.finish()
        if done is not None and rank == 0:
            done.value = t + 1


def _victim(rank: int, store: str, folder: Path, pids: Any, done: Any, kill_at: int, victims: tuple[int, ...]) -> None:
    """A rank that kills itself, or everybody, when it touches the checkpoints for the kill_at-th time."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # dies with the test
    touched = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal touched
        if event in TOUCHES and str(args[0]).startswith(str(folder)):
            touched += 1
            if touched == kill_at and rank == victims[0]:
                for other in victims[1:]:
                    os.kill(pids[other], signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)  # a fork has its parent's thread pool without the threads, and would wait for them
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)  # the survivor's complaint about the rank that is gone
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    pids[rank] = os.getpid()
    dist.barrier()
    sys.addaudithook(hook)
    train_and_save(folder, rank, 2, done=done)
    dist.barrier()
    os._exit(0)


def crash(folder: Path, store: Path, kill_at: int, victims: tuple[int, ...]) -> tuple[list[int | None], int]:
    """Run two ranks until the kill; exit codes, and the last step whose save was reported as done."""
    context = multiprocessing.get_context("fork")
    pids, done = context.Array("i", 2, lock=False), context.Value("i", 0, lock=False)
    args = (str(store), folder, pids, done, kill_at, victims)
    ranks = [context.Process(target=_victim, args=(rank, *args)) for rank in range(2)]
    for process in ranks:
        process.start()
    end = time.monotonic() + 120
    for process in ranks:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    assert None not in codes, "a rank did not stop within two minutes after the other was killed"
    return codes, done.value


def assert_equal_files(found: Path, expected: Path) -> None:
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in found.iterdir()) == names
    for name in names:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), f"{found / name} is not as uninterrupted"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_any_instant_of_a_save(tmp_path: Path) -> None:
    """One rank, the other, or both; the run goes on from what is left, to the very bytes of the uninterrupted one."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    run_ranks(lambda rank, world: train_and_save(whole, rank, world, keep=STEPS), 2)
    draw = random.Random(0)
    killed, finished, saved = 0, 0, 0
    while killed < KILLS:
        victims = draw.choice([(0,), (1,), (0, 1), (1, 0)])
        kill_at = draw.randint(1, 60 if victims[0] == 0 else 12)
        codes, done = crash(folder, tmp_path / f"store-{killed}-{finished}", kill_at, victims)
        saved = max(saved, done)
        newest = checkpoint.latest(folder)
        if saved:
            assert newest is not None and int(newest.name[-8:]) >= saved, (
                f"a finished save is lost ({victims}, {kill_at})"
            )
        for path in checkpoint.complete(folder):
            assert_equal_files(path, whole / path.name.replace("replaced", "step"))
        if codes == [0, 0]:
            assert newest is not None and newest.name == f"step-{STEPS:08d}"
            finished, saved = finished + 1, 0
            shutil.rmtree(folder)
        else:
            assert -signal.SIGKILL in codes, codes
            killed += 1
    assert finished >= 3  # else the kills always came so early that there was nothing to lose


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 192 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=192k", "none", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_loses_nothing(small_disk: Path) -> None:
    def on_rank(rank: int, world_size: int) -> int:
        with pytest.raises(OSError, match=r"step \d could not be written: .*(No space left|os error 28)"):
            train_and_save(small_disk, rank, world_size, keep=STEPS)
        return len(checkpoint.complete(small_disk))

    kept = run_ranks(on_rank, 2)
    assert kept[0] == kept[1] > 0
    assert sorted(path.name for path in small_disk.iterdir()) == [f"step-{i + 1:08d}" for i in range(kept[0])]
    for path in checkpoint.complete(small_disk)[:-1]:
        shutil.rmtree(path)
    run_ranks(lambda rank, world: train_and_save(small_disk, rank, world, keep=1), 2)  # room again: it goes on
    assert [path.name for path in small_disk.iterdir()] == [f"step-{STEPS:08d}"]


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """A quota, as the kernel reports it."""

    def on_rank(rank: int, world_size: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        with pytest.raises(OSError, match="could not be written"):
            train_and_save(tmp_path / "run", rank, world_size)

    run_ranks(on_rank, 2)
    assert checkpoint.latest(tmp_path / "run") is None
