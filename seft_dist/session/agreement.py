"""Small exchanges between the ranks of a run: errors, settings, counts, objects.

With one rank nothing is sent, so that callers need no branch for a single process.
"""

import hashlib
from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from seft_dist.session.distributed import Ranks

T = TypeVar("T")


def on_all_ranks(ranks: Ranks, work: Callable[[], T]) -> T:
    """Run local work on every rank; a user's error on one of them stops all. Collective.

    Without it the other ranks would wait in their next collective for the one that failed.

    Args:
        ranks: This process.
        work: Called once on every rank; must not enter collectives.

    Returns:
        The value that ``work`` returned on this rank.

    Raises:
        ValueError: ``work`` raised it on some rank. The message names that rank, unless all ranks failed.
        OSError: Likewise; the first rank that failed decides which of the two is raised.
    """
    result, problem, cause = None, None, None
    try:
        result = work()
    except (ValueError, OSError) as error:
        if ranks.world_size == 1:
            raise
        problem, cause = (isinstance(error, OSError), str(error)), error
    failed = [(rank, one) for rank, one in enumerate(gather_objects(ranks, problem)) if one is not None]
    if failed:
        rank, (is_os_error, text) = failed[0]
        where = "" if len(failed) == ranks.world_size else f"rank {rank}: "
        raise (OSError if is_os_error else ValueError)(f"{where}{text}") from cause
    return cast(T, result)


def one_rank_per_machine_first(ranks: Ranks, work: Callable[[], T]) -> T:
    """Run work on one rank of each machine, then on the others, which use what the first has cached. Collective.

    Args:
        ranks: This process.
        work: Called once on every rank; must not enter collectives.

    Returns:
        The value that ``work`` returned on this rank.

    Raises:
        ValueError: ``work`` raised it on some rank, as in ``on_all_ranks``.
    """
    results: list[T] = []
    for is_first_turn in (True, False):
        if (ranks.local_rank == 0) == is_first_turn:
            results.append(on_all_ranks(ranks, work))
        else:
            on_all_ranks(ranks, lambda: None)
    return results[0]


def check_agreement(ranks: Ranks, settings: str) -> None:
    """Check that every rank was started with the same settings. Collective.

    Args:
        ranks: This process.
        settings: The run's settings as text, e.g. the configuration as JSON.

    Raises:
        ValueError: Ranks differ from rank 0; raised on every rank, naming those that differ.
    """
    different = unlike_the_first(ranks, settings)
    if different:
        raise ValueError(
            f"rank {different} was given another configuration than rank 0: every rank needs the same "
            "options and the same recipe and ds_config files"
        )


def unlike_the_first(ranks: Ranks, text: str) -> str:
    """Return the numbers of the ranks with another text than rank 0, "1, 3"; the same on every rank. Collective."""
    digests = gather_objects(ranks, hashlib.sha256(text.encode()).hexdigest())
    return ", ".join(str(rank) for rank, digest in enumerate(digests) if digest != digests[0])


def gather_objects(ranks: Ranks, item: T) -> list[T]:
    """Gather one picklable object from each rank, in rank order. Collective."""
    if ranks.world_size == 1:
        return [item]
    items: list[T] = [item] * ranks.world_size
    dist.all_gather_object(items, item)
    return items


def broadcast_object(ranks: Ranks, item: T) -> T:
    """Return rank 0's picklable object on every rank. Collective."""
    items = [item]
    if ranks.world_size > 1:
        dist.broadcast_object_list(items)
    return items[0]


def sum_over_ranks(ranks: Ranks, tensor: Tensor) -> Tensor:
    """Add a tensor up over the ranks, in place, and return it. Collective."""
    if ranks.world_size > 1:
        dist.all_reduce(tensor)
    return tensor


def max_over_ranks(ranks: Ranks, tensor: Tensor) -> Tensor:
    """Take the elementwise maximum over the ranks, in place, and return it. Collective."""
    if ranks.world_size > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def stack_over_ranks(ranks: Ranks, tensor: Tensor) -> Tensor:
    """Gather equally shaped tensors as [ranks, *shape], in rank order. Collective."""
    if ranks.world_size == 1:
        return tensor.unsqueeze(0)
    rows = [torch.empty_like(tensor) for _ in range(ranks.world_size)]
    dist.all_gather(rows, tensor)
    return torch.stack(rows)


def wait_for_all_ranks() -> None:
    """Return on no rank before every rank has called this. Collective."""
    if dist.is_initialized():
        dist.barrier()
