"""Checkpoints that fit any number of ranks and any backend.

A checkpoint holds what training changed, not the frozen model: for each target the mask, the deltas with moments and ages,
positions whose delta became part of the base, and a window that has begun. It is loaded on top of the pruned model.

    step-00000040/checkpoint.json                    format, step, method, shapes, fingerprints, checksums; written last
                 /rank-00000-of-00002.safetensors    what rank 0 owned, positions counted in the whole weight
                 /rank-00001-of-00002.safetensors

The folder is written under another name, synced, then renamed: a folder named step-* is complete. Nothing is unpickled.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from seft_dist.backends import Backend
from seft_dist.io.weights import write_safetensors
from seft_dist.optim.delta import Columns
from seft_dist.optim.optimizer import LayerDelta, SeftOptimizer
from seft_dist.optim.window import Window
from seft_dist.sparsity.bitmask import pack, unpack
from seft_dist.sparsity.partition import Interval, Partition

FORMAT_VERSION = 1
MANIFEST = "checkpoint.json"
_COLUMNS = [field.name for field in dataclasses.fields(Columns)]
_DENSE = ("total", "squares")  # window statistics with one value for each own weight
_SHARED = ("rows", "cols")  # the same on every rank
_FREE = ("steps", "end", "selection")  # settings that a resumed run may change: they do not alter what was done


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder, None if there is none. Local."""
    found = sorted(path.parent for path in folder.glob(f"step-*/{MANIFEST}"))
    return found[-1] if found else None


def save(seft: SeftOptimizer, folder: Path, extra: dict[str, Any], keep: int = 2) -> Path:
    """Write a checkpoint of the optimizer. **Collective.**

    Args:
        seft: An attached optimizer, between two steps.
        folder: Holds the checkpoints of a run; the new one becomes ``step-<steps>`` in it.
        extra: What the caller wants back from ``load``; JSON.
        keep: How many checkpoints stay, the new one included; older ones are removed.

    Returns:
        The checkpoint.

    Raises:
        OSError: A rank could not write (disk full, no permission); no checkpoint was added, older ones stay.
    """
    backend = seft.backend
    final = folder / f"step-{seft.num_steps:08d}"
    partial = folder / f"partial-{seft.num_steps:08d}"
    is_main = backend.owners.rank == 0 and backend.replicas.rank == 0
    _everywhere(backend, lambda: _fresh(partial) if is_main else None)
    file = partial / _file(backend.owners.rank, backend.owners.size)
    norms = [window.input_norms().square() if window is not None else None for window in _windows(seft)]
    digest = torch.zeros(32, dtype=torch.int64)

    def write() -> None:
        if backend.replicas.rank == 0:
            write_safetensors(file, _tensors(seft, norms if is_main else []), {"format": "seft_dist checkpoint"})
            digest.copy_(torch.tensor(list(_sync(file))))

    _everywhere(backend, write)
    digests = [bytes(row.tolist()).hex() for row in backend.owners.stack(digest)]

    def publish() -> None:
        if is_main:
            manifest = _manifest(seft, digests, extra)
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
            _sync(partial / MANIFEST)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(partial, final)
            _sync_folder(folder)
            for old in sorted(path.parent for path in folder.glob(f"step-*/{MANIFEST}"))[:-keep]:
                shutil.rmtree(old)

    _everywhere(backend, publish)
    return final


def load(seft: SeftOptimizer, checkpoint: Path) -> dict[str, Any]:
    """Go on from a checkpoint, on any number of ranks and any backend. **Collective.**

    Args:
        seft: A new optimizer on the pruned model that the checkpointed run started from.
        checkpoint: What ``save`` returned.

    Returns:
        The caller's ``extra``.

    Raises:
        ValueError: The checkpoint is damaged, or of another model, method or format; says what was found and needed.
    """
    seft.attach()
    backend = seft.backend
    manifest = _read_manifest(checkpoint)
    _check_fits(seft, manifest, checkpoint)

    def check_sums() -> None:
        for rank in range(backend.owners.rank, manifest["world_size"], backend.owners.size):
            _check_sum(checkpoint / _file(rank, manifest["world_size"]), manifest["sha256"][rank])

    _everywhere(backend, check_sums)
    reader = _Reader(checkpoint, manifest)
    layers = (_layer(seft, reader, manifest["targets"][i], i) for i in range(len(backend.names)))
    seft.restore(manifest["num_steps"], layers)
    return manifest["extra"]


