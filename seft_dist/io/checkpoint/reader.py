"""Reading of a checkpoint into any layout: each rank reads those parts of the files that its own intervals need."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from seft_dist.backends import Backend
from seft_dist.config import SeftConfig
from seft_dist.io.checkpoint.files import DamagedError, io_on_all_ranks, rank_file, read_manifest, verify_checksum
from seft_dist.io.checkpoint.schema import CheckpointManifest, TargetEntry
from seft_dist.optim.delta import Columns
from seft_dist.optim.optimizer import SeftOptimizer
from seft_dist.optim.restoring import (
    COLUMNS,
    WINDOW_OWN,
    WINDOW_SHARED,
    WINDOW_SUMS,
    Limits,
    begin_as,
    check_layers,
    check_part,
    holds_result,
)
from seft_dist.optim.state import LayerDelta
from seft_dist.optim.vectors import KEYS as VECTOR_KEYS
from seft_dist.optim.window import Needs, Window
from seft_dist.sparsity.bitmask import pack, unpack
from seft_dist.sparsity.partition import Interval, Partition

_MAY_CHANGE = ("steps", "end", "swap_end", "selection")
"""Settings that a resumed run may change, because they do not alter the steps already done."""
_MAY_CHANGE_OUTSIDE_WINDOWS = ("window_store", "window_candidates")
"""Further settings that a resumed run may change if the checkpoint holds no unfinished window."""
_TRAINED_SINCE = (
    "the model has been trained since it was loaded and does not hold the weights of that step: load the pruned model "
    "again, or the weights of that step, and make a new SeftOptimizer"
)


def load(seft: SeftOptimizer, checkpoint: Path | str) -> dict[str, Any]:
    """Restore an optimizer from a checkpoint, on any number of ranks and any backend. Collective.

    Args:
        seft: A new optimizer on the pruned model that the checkpointed run started from; or any optimizer on the model
            with the weights that it had when the checkpoint was written, bit for bit (e.g. loaded by another library).
        checkpoint: Folder of the checkpoint, as ``save`` returned it.

    Returns:
        The ``extra`` that was given to ``save``.

    Raises:
        DamagedError: A file is missing, truncated or altered; the model was not changed.
        ValueError: The checkpoint belongs to another model, method or format; the message names both.
    """
    if checkpoint is None:  # what ``latest`` returns before the first save
        raise ValueError("there is no checkpoint to load yet: call load only if latest(folder) is not None")
    seft.attach()
    checkpoint, backend, state = Path(checkpoint), seft.backend, seft.sparse_state

    def check_method(loaded: CheckpointManifest) -> None:
        _check_method(seft, loaded, checkpoint)

    manifest = open_checkpoint(checkpoint, backend, None, check_method)
    wrong = None if seft.num_steps else _other_base(backend, state.fingerprints, manifest, checkpoint)
    if wrong is not None and manifest["dtype"] != str(backend.dtypes[0]):
        raise ValueError(wrong)
    is_base = wrong is None and not seft.num_steps
    reader = _Reader(checkpoint, manifest)
    targets = {target["name"]: target for target in manifest["targets"]}
    layers: list[LayerDelta] = []
    vectors: dict[str, dict[str, Tensor]] = {}

    def read() -> None:
        try:
            vectors.update(_vectors(seft, reader))
            layers.extend(_layer(seft, reader, targets[name], i) for i, name in enumerate(backend.names))
            if is_base:
                check_layers(layers, backend, seft.config, state, manifest["num_steps"])
        except (ValueError, SafetensorError) as error:
            raise DamagedError(f"{checkpoint} is damaged: {error}; use an older checkpoint") from error

    io_on_all_ranks(backend, read)
    if not is_base:
        if not holds_result(layers, backend):
            raise ValueError(wrong or f"{checkpoint} is of step {manifest['num_steps']}, and {_TRAINED_SINCE}")
        entries = [targets[name] for name in backend.names]
        fingerprints = [entry["fingerprint"] for entry in entries]
        begin_as(state, backend, seft.config, layers, fingerprints, [entry.get("budget") for entry in entries])
    seft.restore(manifest["num_steps"], layers, vectors)
    return manifest["extra"]


def open_checkpoint(
    checkpoint: Path,
    backend: Backend,
    fingerprints: list[int] | None,
    check_method: Callable[[CheckpointManifest], None],
) -> CheckpointManifest:
    """Check that a checkpoint is intact, and that it belongs to this model and method. Collective.

    Args:
        checkpoint: Folder of the checkpoint.
        backend: Backend that holds the weights.
        fingerprints: Fingerprint of each target's weight as it was loaded; None: they are not compared.
        check_method: Raises a ValueError if the checkpoint belongs to another method; the same on every rank.

    Returns:
        The content of checkpoint.json.

    Raises:
        DamagedError: A file is missing, truncated or altered.
        ValueError: The checkpoint belongs to another model, method or format; the message names both.
    """
    io_on_all_ranks(backend, lambda: read_manifest(checkpoint))
    manifest = read_manifest(checkpoint)
    _check_model(backend, manifest, checkpoint)
    other = None if fingerprints is None else _other_base(backend, fingerprints, manifest, checkpoint)
    if other is not None:
        raise ValueError(other)
    check_method(manifest)

    def verify_checksums() -> None:
        for rank in range(backend.owners.rank, manifest["world_size"], backend.owners.size):
            verify_checksum(checkpoint / rank_file(rank, manifest["world_size"]), manifest["sha256"][rank])

    io_on_all_ranks(backend, verify_checksums)
    return manifest


def _check_model(backend: Backend, manifest: CheckpointManifest, checkpoint: Path) -> None:
    entries = {target["name"]: target for target in manifest["targets"]}
    only_there, only_here = entries.keys() - set(backend.names), set(backend.names) - entries.keys()
    for where, names in (("there", only_there), ("here", only_here)):
        if names:
            raise ValueError(
                f"{checkpoint} is of another model or of other targets: {len(names)} weights are only {where}, e.g. "
                f"{min(names)}; load the pruned model it began with, with the same targets"
            )
    for name, shape in zip(backend.names, backend.shapes, strict=True):
        if tuple(entries[name]["shape"]) != shape:
            raise ValueError(
                f"{checkpoint} is of another model: {name} has shape {entries[name]['shape']} there, {list(shape)} "
                "here; load the pruned model it began with"
            )


def _other_base(
    backend: Backend, fingerprints: list[int], manifest: CheckpointManifest, checkpoint: Path
) -> str | None:
    """Say in which weight a model differs from the one that the checkpointed run began with; None if in none."""
    entries = {target["name"]: target for target in manifest["targets"]}
    for name, fingerprint in zip(backend.names, fingerprints, strict=True):
        if entries[name]["fingerprint"] != fingerprint:
            here = str(backend.dtypes[0])
            types = f" (held as {manifest['dtype']} there, as {here} here)" if manifest["dtype"] != here else ""
            return (
                f"{checkpoint} was made from another base model: the weights of {name} differ{types}; load the pruned "
                "model it began with"
            )
    return None


def _check_method(seft: SeftOptimizer, manifest: CheckpointManifest, checkpoint: Path) -> None:
    free = _MAY_CHANGE if manifest["window_steps"] else _MAY_CHANGE + _MAY_CHANGE_OUTSIDE_WINDOWS
    ours = json.loads(json.dumps(dataclasses.asdict(seft.config)))
    by_price = manifest["method"].get("swap_fraction") or (
        manifest["method"].get("adapt") == "curvature" and manifest["method"].get("reactivation")
    )
    if by_price and "swap_end" not in manifest["method"]:
        raise ValueError(
            f"{checkpoint} was written by an earlier version, whose evolutions had another price of weights (swaps, "
            "adapt curvature): go on with that version, or begin the run anew"
        )
    # The default of an option that the writer did not know yet does what the writer did
    theirs = dataclasses.asdict(SeftConfig(pattern=None)) | manifest["method"]
    changed = [
        f"{key}={value!r} there, {repr(ours[key]) if key in ours else 'unknown'} here"
        for key, value in theirs.items()
        if key not in free and ours.get(key) != value
    ]
    if changed:
        raise ValueError(f"{checkpoint} was made with another method: {'; '.join(changed)}; use the same settings")


class _Reader:
    """Reads the parts of a checkpoint's tensors that overlap an interval, from the files of any ranks."""

    def __init__(self, checkpoint: Path, manifest: CheckpointManifest) -> None:
        self.num_steps: int = manifest["num_steps"]
        self.window_steps: int | None = manifest["window_steps"]
        self.world_size: int = manifest["world_size"]
        self._checkpoint = checkpoint
        self._open: dict[int, Any] = {}
        self._keys: dict[int, set[str]] = {}

    def _handle(self, rank: int) -> Any:
        if rank not in self._open:
            self._open[rank] = safe_open(self._checkpoint / rank_file(rank, self.world_size), framework="pt")
            self._keys[rank] = set(self._open[rank].keys())
        return self._open[rank]

    def get(self, rank: int, key: str) -> Tensor | None:
        """Read a tensor from one rank's file; None if the file does not hold it."""
        handle = self._handle(rank)
        return handle.get_tensor(key) if key in self._keys[rank] else None

    def part(self, rank: int, name: str) -> dict[str, Tensor]:
        """Read everything that one rank wrote of a target, by the last part of the tensors' names."""
        window = (*WINDOW_OWN, *WINDOW_SHARED, *WINDOW_SUMS) if self.window_steps else ()
        keys = (*COLUMNS, "mask", "committed", "committed_values", "trial", *(f"window.{key}" for key in window))
        values = {key: self.get(rank, f"{name}.{key}") for key in keys}
        return {key: value for key, value in values.items() if value is not None}

    def overlapping(self, target: TargetEntry, interval: Interval) -> list[tuple[int, Interval]]:
        """Find the ranks that wrote a part of an interval, and the intervals that they owned."""
        rows, columns = target["shape"]
        partition = Partition(rows * columns, target["chunk"], self.world_size)
        owned = [(rank, partition.interval(rank)) for rank in range(self.world_size)]
        return [(rank, own) for rank, own in owned if max(own.start, interval.start) < min(own.stop, interval.stop)]


