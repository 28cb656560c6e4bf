"""Run one function on several gloo ranks, forked from the test process (0.1 s instead of 9 s for spawned ones)."""

import ctypes
import gc
import multiprocessing as mp
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any


def _main(
    pipe: Connection,
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    store: str,
    timeout: float,
    args: Any,
    backend: str,
) -> None:
    import torch
    import torch.distributed as dist

    gc.freeze()  # DeepSpeed collects garbage often: 0.7 s each time if all modules of the test process are looked at
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
    )
    try:
        dist.init_process_group(
            backend, init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
        )
        result = (True, fn(rank, world_size, *args))
    except BaseException:
        result = (False, traceback.format_exc())
    # Plain pickle: the pipe's own pickler would share tensors through a process that is about to end.
    try:
        pipe.send_bytes(pickle.dumps(result))
    except Exception:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    pipe.close()
    os._exit(0 if result[0] else 1)  # no destructors: a rank whose peer failed must not wait for it here


def return_freed_memory() -> None:
    """Return freed blocks to the system at once, so that measurements do not include the allocator's cache."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-3, 1 << 18)  # M_MMAP_THRESHOLD
    libc.malloc_trim(0)  # also what tests before this one have left


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 150,
    start: str = "fork",
    backend: str = "gloo",
) -> list[Any]:
    """Run ``fn(rank, world_size, *args)`` on every rank of a new process group.

    Args:
        fn: Function that each rank runs; it may be local. Its return value is pickled back.
        world_size: Number of ranks.
        timeout: Seconds for all ranks together; then the remaining ones (and only they) are killed.
        start: "fork", or "spawn" for ranks that use a CUDA device or several threads (``fn`` must then be a module's
            own function).
        backend: Backend of torch.distributed.

    Returns:
        Each rank's return value, in rank order.

    Raises:
        AssertionError: A rank failed or did not end; the text holds every rank's traceback.
    """
    context: Any = mp.get_context(start)
    with tempfile.TemporaryDirectory() as folder:
        ranks, pipes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_main, args=(theirs, fn, rank, world_size, f"{folder}/store", timeout, args, backend)
            )
            process.start()
            theirs.close()
            ranks.append(process)
            pipes.append(ours)
        results = _collect(ranks, pipes, timeout)
    failed = [f"--- rank {rank}\n{text}" for rank, (good, text) in enumerate(results) if not good]
    assert not failed, "\n".join(failed)
    return [value for _, value in results]


def _collect(ranks: list[Any], pipes: list[Connection], timeout: float) -> list[tuple[bool, Any]]:
    deadline = time.monotonic() + timeout
    results: dict[int, tuple[bool, Any]] = {}
    try:
        while len(results) < len(ranks) and time.monotonic() < deadline:
            for rank, pipe in enumerate(pipes):
                if rank not in results and pipe.poll(0.005):
                    try:
                        results[rank] = pickle.loads(pipe.recv_bytes())
                    except EOFError:
                        ranks[rank].join(1)
                        results[rank] = (False, f"died without a word, exit code {ranks[rank].exitcode}")
                    if not results[rank][0]:
                        deadline = min(deadline, time.monotonic() + 5)  # give the others time to fail too
    finally:
        for process in ranks:
            process.join(0.5 if process.pid and len(results) == len(ranks) else 0)
            if process.is_alive():
                process.kill()
                process.join()
    return [results.get(rank, (False, "did not end in time (killed)")) for rank in range(len(ranks))]
