"""Writing of checkpoints: the state is copied between two steps, and a thread on each rank writes the copy."""

import dataclasses
import json
import os
import shutil
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from seft_dist.backends import Backend
from seft_dist.files.writing import sync_folder
from seft_dist.io.checkpoint.files import (
    FORMAT_VERSION,
    io_on_all_ranks,
    rank_file,
    sync_and_hash,
    tidy,
    write_manifest,
)
from seft_dist.io.weights import write_safetensors
from seft_dist.optim.optimizer import SeftOptimizer
from seft_dist.optim.restoring import WINDOW_SUMS, parts_of
from seft_dist.optim.state import State

KEEP = 2
"""Default number of checkpoints of a run that are kept."""


def save(seft: SeftOptimizer, folder: Path | str, extra: dict[str, Any], keep: int = KEEP) -> Path:
    """Write a checkpoint of the optimizer and wait until it is on disk. Collective.

    Args:
        seft: An attached optimizer, between two steps.
        folder: Folder of the run's checkpoints; the new one becomes ``step-<steps>`` in it.
        extra: Values that the caller gets back from ``load``; they must fit JSON.
        keep: Number of checkpoints to keep, the new one included; older ones are removed.

    Returns:
        Folder of the checkpoint.

    Raises:
        OSError: A rank could not write (disk full, no permission); no checkpoint was added, and older ones are kept.
    """
    saver = Saver(seft, folder, keep)
    saver.start(extra)
    written = saver.finish()
    assert written is not None
    return written


class Checkpointed(Protocol):
    """The attributes of a training method that are needed to write its checkpoints."""

    num_steps: int
    """Number of optimizer steps done."""

    @property
    def backend(self) -> Backend:
        """Backend that holds the weights."""


class BackgroundSaver(ABC):
    """Writes the checkpoints of a run in the background, one at a time.

        saver.start(extra)                      # copies the state; training may go on
        ...
        if <saver.written on every rank>: saver.finish()      # the checkpoint exists from here on
        ...
        saver.finish()                          # before the process ends

    The thread only writes this rank's file. Everything that ranks must agree on happens in ``start`` and ``finish``, in
    the training thread, because a collective in another thread could be matched with one of training.
    """

    def __init__(self, method: Checkpointed, folder: Path | str, keep: int = KEEP) -> None:
        """Args:
        method: The method that is trained; it must be attached when the first save begins.
        folder: Folder of the run's checkpoints.
        keep: Number of checkpoints to keep; older ones are removed once a new one is complete.
        """
        assert keep >= 1
        self._checkpointed, self._folder, self._keep = method, Path(folder), keep
        self._thread: threading.Thread | None = None
        self._step = 0
        self._manifest: dict[str, Any] = {}
        self._digest = torch.zeros(32, dtype=torch.int64)
        self._error: Exception | None = None

    @property
    def written(self) -> bool:
        """This rank's part of the save that has begun is on disk, or has failed."""
        return self._thread is not None and not self._thread.is_alive()

    def start(self, extra: dict[str, Any], needs: Sequence[int] = ()) -> None:
        """Copy the state and begin to write it, after an earlier save is finished. Collective.

        Args:
            extra: Values that the caller gets back from ``load``; they must fit JSON.
            needs: Steps of earlier checkpoints that are kept as long as this one is.

        Raises:
            OSError: The earlier save failed, or the folder cannot be created; complete checkpoints are kept.
        """
        self.finish()
        backend = self._checkpointed.backend
        self._step = self._checkpointed.num_steps
        io_on_all_ranks(backend, lambda: self._make_partial() if self._is_main else None)
        described, tensors = self.content()
        described |= {"world_size": backend.owners.size, "backend": backend.name, "dtype": str(backend.dtypes[0])}
        described |= {"format_version": FORMAT_VERSION, "num_steps": self._step}
        described |= {"needs": sorted(needs)} if needs else {}
        described["extra"] = json.loads(json.dumps(extra))  # a copy, since training keeps changing the original
        self._manifest = described
        file = self._partial / rank_file(backend.owners.rank, backend.owners.size)
        self._thread = threading.Thread(target=self._write, args=(file, tensors), name="checkpoint", daemon=True)
        self._thread.start()

    @abstractmethod
    def content(self) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
        """Collect the state to be saved. Collective.

        Returns:
            ``method``, ``window_steps`` and ``targets`` of the manifest; and a copy of this rank's tensors in CPU
            memory, or None if another rank writes the same tensors.
        """

    def finish(self) -> Path | None:
        """Wait for the save that has begun, and make it the newest checkpoint. Collective.

        Returns:
            Folder of the checkpoint; None if no save had begun.

        Raises:
            OSError: A rank could not write (disk full, no permission); no checkpoint was added, and older ones are
                kept.
        """
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        backend = self._checkpointed.backend
        try:
            io_on_all_ranks(backend, self._raise_error)
            digests = [bytes(row.tolist()).hex() for row in backend.owners.stack(self._digest)]
            io_on_all_ranks(backend, lambda: self._publish(digests) if self._is_main else None)
        except OSError as error:
            if self._is_main:
                shutil.rmtree(self._partial, ignore_errors=True)  # frees the disk space
            raise OSError(f"the checkpoint of step {self._step} could not be written: {error}") from error
        return self._final

    @property
    def _is_main(self) -> bool:
        return self._checkpointed.backend.owners.rank == 0 and self._checkpointed.backend.replicas.rank == 0

    @property
    def _partial(self) -> Path:
        return self._folder / f"partial-{self._step:08d}"

    @property
    def _final(self) -> Path:
        return self._folder / f"step-{self._step:08d}"

    def _make_partial(self) -> None:
        if self._folder.is_dir():
            tidy(self._folder, self._keep)  # removes what an interrupted save has left
        self._partial.mkdir(parents=True)

    def _write(self, file: Path, tensors: dict[str, Tensor] | None) -> None:
        self._error = None
        try:
            if tensors is not None:
                write_safetensors(file, tensors, {"format": "seft_dist checkpoint"})
                self._digest.copy_(torch.tensor(list(sync_and_hash(file))))
        except (OSError, ValueError) as error:  # raised again by finish(), in the training thread
            self._error = error
        except Exception as error:  # of a kind that finish() can raise on all ranks
            self._error = OSError(f"{type(error).__name__}: {error}")
            self._error.__cause__ = error

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _publish(self, digests: list[str]) -> None:
        write_manifest(self._partial, self._manifest | {"sha256": digests})
        replaced = self._folder / f"replaced-{self._step:08d}"
        # The old checkpoint of this step is renamed, not removed: at every instant there is a complete one
        if self._final.exists():
            os.rename(self._final, replaced)
        os.rename(self._partial, self._final)
        sync_folder(self._folder)
        tidy(self._folder, self._keep)


