"""Fingerprints of a run's inputs and results: short texts that are equal if and only if the contents are.

None of them depends on the number of ranks, the backend, how a model is cut into files, where things lie, or the
versions of libraries; so two people can compare them.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

from seft_dist.io.parent import ParentModel
from seft_dist.io.source import Source
from seft_dist.io.weight_files import SafetensorError
from seft_dist.kernels.bits import hash_of_bits
from seft_dist.kernels.fingerprint import fingerprint, hash_of_weight
from seft_dist.session.agreement import gather_objects, on_all_ranks, sum_over_ranks, unlike_the_first
from seft_dist.session.distributed import Ranks
from seft_dist.sparsity.casts import cast_weight
from seft_dist.sparsity.hashes import hash_of_set
from seft_dist.training.method import Method

_PIECE = 1 << 24  # number of values that a rank reads at a time
_SEQUENCES = 1 << 14
# Entries of config.json that describe how the file was made, or that loading and training overwrite.
_NOT_THE_MODEL = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures")

_OTHER_HEADS = ("summary_", "classifier_")  # settings of heads that a causal LM does not have


def model_fingerprint(source: Source, method: Method, ranks: Ranks) -> str:
    """Fingerprint of a model as it was loaded: every weight, and config.json. Collective.

    The method has hashed the targets in its shards; the ranks share the work of reading the other weights from the
    files. The result does not depend on which weights are targets, nor on the type in which weights are held unless
    it changes their values.

    Args:
        source: Files that the model was loaded from.
        method: The method, attached to the model.
        ranks: This process.

    Returns:
        32 hexadecimal digits.

    Raises:
        ValueError: A file cannot be read.
    """
    targets = _weight_names(method)
    others = sorted(source.weights.tensors.keys() - targets.keys())
    tensors = source.weights.tensors
    pieces = [(i, start) for i, name in enumerate(others) for start in range(0, tensors[name].numel, _PIECE)]
    prints = torch.zeros(len(others), dtype=torch.int64)

    def read() -> None:
        for i, start in pieces[ranks.rank :: ranks.world_size]:
            stop = min(start + _PIECE, tensors[others[i]].numel)
            try:
                values = source.weights.read(others[i], start, stop)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{tensors[others[i]].file} cannot be read: {error}") from error
            values, _ = cast_weight(values, source.dtype)
            prints[i] += fingerprint(values, start)

    on_all_ranks(ranks, read)
    sum_over_ranks(ranks, prints)
    known = dict(zip(others, prints.tolist(), strict=True))
    known |= {name: method.fingerprints[i] for name, i in targets.items()}
    rows = [[name, list(tensors[name].shape) if name in tensors else None, known[name]] for name in sorted(known)]
    settings = json.loads((source.folder / "config.json").read_text())
    settings = {key: value for key, value in settings.items() if key not in _NOT_THE_MODEL}
    return _digest(json.dumps([settings, rows], sort_keys=True).encode())


def parent_fingerprint(parent: ParentModel, method: Method, ranks: Ranks) -> str:
    """Fingerprint of the model from which pruned weights come back, by some of its values. Collective.

    Raises:
        ValueError: A file cannot be read, or ranks see different parents; raised on every rank.
    """
    found = on_all_ranks(ranks, lambda: parent.fingerprint(method.target_names))
    different = unlike_the_first(ranks, found)
    if different:
        raise ValueError(
            f"rank {different} reads another parent than rank 0: every rank needs the same files, e.g. in a "
            "folder that all nodes share"
        )
    return found


def data_fingerprint(sequences: Any, ranks: Ranks) -> str:
    """Fingerprint of the tokenised sequences: lengths, tokens and labels, in their order. Collective.

    Each rank hashes its share.

    Args:
        sequences: The data, from ``load_sequences``.
        ranks: This process.

    Returns:
        32 hexadecimal digits.
    """
    count = len(sequences)

    def piece(start: int) -> bytes:
        digest = hashlib.sha256()
        for values in sequences.contents(start, min(start + _SEQUENCES, count)):
            digest.update(values.data)
        return digest.digest()

    digests = _shared_out(list(range(0, count, _SEQUENCES)), piece, ranks)
    return _digest(f"{count} ".encode() + b"".join(digests))


def with_order(data: str, order: str) -> str:
    """Let the fingerprint of the sequences depend on an order of theirs that is not the usual one.

    Args:
        data: From ``data_fingerprint``.
        order: ``BatchStream.order``.
    """
    return _digest(f"{data}{order}".encode()) if order else data


def topology_hashes(method: Method) -> dict[str, list[str]]:
    """Hashes of each target's support, mask and weights as they are now. Collective.

    Returns:
        Name to [support, mask, weight], 16 hexadecimal digits each.
    """
    backend, rows = method.backend, []
    for i, (support, mask) in enumerate(method.topology()):
        interval = backend.interval(i)
        hashes = [hash_of_set(support), hash_of_bits(mask, len(interval), interval.start)]
        rows.append(torch.stack([*hashes, hash_of_weight(backend.own(i), interval.start)]))
    table = backend.owners.sum(torch.stack(rows)).tolist()
    return {name: [as_hex(value) for value in row] for name, row in zip(method.target_names, table, strict=True)}


def has_dropout(settings: dict[str, Any]) -> bool:
    """Return whether a model draws random numbers in training, by its config.json."""
    rates = {key: value for key, value in settings.items() if "drop" in key and not key.startswith(_OTHER_HEADS)}
    return any(isinstance(value, (int, float)) and value > 0 for value in rates.values())


def as_hex(value: int) -> str:
    """Write a 64-bit hash as 16 hexadecimal digits."""
    return f"{value & (1 << 64) - 1:016x}"


def _weight_names(method: Method) -> dict[str, int]:
    """Return the names of the targets' parameters, each with the target's number."""
    holders = zip(method.target_names, method.backend.holders, strict=True)
    return {holder.weight_name(name): i for i, (name, holder) in enumerate(holders)}


def _shared_out(items: Sequence[int], digest: Callable[[int], bytes], ranks: Ranks) -> list[bytes]:
    """Compute the digests of all items, each on one rank. Collective."""
    own = [digest(item) for item in items[ranks.rank :: ranks.world_size]]
    every = gather_objects(ranks, own)
    return [every[i % ranks.world_size][i // ranks.world_size] for i in range(len(items))]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