def _read_parts(seft: SeftOptimizer, reader: _Reader, target: TargetEntry, i: int) -> dict[str, list[Tensor]]:
    """Read the parts of one target that overlap this rank's interval, check them, and cut them to it.

    The writer's intervals and this rank's interval cut the flattened weight at different positions. Positions are
    stored relative to the whole weight, so values are selected by position; masks are unpacked and sliced, since the
    borders need not be multiples of 8.

    Returns:
        Pieces of each tensor, in the order of their positions.
    """
    backend, name, interval = seft.backend, target["name"], seft.backend.interval(i)
    parts: dict[str, list[Tensor]] = {
        key: [] for key in [*COLUMNS, "committed", "committed_values", "trial", "mask", *WINDOW_OWN]
    }
    for rank, own in reader.overlapping(target, interval):
        stored = reader.part(rank, name)
        check_part(
            stored,
            Limits(
                f"{rank_file(rank, reader.world_size)}: {name}",
                backend.shapes[i],
                backend.experts[i],
                own,
                backend.dtypes[i],
                backend.position_dtype,
                seft.config,
                reader.num_steps,
                reader.window_steps or 0,
            ),
        )
        begin, end = max(own.start, interval.start), min(own.stop, interval.stop)
        parts["mask"].append(unpack(stored["mask"], len(own))[begin - own.start : end - own.start])
        committed = (("committed", "committed_values"), stored["committed"])
        for keys, positions in ((COLUMNS, stored["indices"]), committed):
            inside = (positions >= begin) & (positions < end)
            for key in keys:
                parts[key].append(stored[key][inside])
        if (trial := stored.get("trial")) is not None:
            parts["trial"].append(trial[(trial >= begin) & (trial < end)])
        kept = stored.get("window.positions")
        which = slice(begin - own.start, end - own.start) if kept is None else (kept >= begin) & (kept < end)
        for key in WINDOW_OWN:
            if f"window.{key}" in stored:
                parts[key].append(stored[f"window.{key}"][which])
    return parts