class Saver(BackgroundSaver):
    """Writes the checkpoints of a ``SeftOptimizer``: its masks, deltas and windows."""

    def __init__(self, seft: SeftOptimizer, folder: Path | str, keep: int = KEEP) -> None:
        """Args:
        seft: The optimizer; it must be attached when the first save begins.
        folder: Folder of the run's checkpoints.
        keep: Number of checkpoints to keep; older ones are removed once a new one is complete.
        """
        super().__init__(seft, folder, keep)
        self._seft = seft

    def content(self) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
        seft = self._seft
        seft.saved_step = seft.num_steps
        windows = [layer.window for layer in seft.deltas()]
        sums = [{name: window.summed(name) for name in window.sums} if window else {} for window in windows]
        described = {
            "method": dataclasses.asdict(seft.config),
            "window_steps": None if windows[0] is None else windows[0].num_steps,
            "targets": _describe_sparse_targets(seft.backend, seft.sparse_state),
        }
        writes = seft.backend.replicas.rank == 0
        if not writes:
            return described, None
        tensors = _copies(seft, sums if self._is_main else [])
        if self._is_main:  # every rank has the same norms and biases
            for name, vector in seft.vectors.states():
                tensors |= {f"{name}.{key}": value.to("cpu", copy=True) for key, value in vector.items()}
        return described, tensors


def _copies(seft: SeftOptimizer, sums: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Copy everything that this rank owns to CPU memory, with the sums of windows if this rank writes them."""
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(seft.deltas()):
        state = parts_of(layer)
        if seft.config.reactivate != "trial":
            del state["trial"]
        for key in WINDOW_SUMS if layer.window is not None else ():
            state[f"window.{key}"] = sums[i].get(key) if sums else None
        tensors |= {
            f"{layer.name}.{key}": value.detach().to("cpu", copy=True).contiguous()
            for key, value in state.items()
            if value is not None
        }
    return tensors


def _describe_sparse_targets(backend: Backend, state: State) -> list[dict[str, Any]]:
    described = describe_targets(backend, state.mask_sizes, state.fingerprints)
    return [target | {"budget": budget} for target, budget in zip(described, state.budgets, strict=True)]


def describe_targets(backend: Backend, mask_sizes: list[int], fingerprints: list[int]) -> list[dict[str, Any]]:
    """Describe the targets for the manifest.

    Args:
        backend: Backend that holds the weights.
        mask_sizes: Number of active positions that each target has to keep.
        fingerprints: Fingerprint of each weight as it was loaded.
    """
    return [
        {
            "name": name,
            "shape": list(backend.shapes[i]),
            "chunk": backend.partitions[i].chunk,
            "target": mask_sizes[i],
            "fingerprint": fingerprints[i],
        }
        for i, name in enumerate(backend.names)
    ]
