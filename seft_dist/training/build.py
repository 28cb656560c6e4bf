"""The parts of a run, put together for the chosen backend: model, wrapper, optimizer, data."""

import dataclasses
import logging
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from seft_dist.backends.fsdp import pack_gathers
from seft_dist.backends.gather import GatherSize
from seft_dist.baselines.lora import check_peft
from seft_dist.baselines.repruning import check_repruning
from seft_dist.config import TrainConfig
from seft_dist.data.batches import BatchStream, check_vocabulary
from seft_dist.data.load import load_sequences
from seft_dist.data.tokenizer import pad_id
from seft_dist.io.library_types import PreTrainedModel, PreTrainedTokenizerBase
from seft_dist.io.models import Sharding, load_model
from seft_dist.io.parent import ParentModel
from seft_dist.io.positions import check_length
from seft_dist.io.source import Source, open_source
from seft_dist.session.agreement import max_over_ranks, on_all_ranks, one_rank_per_machine_first
from seft_dist.session.distributed import Ranks
from seft_dist.training.ds_config import DsConfig
from seft_dist.training.method import BASELINES, Method, TrainedSeft
from seft_dist.training.progress import print_line
from seft_dist.training.teacher import Teacher, load_teacher

log = logging.getLogger(__name__)

_SEQUENCES = 1 << 14
"""Most sequences that are looked at in one go."""


@dataclass
class TrainingRun:
    """The parts of a run that training/step.py moves."""

    config: TrainConfig
    ranks: Ranks
    source: Source
    model: PreTrainedModel
    forward_module: nn.Module
    """Module that a forward pass calls: the model, or what wraps it."""
    method: Method
    engine: Any = None
    """The DeepSpeed engine, if there is one."""
    backend: str = "single"
    """Backend that holds the weights, as result.json and manifest.json name it."""
    peak_lr: float = 0.0
    teacher: Teacher | None = None
    """Model whose predictions are learnt, if there is one."""

    @property
    def scheduler(self) -> Any:
        """DeepSpeed's scheduler of the learning rate, if the ds_config has one; else step.py sets the rate."""
        return self.engine.lr_scheduler if self.engine is not None else None


def chosen_backend(config: TrainConfig, world_size: int) -> str:
    """Resolve backend "auto".

    Raises:
        ValueError: "single" on several ranks.
    """
    if config.deepspeed is not None:
        return "deepspeed"
    if config.backend == "single" and world_size > 1:
        raise ValueError(f"backend=single with {world_size} ranks: choose fsdp or ddp, or start one process")
    if config.backend != "auto":
        return config.backend
    chosen = "fsdp" if world_size > 1 or config.replicas > 1 or config.offload else "single"
    if chosen == "single" and config.packing == "gather":
        raise ValueError(
            "packing=gather in one process, which gathers nothing: choose resident, or start several ranks"
        )
    return chosen


def open_model(config: TrainConfig, ds: DsConfig | None) -> Source:
    """Open the pruned model, and check that it can read the sequences of the data, before any are made.

    Raises:
        ValueError: There is no such model, or the sequences are too long for it.
    """
    source = open_source(config.model, ds.dtype if ds else None)
    if ds and (ds.dtype, config.model.dtype, source.weights.dtype) == (torch.float32, "auto", torch.bfloat16):
        log.warning(
            "%s is stored in bfloat16, but the ds_config trains in float32, with twice the memory: set "
            '"bf16": {"enabled": true} (of the shipped ds_configs, those that end in _bf16), or give '
            "--model.dtype float32",
            config.model.path,
        )
    check_length(source.config, config.data.seq_len, config.model.path, "data.seq_len")
    if config.eval.data is not None:
        check_length(source.config, config.eval.data.seq_len, config.model.path, "eval.data.seq_len")
    return source


def open_parent(config: TrainConfig) -> ParentModel | None:
    """Open the model from which pruned weights come back, if the run has one.

    Raises:
        ValueError: There is no such model.
    """
    return None if config.parent is None else ParentModel.open(config.parent)


def check_baseline(config: TrainConfig, source: Source, data: BatchStream) -> None:
    """Refuse, before a model is loaded, a comparison method that would fail at its end.

    Raises:
        ValueError: A package is not installed, or the model cannot be pruned again.
    """
    if config.method in ("lora", "lora_merged"):
        check_peft()
    if config.method == "lora_merged":
        check_repruning(config, source, data.sequences)


def build_and_attach(
    config: TrainConfig,
    ranks: Ranks,
    source: Source,
    ds: DsConfig | None,
    data: BatchStream,
    teacher: Source | None = None,
    parent: ParentModel | None = None,
) -> TrainingRun:
    """Build the run, check it against the data, divide the weights among their owners. Collective.

    Prints what it does: billions of weights take minutes, in which nothing else would be printed.

    Args:
        config: The run.
        ranks: This process.
        source: The pruned model.
        ds: None without DeepSpeed.
        data: This rank's batches.
        teacher: Model whose predictions are learnt, if there is one.
        parent: Model from which pruned weights come back, if there is one.

    Raises:
        ValueError: The model, its parent, or the data cannot be used.
    """
    began = time.monotonic()
    if ranks.is_main:
        print_line(f"loading {source.folder} ...")
    run = build(config, ranks, source, ds, teacher, parent)
    check_tokens(data, run.model, ranks)
    run.method.attach()
    if ranks.is_main:
        seconds, numel = time.monotonic() - began, sum(part.numel for part in run.method.backend.partitions)
        print_line(f"loaded in {seconds:.0f} s: {len(run.method.target_names)} targets, {numel:,} weights")
    return run


