"""Trainer and accelerate with SEFT on the tiny model, on one rank or several, as their users call them."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from seft_dist import SeftOptimizer
from seft_dist.io import checkpoint
from tests.layouts import snapshot
from tests.models import batch, moving, prune_, tiny_llama
from tests.texts import chat_tokenizer

CONFIG = moving(density=0.05, interval=4, window=2)
STEPS, LR = 9, 1e-2
DATA = [{key: value[0] for key, value in batch(i, size=1).items()} for i in range(48)]
"""Sequences of training; the last four are for evaluation."""


def _be_fsdp(accelerator: Any, **options: Any) -> None:
    """Let accelerate shard with FSDP2 on CPU ranks, for which it has no option."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        **({"cpu_ram_efficient_loading": True} | options),
    )


def ds_config(layout: str, micro_batch: int, accumulate: int, **over: Any) -> dict[str, Any]:
    """A ds_config for "zero2" or "zero3"; nothing is compiled."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulate,
        "zero_optimization": {"stage": int(layout[4]), "stage3_gather_16bit_weights_on_model_save": True},
        "steps_per_print": 1 << 30,
    } | over


def _classes(sft: bool, folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """Return a trainer, its arguments' class, and what the trainer needs beside a model and data."""
    if not sft:
        from transformers import Trainer, TrainingArguments

        return Trainer, TrainingArguments, {"train_dataset": DATA[:-4], "eval_dataset": DATA[-4:]}
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = [
        Dataset.from_list([{"input_ids": one["input_ids"].tolist()} for one in part]) for part in (DATA[:-4], DATA[-4:])
    ]
    tokenizer = chat_tokenizer(folder)
    tokenizer.pad_token = tokenizer.eos_token
    return SFTTrainer, SFTConfig, {"train_dataset": data[0], "eval_dataset": data[1], "processing_class": tokenizer}


def train(
    rank: int, world: int, layout: str, output: Path, resume: Path | None = None, sft: bool = False, **over: Any
) -> dict[str, Any]:
    """Train with transformers.Trainer or TRL's SFTTrainer, two sequences in each of two micro-batches. Collective."""
    from seft_dist.integrations.transformers import SeftCallback

    trainer_class, arguments_class, given_to_trainer = _classes(sft, output / f"tokenizer-{rank}")

    uses_cpu = not layout.startswith("zero")
    size = 2 // world
    if not uses_cpu:
        over["deepspeed"] = ds_config(layout, size, 2, gradient_clipping="auto", bf16={"enabled": "auto"})
    given = {"max_steps": STEPS, "logging_steps": 1, "save_steps": 3, "report_to": "none", "disable_tqdm": True}
    given |= {"train_sampling_strategy": "sequential"}
    given |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    given |= {"bf16": False} if sft else {}
    args = arguments_class(str(output), use_cpu=uses_cpu, seed=1, **(given | over))
    if not uses_cpu:  # accelerate counts GPUs only
        args.distributed_state.num_processes, args.distributed_state.process_index = world, rank
    model = prune_(tiny_llama())
    made = (SeftOptimizer, {"model": model, "config": CONFIG, "lr": LR})
    trainer = trainer_class(model, args, optimizer_cls_and_kwargs=made, **given_to_trainer)
    if layout == "fsdp":
        _be_fsdp(trainer.accelerator)
        if args.bf16:
            trainer.accelerator.state.fsdp_plugin.set_mixed_precision("bf16")
        trainer.is_fsdp_enabled = True
    SeftCallback.add_to(trainer)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    seft: Any = trainer.optimizer
    while not isinstance(seft, SeftOptimizer):
        seft = seft.optimizer
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": [entry["loss"] for entry in entries],
        "norms": [entry["grad_norm"] for entry in entries],
        "state": snapshot(model, seft),
        "steps": seft.num_steps,
        "max_grad_norm": seft.max_grad_norm,
        "best": trainer.state.best_model_checkpoint,
    }


def loop(
    rank: int,
    world: int,
    layout: str,
    act: Callable[[Any, Any], None] | None = None,
    steps: tuple[int, int] = (0, STEPS),
    saved: Path = Path(),
    **over: Any,
) -> Any:
    """Train with a loop of accelerate.

    Args:
        rank: This rank.
        world: Number of ranks.
        layout: "ddp", "fsdp", "zero2" or "zero3".
        act: Called with the accelerator and the model before each step.
        steps: Steps before the first, and the last step, of those that are trained.
        saved: Folder to which a part of the run saves itself at its end, and which it loads at its beginning.
        over: Options of accelerate's FSDP plugin, or of the ds_config.
    """
    made = _prepared(rank, world, layout, bool(act), **over)
    begin, end = steps
    if begin > 0:
        made.accelerator.load_state(str(saved / "accelerate"))
        checkpoint.load(made.seft, saved / f"seft/step-{begin:08d}")
    for t in range(begin, end):
        part = {key: value[rank::world] for key, value in batch(t, size=4).items()}
        made.accelerator.backward(made.model(**part).loss)
        if act:
            act(made.accelerator, made.model)
        made.optimizer.step()
        made.optimizer.zero_grad()
    if end < STEPS:
        checkpoint.save(made.seft, saved / "seft", {})
        made.accelerator.save_state(str(saved / "accelerate"))
    return snapshot(made.whole, made.seft)


@dataclass
class _Prepared:
    """What a loop of accelerate works with."""

    accelerator: Any
    model: Any
    optimizer: Any
    whole: Any
    """The model before ``prepare``."""
    seft: SeftOptimizer


def _prepared(rank: int, world: int, layout: str, clips_elsewhere: bool, **over: Any) -> _Prepared:
    from accelerate import Accelerator, DeepSpeedPlugin

    plugin = None
    if layout.startswith("zero"):
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        plugin = DeepSpeedPlugin(hf_ds_config=ds_config(layout, 4 // world, 1, **over))
    accelerator = Accelerator(cpu=plugin is None, deepspeed_plugin=plugin)
    if layout == "fsdp":
        _be_fsdp(accelerator, **over)
    whole = prune_(tiny_llama())
    seft = SeftOptimizer(whole, CONFIG, lr=LR, max_grad_norm=None if clips_elsewhere else 1.0)
    model, optimizer = accelerator.prepare(whole, seft)
    if layout == "fsdp":
        _be_fsdp(accelerator, **over)  # preparing on a CPU has undone it
    return _Prepared(accelerator, model, optimizer, whole, seft)


def same_topology(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two snapshots have the same masks and supports."""
    return all(torch.equal(one[name][key], other[name][key]) for name in one for key in ("mask", "support"))