def _layer(seft: SeftOptimizer, reader: _Reader, target: TargetEntry, i: int) -> LayerDelta:
    """Assemble this rank's part of one target from the files that overlap it."""
    backend, name = seft.backend, target["name"]
    parts = _read_parts(seft, reader, target, i)
    kinds = {
        "indices": backend.position_dtype,
        "age": torch.int32,
        "committed": backend.position_dtype,
        "committed_values": backend.dtypes[i],
        "trial": backend.position_dtype,
        "mask": torch.bool,
        "positions": backend.position_dtype,
    }
    whole = {
        key: torch.cat(values or [torch.empty(0, dtype=kinds.get(key, torch.float32))]).to(backend.device)
        for key, values in parts.items()
    }
    return LayerDelta(
        name=name,
        shape=backend.shapes[i],
        interval=backend.interval(i),
        mask=pack(whole["mask"]),
        mask_size=target["target"],
        columns=Columns(**{key: whole[key] for key in COLUMNS}),
        committed=whole["committed"],
        committed_values=whole["committed_values"],
        trial=whole["trial"],
        window=_window(seft, reader, name, i, {key: whole[key] for key in WINDOW_OWN if parts[key]}),
    )


def _vectors(seft: SeftOptimizer, reader: _Reader) -> dict[str, dict[str, Tensor]]:
    """Read the states of norms and biases, which are in the first rank's file, and check them."""
    states = {}
    for name in seft.vectors.names:
        state = {key: reader.get(0, f"{name}.{key}") for key in VECTOR_KEYS}
        states[name] = {key: tensor for key, tensor in state.items() if tensor is not None}
    seft.vectors.check_state(states)
    return states


