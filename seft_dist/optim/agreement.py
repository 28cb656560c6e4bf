"""What one rank finds wrong, all ranks raise: none of them goes on alone into a collective that never ends."""

from collections.abc import Callable, Sequence

import torch

from seft_dist.backends import Backend

_MESSAGE_BYTES = 1000


def raise_on_all_ranks(
    backend: Backend, act: Callable[[], object], kinds: Sequence[type[Exception]] = (ValueError,)
) -> None:
    """Act on every rank; if it failed anywhere, raise raise_on_all_ranks, with the words of the first that failed. Collective.

    Args:
        backend: Whose ranks act.
        act: Must not enter collectives.
        kinds: What it may raise, the most serious last; an error counts as the first of them that it is.

    Raises:
        Exception: Of the most serious kind that a rank raised.
    """
    error: Exception | None = None
    try:
        act()
    except tuple(kinds) as caught:
        error = caught
    kind = 0 if error is None else 1 + next(i for i, each in enumerate(kinds) if isinstance(error, each))
    found = backend.replicas.stack(backend.owners.stack(torch.tensor([kind]))).view(-1)
    if not found.any():
        return
    words = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8)
    text = str(error or "").encode()[:_MESSAGE_BYTES]
    words[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    table = backend.replicas.stack(backend.owners.stack(words)).view(-1, _MESSAGE_BYTES)
    worst = int(found.argmax())
    message = bytes(table[worst].tolist()).rstrip(b"\0").decode(errors="replace")
    where = "" if error is not None else f"rank {worst}: "
    raise kinds[int(found[worst]) - 1](f"{where}{message}") from error
