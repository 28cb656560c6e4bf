"""The command of a planned run: options of seft train, and the line that submits it."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from seft_dist.config import PlanConfig, SeftConfig
from seft_dist.planning.layout import Layout


def train_options(config: PlanConfig, layout: Layout) -> list[str]:
    """Return the options of seft train for a planned run.

    A plan knows neither models nor text, so model.path, parent and data.path are placeholders.

    Args:
        config: The plan.
        layout: Layout of the run.
    """
    model = config.model if Path(config.model).is_dir() else f"{Path(config.model).stem}-pruned"
    options = ["--model.path", model, "--model.dtype", config.dtype]
    if config.activation_checkpointing:
        options += ["--model.activation_checkpointing", "true"]
    options += ["--data.path", "data/train.jsonl", "--data.seq_len", str(config.seq_len)]
    options += ["--steps", str(config.steps), "--batch_size", str(config.batch_size)]
    if config.global_batch is not None:
        options += ["--global_batch", str(config.global_batch)]
    options += layout.options(config)
    if config.seft.swap_fraction:
        options += ["--parent", "models/dense"]
    for field in dataclasses.fields(SeftConfig):
        value = getattr(config.seft, field.name)
        if value != field.default or field.name == "density":
            options += [f"--seft.{field.name}", _text(value)]
    return options


def submit_line(config: PlanConfig, layout: Layout) -> str:
    """Return the command that starts a planned run: sbatch on a cluster, torchrun on a single CPU machine."""
    options = shlex.join(train_options(config, layout))
    if config.cluster.gpu == "cpu" or Path(config.cluster.gpu).is_file():
        start = "seft" if layout.world_size == 1 else f"torchrun --nproc_per_node {layout.world_size} -m seft_dist"
        return f"{start} train {options} --output runs/planned"
    near = min(layout.world_size, layout.per_node)
    return f"sbatch --nodes {layout.nodes} --gpus-per-node {near} slurm/train_srun.sbatch {options}"


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