def _window(seft: SeftOptimizer, reader: _Reader, name: str, i: int, own: dict[str, Tensor]) -> Window | None:
    """Restore this rank's part of an unfinished window; None if there is none, or the next step begins one."""
    if not reader.window_steps:
        return None
    backend = seft.backend
    window = seft.new_window(i, reader.num_steps - reader.window_steps + 1)
    window.num_steps = reader.window_steps
    if seft.config.window_store == "candidates":  # a rank without candidates has empty tensors, not missing ones
        empty = torch.empty(0, dtype=torch.float32, device=backend.device)
        own = {"positions": empty.to(backend.position_dtype), "total": empty} | own
    for key, value in own.items():
        setattr(window, key, value)
    shared = {key: reader.get(0, f"{name}.window.{key}") for key in (*WINDOW_SHARED, *WINDOW_SUMS)}
    needs = Needs.of(seft.config)
    for key in [*needs.sums, *(WINDOW_SHARED if needs.dense and needs.momentum else ())]:
        if shared[key] is None:
            raise ValueError(f"{rank_file(0, reader.world_size)}: {name}.window.{key} is missing; needs it")
    # These are sums over all ranks, to be summed over ranks again at the end: only one rank may hold them.
    carries = backend.owners.rank == 0 and backend.replicas.rank == 0
    for key in (*WINDOW_SHARED, *(WINDOW_SUMS if carries else ())):
        statistic = shared[key]
        setattr(window, key, None if statistic is None else statistic.to(backend.device))
    return window