def _file(rank: int, world_size: int) -> str:
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def _windows(seft: SeftOptimizer) -> list[Window | None]:
    return [layer.window for layer in seft.deltas()]


def _everywhere(backend: Backend, act: Any) -> None:
    """Act on every rank; if it failed anywhere, raise everywhere."""
    error: Exception | None = None
    try:
        act()
    except (OSError, ValueError, SafetensorError) as caught:
        error = caught
    failed = torch.tensor([error is not None], dtype=torch.int64)
    total = int(backend.replicas.sum(backend.owners.sum(failed)))
    if error is not None:
        raise error
    if total:
        raise OSError(f"{total} other ranks could not read or write the checkpoint; see their messages")


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _sync(file: Path) -> bytes:
    """Force a file to disk; its SHA-256."""
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())
        return hashlib.file_digest(handle, "sha256").digest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _tensors(seft: SeftOptimizer, norms: list[Tensor | None]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(seft.deltas()):
        found: dict[str, Tensor | None] = {column: getattr(layer.columns, column) for column in _COLUMNS}
        found |= {"mask": layer.mask, "committed": layer.committed, "committed_values": layer.committed_values}
        if layer.window is not None:
            found |= {f"window.{key}": getattr(layer.window, key) for key in _DENSE + _SHARED}
            found["window.norms"] = norms[i] if norms else None
        tensors |= {
            f"{layer.name}.{key}": value.cpu().contiguous() for key, value in found.items() if value is not None
        }
    return tensors


def _manifest(seft: SeftOptimizer, digests: list[str], extra: dict[str, Any]) -> dict[str, Any]:
    state, backend = seft.sparse_state, seft.backend
    window = next(iter(_windows(seft)))
    return {
        "format_version": FORMAT_VERSION,
        "num_steps": seft.num_steps,
        "method": dataclasses.asdict(seft.config),
        "world_size": backend.owners.size,
        "backend": backend.name,
        "dtype": str(backend.own(0).dtype),
        "window_steps": None if window is None else window.num_steps,
        "targets": [
            {
                "name": name,
                "shape": backend.shapes[i],
                "chunk": backend.partitions[i].chunk,
                "target": state.targets[i],
                "fingerprint": state.fingerprint[i],
            }
            for i, name in enumerate(backend.names)
        ],
        "sha256": digests,
        "extra": extra,
    }


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{checkpoint} is no complete checkpoint ({error}): choose a folder with a {MANIFEST}"
        ) from error
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{checkpoint} has format version {version}, this program reads {FORMAT_VERSION}: use the program that wrote it"
        )
    return manifest


def _check_fits(seft: SeftOptimizer, manifest: dict[str, Any], checkpoint: Path) -> None:
    state, backend = seft.sparse_state, seft.backend
    found = {target["name"]: target for target in manifest["targets"]}
    differing = sorted(set(found) ^ set(backend.names))
    if differing:
        raise ValueError(f"{checkpoint} is of another model or of other targets: {differing[:3]} are only on one side")
    for name, shape in zip(backend.names, backend.shapes, strict=True):
        if tuple(found[name]["shape"]) != shape:
            raise ValueError(f"{checkpoint}: {name} has shape {found[name]['shape']}, the model's is {list(shape)}")
    for name, fingerprint in zip(backend.names, state.fingerprint, strict=True):
        if found[name]["fingerprint"] != fingerprint:
            raise ValueError(
                f"{checkpoint} was made from another base model: the weights of {name} differ; load the pruned model it "
                "began with"
            )
    ours = dataclasses.asdict(seft.config)
    changed = [
        f"{key}={manifest['method'].get(key)!r} there, {value!r} here"
        for key, value in ours.items()
        if key not in _FREE and manifest["method"].get(key) != value
    ]
    if changed:
        raise ValueError(f"{checkpoint} was made with another method: {'; '.join(changed)}; use the same settings")


