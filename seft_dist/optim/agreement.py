"""Raising an error on all ranks if one has it: a rank that goes on alone would wait in a collective for ever."""

from collections.abc import Callable, Sequence

import torch

from seft_dist.backends import Backend

_MESSAGE_BYTES = 1000


def raise_on_all_ranks(
    backend: Backend, act: Callable[[], object], kinds: Sequence[type[Exception]] = (ValueError,)
) -> None:
    """Call a function on every rank, and raise on all of them if it failed on any. Collective.

    Args:
        backend: Knows the ranks.
        act: The function; it must not enter collectives.
        kinds: Exceptions that it may raise, the most serious last; an error counts as the first of them that it is.

    Raises:
        Exception: The most serious kind that a rank raised, with the message of the first rank that raised it.
    """
    error: Exception | None = None
    try:
        act()
    except tuple(kinds) as caught:
        error = caught
    kind = 0 if error is None else 1 + next(i for i, each in enumerate(kinds) if isinstance(error, each))
    failures = backend.replicas.stack(backend.owners.stack(torch.tensor([kind]))).view(-1)
    if not failures.any():
        return
    words = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8)
    text = str(error or "").encode()[:_MESSAGE_BYTES]
    words[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    table = backend.replicas.stack(backend.owners.stack(words)).view(-1, _MESSAGE_BYTES)
    worst = int(failures.argmax())
    message = bytes(table[worst].tolist()).rstrip(b"\0").decode(errors="replace")
    where = "" if error is not None else f"rank {worst}: "
    raise kinds[int(failures[worst]) - 1](f"{where}{message}") from error
