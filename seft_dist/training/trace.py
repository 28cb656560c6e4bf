"""trace.jsonl: what each optimizer step did, exactly, so that two runs can be compared step by step and layer by layer.

    {"step": 3, "batch": "9c..", "loss": "0x1.2p+2", "grad_norm": "0x1.8p-1", "lr": "0x1.0p-10", "tokens": 256,
     "layers": {"model.layers.0.self_attn.q_proj": ["support", "mask", "deltas", "weights", [1, 2, 3, 4, 5, 6, 7, 8]]},
     "topology": {"model.layers.0.self_attn.q_proj": [[8 numbers], [8 numbers], 2]}}

Floats are in hexadecimal notation, without rounding. ``batch`` hashes the sequences that were learnt, as a set. A layer
has hashes of the positions of its support and mask, of its deltas, and of the model's weights at the support; the
numbers are a sketch of the deltas, from which the distance to another run's is estimated (sparsity/hashes.py).
``topology``, in steps with an evolution only, has sketches of support and mask, and the number of positions that a
selection took or left by so little that rounding could have decided (optim/collectives.py, ``near_ties``). Values and
positions that are equal give equal lines, whatever the layout.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seft_dist.data.batches import Batch
from seft_dist.data.sequences import IGNORE
from seft_dist.optim.optimizer import SeftOptimizer
from seft_dist.session.agreement import sum_over_ranks
from seft_dist.session.distributed import Ranks
from seft_dist.sparsity.bitmask import unpack
from seft_dist.sparsity.hashes import BUCKETS, hash_of_entries, hash_of_set, sketch
from seft_dist.sparsity.scores import mix
from seft_dist.training.fingerprint import as_hex
from seft_dist.training.progress import print_line
from seft_dist.training.step_lines import StepLines, as_ranges

FILE = "trace.jsonl"


class Trace:
    """Hashes each rank's part of every step, adds the parts up, and writes them down on rank 0."""

    def __init__(self, folder: Path, seft: SeftOptimizer, ranks: Ranks) -> None:
        """Args:
        folder: Folder of the run.
        seft: The optimizer; the steps that it has done already stay in the file, later ones of an earlier attempt are
            removed.
        ranks: This process; rank 0 writes.

        Raises:
            OSError: The file cannot be read or written.
        """
        self._seft, self._ranks = seft, ranks
        self._masks: list[tuple[Tensor, Tensor]] | None = None
        self._seft.counts_near_ties = True
        self._lines = StepLines(folder / FILE, seft.num_steps) if ranks.is_main else None
        if self._lines is not None:
            if self._lines.put_aside is not None:
                print_line(f"{folder / FILE} had lines that cannot be read: it is now {self._lines.put_aside.name}")
            missing = set(range(1, seft.num_steps + 1)) - set(self._lines.steps)
            if missing:
                print_line(f"{folder / FILE} has no line for steps {as_ranges(missing)}")

    @torch.no_grad()
    def step(self, step: int, micro_batches: list[Batch], *, loss: float, tokens: int, lr: float) -> None:
        """Record one optimizer step, after it was done. Collective; two small sums.

        Args:
            step: Counted from 1.
            micro_batches: This rank's batches.
            loss: Mean over the ranks.
            tokens: Number of tokens of this step, over all ranks.
            lr: Learning rate of this step.
        """
        seft = self._seft
        batch = sum((hash_of_batch(one) for one in micro_batches), torch.zeros((), dtype=torch.int64))
        sum_over_ranks(self._ranks, batch)
        moved = seft.evolution is not None or self._masks is None
        table = seft.backend.owners.sum(self._rows(moved)).tolist()
        # In the first step of an attempt there may be no evolution that could have had near-ties.
        near = (seft.evolution and seft.evolution.near_ties) or [0] * len(table)
        if self._lines is None:
            return
        record: dict[str, Any] = {
            "step": step,
            "batch": as_hex(int(batch)),
            "loss": float(loss).hex(),
            "grad_norm": float(seft.grad_norm).hex(),
            "lr": float(lr).hex(),
            "tokens": tokens,
            "layers": {
                name: [*map(as_hex, row[:4]), row[4 : 4 + BUCKETS]]
                for name, row in zip(seft.target_names, table, strict=True)
            },
        }
        if moved:
            middle = 4 + 2 * BUCKETS
            record["topology"] = {
                name: [row[4 + BUCKETS : middle], row[middle:], ties]
                for name, row, ties in zip(seft.target_names, table, near, strict=True)
            }
        self._lines.add(record)

    def _rows(self, moved: bool) -> Tensor:
        """Compute this rank's terms of the hashes and sketches, int64 [targets, 4 + 3 BUCKETS]."""
        seft = self._seft
        if moved or self._masks is None:
            self._masks = [
                _mask_terms(layer.mask, layer.interval.start, len(layer.interval)) for layer in seft.deltas()
            ]
        rows = []
        for i, layer in enumerate(seft.deltas()):
            positions, deltas = layer.columns.indices, layer.columns.values
            weights = seft.backend.load(i, seft.sparse_state.memory_indices[i])
            hashes = [
                hash_of_set(positions),
                self._masks[i][0],
                hash_of_entries(positions, deltas),
                hash_of_entries(positions, weights),
            ]
            sketches = [sketch(positions, deltas), sketch(positions), self._masks[i][1]]
            rows.append(torch.cat([torch.stack(hashes), *sketches]))
        return torch.stack(rows)

    def sync(self) -> None:
        """Force what was written to disk."""
        if self._lines is not None:
            self._lines.sync()

    def close(self) -> None:
        """Close the file."""
        if self._lines is not None:
            self._lines.close()


def hash_of_batch(batch: Batch) -> Tensor:
    """Hash the sequences of a batch, int64 [] on the CPU; their order and padding change nothing.

    A sequence without a loss token adds nothing: a rank for which a step has no sequence left gets such a one.
    """
    ids, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
    there = batch["attention_mask"].cpu() if "attention_mask" in batch else torch.ones_like(ids)
    token_positions = torch.arange(ids.shape[1]).expand_as(ids)
    tokens = mix(mix(token_positions + 1) + mix(ids * 2 + (labels != IGNORE))) * there
    learnt = (labels != IGNORE).any(1)
    return mix(tokens.sum(1))[learnt].sum()


def read_trace(folder: Path) -> Iterator[dict[str, Any]]:
    """Read the steps of a run's trace, floats as floats; none if there is no trace.

    Raises:
        ValueError: A line cannot be read.
    """
    path = folder / FILE
    if not path.is_file():
        return
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            if line.endswith("\n"):  # the last one may have been cut when the run was stopped
                try:
                    record = json.loads(line)
                    yield record | {key: float.fromhex(record[key]) for key in ("loss", "grad_norm", "lr")}
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise ValueError(f"line {number} of {path} is damaged: {error!r}") from error


def _mask_terms(mask: Tensor, start: int, numel: int) -> tuple[Tensor, Tensor]:
    positions = unpack(mask, numel).nonzero().view(-1) + start
    return hash_of_set(positions), sketch(positions)