def _check_sum(file: Path, expected: str) -> None:
    with open(file, "rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != expected:
        raise ValueError(
            f"{file} is damaged: SHA-256 {found[:12]}..., written with {expected[:12]}...; use an older checkpoint"
        )


class _Reader:
    """Parts of a checkpoint's tensors for any interval, whoever wrote them."""

    def __init__(self, checkpoint: Path, manifest: dict[str, Any]) -> None:
        self.window_steps: int | None = manifest["window_steps"]
        self._checkpoint, self._world_size = checkpoint, manifest["world_size"]
        self._open: dict[int, Any] = {}
        self._keys: dict[int, set[str]] = {}

    def _handle(self, rank: int) -> Any:
        if rank not in self._open:
            self._open[rank] = safe_open(self._checkpoint / _file(rank, self._world_size), framework="pt")
            self._keys[rank] = set(self._open[rank].keys())
        return self._open[rank]

    def get(self, rank: int, key: str) -> Tensor | None:
        """A tensor of one rank's file, None if it is not there."""
        handle = self._handle(rank)
        return handle.get_tensor(key) if key in self._keys[rank] else None

    def overlapping(self, target: dict[str, Any], interval: Interval) -> list[tuple[int, Interval]]:
        """Ranks that wrote a part of the interval, and what they owned."""
        rows, columns = target["shape"]
        partition = Partition(rows * columns, target["chunk"], self._world_size)
        owned = [(rank, partition.interval(rank)) for rank in range(self._world_size)]
        return [(rank, own) for rank, own in owned if max(own.start, interval.start) < min(own.stop, interval.stop)]


def _layer(seft: SeftOptimizer, reader: _Reader, target: dict[str, Any], i: int) -> LayerDelta:
    """This rank's part of one target."""
    backend, name = seft.backend, target["name"]
    interval, device = backend.interval(i), backend.device
    parts: dict[str, list[Tensor]] = {key: [] for key in [*_COLUMNS, "committed", "committed_values", "mask", *_DENSE]}
    for rank, own in reader.overlapping(target, interval):
        begin, end = max(own.start, interval.start), min(own.stop, interval.stop)

        def want(key: str, rank: int = rank) -> Tensor:
            value = reader.get(rank, f"{name}.{key}")
            assert value is not None
            return value

        parts["mask"].append(unpack(want("mask"), len(own))[begin - own.start : end - own.start])
        for keys, positions in ((_COLUMNS, want("indices")), (["committed", "committed_values"], want("committed"))):
            inside = (positions >= begin) & (positions < end)
            for key in keys:
                parts[key].append(want(key)[inside])
        for key in _DENSE:
            dense = reader.get(rank, f"{name}.window.{key}")
            if dense is not None:
                parts[key].append(dense[begin - own.start : end - own.start])
    empty = backend.own(i)[:0].cpu()
    kinds = {
        "indices": torch.int32,
        "age": torch.int32,
        "committed": torch.int32,
        "committed_values": empty.dtype,
        "mask": torch.bool,
    }
    whole = {
        key: torch.cat([torch.empty(0, dtype=kinds.get(key, torch.float32)), *values]).to(device)
        for key, values in parts.items()
    }
    return LayerDelta(
        name=name,
        shape=backend.shapes[i],
        interval=interval,
        mask=pack(whole["mask"]),
        target=target["target"],
        columns=Columns(**{key: whole[key] for key in _COLUMNS}),
        committed=whole["committed"],
        committed_values=whole["committed_values"],
        window=_window(seft, reader, name, i, {key: whole[key] for key in _DENSE if parts[key]}),
    )


def _window(seft: SeftOptimizer, reader: _Reader, name: str, i: int, dense: dict[str, Tensor]) -> Window | None:
    if reader.window_steps is None:
        return None
    backend = seft.backend
    window = seft.new_window(i)
    window.num_steps = reader.window_steps
    for key, value in dense.items():
        setattr(window, key, value)
    for key in _SHARED:
        setattr(window, key, reader.get(0, f"{name}.window.{key}"))
    # A sum over all ranks: one of them carries it on.
    if backend.owners.rank == 0 and backend.replicas.rank == 0:
        window.norms = reader.get(0, f"{name}.window.norms")
    return window
