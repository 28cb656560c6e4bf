"""Checkpoints that fit any number of ranks and any backend.

A checkpoint holds what training changed, not the frozen model: for each target the mask, the deltas with their moments,
ages and base values, the positions whose delta became part of the base, and the statistics of an unfinished window. It
is loaded on top of the pruned model.

    step-00000040/checkpoint.json                    format, step, method, shapes, fingerprints, checksums; written last
                 /rank-00000-of-00002.safetensors    what rank 0 owned, positions counted in the whole weight
                 /rank-00001-of-00002.safetensors

The folder is written under another name, synced and then renamed, so a folder named step-* is complete, and the highest
number is the newest checkpoint. Nothing is unpickled. Methods other than SEFT store other tensors in such folders
(baselines/saving.py).
"""

from seft_dist.io.checkpoint.files import DamagedError, checkpoint_of, complete, latest, read_manifest, tidy
from seft_dist.io.checkpoint.reader import load, open_checkpoint
from seft_dist.io.checkpoint.writer import KEEP, BackgroundSaver, Saver, describe_targets, save

__all__ = [
    "KEEP",
    "BackgroundSaver",
    "DamagedError",
    "Saver",
    "checkpoint_of",
    "complete",
    "describe_targets",
    "latest",
    "load",
    "open_checkpoint",
    "read_manifest",
    "save",
    "tidy",
]