def build(
    config: TrainConfig,
    ranks: Ranks,
    source: Source,
    ds: DsConfig | None,
    teacher: Source | None = None,
    parent: ParentModel | None = None,
) -> TrainingRun:
    """Load the model as the backend wants it, with the optimizer and the backend's wrapper around it. Collective.

    Args:
        config: The run.
        ranks: This process.
        source: The pruned model.
        ds: None without DeepSpeed.
        teacher: Model whose predictions are learnt, if there is one.
        parent: Model from which pruned weights come back, if there is one.

    Raises:
        ValueError: The model, or its parent, cannot be used.
    """
    backend = on_all_ranks(ranks, lambda: chosen_backend(config, ranks.world_size))
    on_all_ranks(ranks, lambda: ds.check() if ds is not None else None)
    sharding: Sharding = "fsdp" if backend == "fsdp" else "zero3" if ds is not None and ds.stage == 3 else "none"
    args = _adam_settings(config, ds, ranks)
    model = load_model(
        source,
        sharding=sharding,
        device=ranks.device,
        replicas=config.replicas,
        offload=config.offload,
        ds_config=ds.content if ds else None,
        activation_checkpointing=config.model.activation_checkpointing,
        resident=config.seft.targets if config.packing == "resident" else None,
    )
    if config.packing == "gather":
        _print_packed_units(pack_gathers(model), ranks)
    teacher_model = load_teacher(config, ranks, teacher, sharding, ds) if teacher is not None else None
    if not config.is_seft:
        method: Method = BASELINES[config.method](model, config, args)
        return TrainingRun(config, ranks, source, model, model, method, None, backend, args["lr"], teacher_model)
    seft = TrainedSeft(model, dataclasses.replace(config.seft, steps=config.total_steps), **args, parent=parent)
    run = TrainingRun(config, ranks, source, model, model, seft, None, backend, args["lr"], teacher_model)
    if backend == "ddp":
        devices = [ranks.device] if ranks.device.type == "cuda" else None
        run.forward_module = nn.parallel.DistributedDataParallel(model, device_ids=devices, forward_sync_buffers=False)
    elif ds is not None:
        import deepspeed

        run.engine, *_ = deepspeed.initialize(model=model, optimizer=seft, config=ds.content)
        run.forward_module = run.engine
        run.backend = f"zero{ds.stage}"
    elif config.replicas > 1:
        run.backend = "hsdp"
    return run


def _adam_settings(config: TrainConfig, ds: DsConfig | None, ranks: Ranks) -> dict[str, Any]:
    """Return the optimizer's settings; those of a ds_config come first, and what they replace is printed."""
    adam = dataclasses.asdict(config.optim)
    args = {key: adam[key] for key in ("lr", "betas", "eps", "weight_decay", "max_grad_norm")}
    if ds is None:
        return args
    for key in [key for key in args if args[key] != ds.optimizer[key] and ranks.is_main]:
        value = ds.optimizer[key]
        print(f"{config.deepspeed}: its {key} {value} takes the place of optim.{key} {args[key]}", file=sys.stderr)
    return ds.optimizer


def _print_packed_units(sizes: list[GatherSize], ranks: Ranks) -> None:
    """Print which FSDP units are sent packed, and which are not. On rank 0."""
    if not ranks.is_main:
        return
    dense = [size.unit or "root (embeddings, output head, last norm)" for size in sizes if not size.pays]
    packed = [size for size in sizes if size.pays]
    if packed:
        ratio = sum(size.dense for size in packed) / sum(size.packed for size in packed)
        print(f"packing=gather: {len(packed)} units are sent packed, {ratio:.2f} times fewer bytes", file=sys.stderr)
    if dense:
        print(f"packing=gather: sent as they are, since packing would not pay: {', '.join(dense)}", file=sys.stderr)


def read_batches(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, ranks: Ranks) -> BatchStream:
    """Read and tokenise the data. Collective.

    Args:
        config: The run; ``data.date`` is filled in.
        tokenizer: The model's.
        ranks: This process.

    Raises:
        ValueError: The data or the tokenizer cannot be used.
    """
    pad = on_all_ranks(ranks, lambda: pad_id(tokenizer))
    sequences = one_rank_per_machine_first(
        ranks, lambda: load_sequences(config.data, tokenizer, progress=ranks.is_main)
    )
    return on_all_ranks(
        ranks,
        lambda: BatchStream(
            sequences,
            batch_size=config.batch_size,
            global_batch=config.global_batch,
            rank=ranks.rank,
            world_size=ranks.world_size,
            seed=config.seed,
            pad_id=pad,
            group_by_length=config.group_by_length,
        ),
    )


def check_tokens(data: BatchStream, model: PreTrainedModel, ranks: Ranks) -> None:
    """Check that the model has embeddings for all tokens of the data, and for learned positions. Collective.

    Each rank looks at its share of the sequences.

    Args:
        data: This rank's batches.
        model: The model that is trained.
        ranks: This process.

    Raises:
        ValueError: It has not; the tokenizer is of another model, or sequences are too long.
    """
    count, longest_and_largest = data.num_sequences, torch.zeros(2, dtype=torch.int64)
    starts = range(0, count, _SEQUENCES)
    for start in starts[ranks.rank :: ranks.world_size]:
        lengths, *tokens = data.sequences.contents(start, min(start + _SEQUENCES, count))
        largest = max(int(values.max()) for values in tokens if len(values))  # labels are tokens too, or below 0
        longest_and_largest = longest_and_largest.maximum(torch.tensor([int(lengths.max()), largest]))
    longest, largest = max_over_ranks(ranks, longest_and_largest).tolist()
    on_all_ranks(ranks, lambda: check_vocabulary({"input_ids": torch.full((1, longest), largest)}, model))
