"""topology.jsonl and layers.json: where masks and supports have moved, target by target, for reports of the run.

A line of topology.jsonl, after an evolution (the choice of the first support is one too):

    {"step": 1, "evolutions": 1, "since": 0, "targets": {"model.layers.0.self_attn.q_proj": [331776, 132711], ...},
     "moved": [[0, 3318, 512, 512, 132199], ...]}

``moved`` has a row for each target, in the order of ``targets``: how many positions were dropped, grown, reactivated
and pruned since the record began, and how many active ones were active in the pruned model. Because these are totals,
lines may be left out: a run has at most ``MOST_LINES`` (fewer, where a line has many rows) and one more for each
checkpoint. Only the first line of a record has ``since``, the step after which it began (0, or that of the checkpoint
with which an older run went on), and ``targets``: for each its weights, and those that were active in the pruned model.

layers.json has ``targets``: for each its weights, zeros, wanted zeros and trainable parameters after the last step.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from seft_dist.files.writing import write_json
from seft_dist.kernels.bits import popcount
from seft_dist.optim.optimizer import SeftOptimizer
from seft_dist.optim.state import LayerSparsity
from seft_dist.session.distributed import Ranks
from seft_dist.sparsity.schedule import is_evolution, is_first_support
from seft_dist.training.method import Method
from seft_dist.training.metrics import print_line
from seft_dist.training.step_lines import StepLines

FILE, LAYERS = "topology.jsonl", "layers.json"
MOST_LINES, LEAST_LINES, MOST_ROWS = 256, 16, 400_000
"""Limits of a file, lines before checkpoints aside: of more evolutions only every second, third ... is written."""


class FirstMasks:
    """The masks of the pruned model, in this rank's interval and in the host's memory: one bit for each own weight."""

    def __init__(self, seft: SeftOptimizer) -> None:
        """Args:
        seft: The optimizer, attached, before a checkpoint is restored.
        """
        self.seft = seft
        self.masks = [layer.mask.cpu() for layer in seft.deltas()]
        self.active = [layer.mask_size for layer in seft.deltas()]

    def kept(self) -> list[int]:
        """Count, for each target, the active positions that were active in the pruned model. Collective."""
        own = [popcount(layer.mask.cpu() & first) for layer, first in zip(self.seft.deltas(), self.masks, strict=True)]
        return self.seft.backend.owners.sum(torch.tensor(own)).tolist()


def first_masks(method: Method) -> FirstMasks | None:
    """Keep the masks of the pruned model, if the method is one that can move them.

    Args:
        method: The method, attached, before a checkpoint is restored.
    """
    if isinstance(method, SeftOptimizer) and _evolutions(method, method.config.steps or 0):
        return FirstMasks(method)
    return None


def _evolutions(seft: SeftOptimizer, steps: int) -> list[int]:
    """List the steps with an evolution, the choice of the first support included, up to a step."""
    return [t for t in range(1, steps + 1) if is_first_support(seft.config, t) or is_evolution(seft.config, t)]


class Topology:
    """Adds up what evolutions move, and writes it down on rank 0."""

    def __init__(self, folder: Path, first: FirstMasks, ranks: Ranks) -> None:
        """Args:
        folder: Folder of the run.
        first: Masks of the pruned model; the optimizer has restored its checkpoint.
        ranks: This process; rank 0 writes.

        Raises:
            OSError: The file cannot be read or written.
        """
        seft = self._seft = first.seft
        self._first = first
        most_lines = min(MOST_LINES, max(LEAST_LINES, MOST_ROWS // len(seft.target_names)))
        self._every = -(-len(_evolutions(seft, seft.config.steps or 0)) // most_lines)
        self._evolutions, self._since = 0, 0
        self._moved = torch.zeros(len(seft.target_names), 4, dtype=torch.int64)
        self._pending: dict[str, Any] | None = None
        self._lines = StepLines(folder / FILE, seft.num_steps) if ranks.is_main else None
        self._is_begun = False
        if self._lines is not None:
            if self._lines.put_aside is not None:
                print_line(f"{folder / FILE} had lines that cannot be read: it is now {self._lines.put_aside.name}")
            self._go_on(StepLines.read(folder / FILE))

    def _go_on(self, lines: dict[int, dict[str, Any]]) -> None:
        """Take over the totals of the last line, or begin anew if it is not that of the last evolution."""
        done = _evolutions(self._seft, self._seft.num_steps)
        if not done:
            return
        self._since = self._seft.num_steps
        try:
            last = lines[done[-1]]
            moved = torch.tensor([row[:4] for row in last["moved"]], dtype=torch.int64)
            evolutions = int(last["evolutions"])
        except (KeyError, TypeError, ValueError):
            return
        if moved.shape == self._moved.shape and any("targets" in line for line in lines.values()):
            self._moved, self._evolutions, self._is_begun = moved, evolutions, True

    def step(self) -> None:
        """Record the evolution of the step that was just done, if there was one. Collective in such a step."""
        report = self._seft.evolution
        if report is None:
            return
        kept = self._first.kept()
        if self._lines is None:
            return
        self._moved += torch.tensor(report.moved)
        self._evolutions += 1
        rows = torch.cat([self._moved, torch.tensor(kept).view(-1, 1)], 1)
        self._pending = {"step": report.step, "evolutions": self._evolutions, "moved": rows.tolist()}
        if not self._is_begun or self._evolutions % self._every == 0:
            self._write()

    def _write(self) -> None:
        if self._lines is None or self._pending is None:
            return
        if not self._is_begun:
            sizes = zip(self._seft.backend.partitions, self._first.active, strict=True)
            targets = dict(zip(self._seft.target_names, [[p.numel, active] for p, active in sizes], strict=True))
            moved = self._pending.pop("moved")
            self._pending |= {"since": self._since, "targets": targets, "moved": moved}
        self._lines.add(self._pending)
        self._pending, self._is_begun = None, True

    def sync(self) -> None:
        """Force what was recorded to disk, up to the last evolution: a run that goes on from here adds to it."""
        self._write()
        if self._lines is not None:
            self._lines.sync()

    def close(self) -> None:
        """Close the file."""
        if self._lines is not None:
            self._lines.close()


def write_layers(folder: Path, layers: Sequence[LayerSparsity]) -> None:
    """Write layers.json. On rank 0.

    Args:
        folder: Folder of the run.
        layers: Counts after the last step.
    """
    rows = {
        layer.name: {
            "numel": layer.numel,
            "zeros": layer.zeros,
            "target": layer.numel - layer.mask_size,
            "trained": layer.support,
        }
        for layer in layers
    }
    write_json(folder / LAYERS, {"targets": rows})
