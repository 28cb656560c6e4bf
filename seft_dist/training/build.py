"""The parts of a run, put together for the chosen backend: model, wrapper, optimizer, data."""

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from seft_dist.backends.fsdp import pack_gathers
from seft_dist.backends.gather import GatherSize
from seft_dist.baselines.lora import check_peft
from seft_dist.baselines.repruning import check_repruning
from seft_dist.config import AdamConfig, TrainConfig
from seft_dist.data.batches import Batch, BatchStream, check_vocabulary, count_loss_tokens
from seft_dist.data.load import load_sequences
from seft_dist.data.tokenizer import pad_id
from seft_dist.io.models import Sharding, load_model
from seft_dist.io.source import Source
from seft_dist.session.distributed import Ranks, together
from seft_dist.training.ds_config import DsConfig
from seft_dist.training.method import BASELINES, Method, TrainedSeft


@dataclass
class Run:
    """The parts of a run that training moves."""

    config: TrainConfig
    ranks: Ranks
    source: Source
    model: PreTrainedModel
    called: nn.Module
    """What a forward pass calls: the model, or what wraps it."""
    method: Method
    engine: Any = None
    """The DeepSpeed engine, if there is one."""
    backend: str = "single"
    peak_lr: float = 0.0

    @property
    def scheduler(self) -> Any:
        """DeepSpeed's scheduler of the learning rate, if the ds_config has one; else the rate is ours."""
        return self.engine.lr_scheduler if self.engine is not None else None

    def accumulate(self, batches: list[Batch]) -> tuple[Tensor, int]:
        """Forward and backward over the micro-batches of one optimizer step. Collective.

        Every token of the step that is learnt weighs the same, whichever rank and micro-batch it falls into.

        Returns:
            This rank's share of the mean loss times the number of ranks, a scalar on its device; and the tokens learnt by
            all ranks.
        """
        for batch in batches:
            check_vocabulary(batch, self.model)
        learnt = [count_loss_tokens(batch) for batch in batches]
        count = torch.tensor(sum(learnt))
        if self.ranks.world_size > 1:
            dist.all_reduce(count)
        total = torch.zeros((), device=self.ranks.device)
        for i, (batch, tokens) in enumerate(zip(batches, learnt, strict=True)):
            loss = self._loss(batch, tokens) * (tokens * self.ranks.world_size / int(count))
            self.method.set_is_last_backward(i + 1 == len(batches))
            if self.engine is None:
                loss.backward()
            else:
                self.engine.backward(loss * len(batches))  # divides by their number
                if i + 1 < len(batches):
                    self.engine.step()  # only counts micro-batches here
            total += loss.detach().float()
        return total, int(count)

    def _loss(self, batch: Batch, tokens: int) -> Tensor:
        inputs = {key: value.to(self.ranks.device) for key, value in batch.items()}
        if tokens:
            return self.called(**inputs).loss
        del inputs["labels"]  # this rank only takes part: a mean over no token would be 0 / 0
        return self.called(**inputs).logits.float().mean()

    def update(self, step: int) -> float:
        """Let the optimizer do its step. Collective.

        Returns:
            The learning rate it used.
        """
        group = self.method.param_groups[0]
        if self.scheduler is not None:
            lr = group["lr"]
        else:
            lr = group["lr"] = self.peak_lr * lr_factor(self.config.optim, step, self.config.steps)
        if self.engine is not None:
            self.engine.step()
        else:
            self.method.step()
            self.method.zero_grad()
        return float(lr)


def lr_factor(optim: AdamConfig, step: int, steps: int) -> float:
    """Learning rate of a step as a share of the peak.

    It is above 0 in every step, so that each update moves what the last evolution has grown.

    Args:
        optim: Warm-up and decay.
        step: Counted from 1.
        steps: Of the whole run.
    """
    warmup = round(optim.warmup * steps)
    if step <= warmup:
        return step / warmup
    progress = (step - warmup - 1) / max(1, steps - warmup)
    if optim.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if optim.schedule == "linear" else 1.0


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


def check_baseline(config: TrainConfig, source: Source, data: BatchStream) -> None:
    """Refuse, before a model is loaded, what a comparison method would miss in the end.

    Raises:
        ValueError: A package is not installed, or the model cannot be pruned again.
    """
    if config.method in ("lora", "lora_merged"):
        check_peft()
    if config.method == "lora_merged":
        check_repruning(config, source, data.sequences)


def build(config: TrainConfig, ranks: Ranks, source: Source, ds: DsConfig | None) -> Run:
    """Load the model as the backend wants it, with the optimizer and the backend's wrapper around it. Collective.

    Args:
        config: The run.
        ranks: This process.
        source: The pruned model.
        ds: None without DeepSpeed.

    Raises:
        ValueError: The model cannot be used.
    """
    backend = together(ranks, lambda: chosen_backend(config, ranks.world_size))
    together(ranks, lambda: ds.check() if ds is not None else None)
    sharding: Sharding = "fsdp" if backend == "fsdp" else "zero3" if ds is not None and ds.stage == 3 else "none"
    adam = dataclasses.asdict(config.optim)
    args = {key: adam[key] for key in ("lr", "betas", "eps", "weight_decay", "max_grad_norm")}
    if ds is not None:
        for key in [key for key in args if args[key] != ds.optimizer[key] and ranks.is_main]:
            value = ds.optimizer[key]
            print(f"{config.deepspeed}: its {key} {value} takes the place of optim.{key} {args[key]}", file=sys.stderr)
        args = ds.optimizer
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
        _say(pack_gathers(model), ranks)
    if not config.is_seft:
        method: Method = BASELINES[config.method](model, config, args)
        return Run(config, ranks, source, model, model, method, backend=backend, peak_lr=args["lr"])
    seft = TrainedSeft(model, dataclasses.replace(config.seft, steps=config.steps), **args)
    run = Run(config, ranks, source, model, model, seft, backend=backend, peak_lr=args["lr"])
    if backend == "ddp":
        devices = [ranks.device] if ranks.device.type == "cuda" else None
        run.called = nn.parallel.DistributedDataParallel(model, device_ids=devices, forward_sync_buffers=False)
    elif ds is not None:
        import deepspeed

        run.engine, *_ = deepspeed.initialize(model=model, optimizer=seft, config=ds.content)
        run.called = run.engine
        run.backend = f"zero{ds.stage}"
    elif config.replicas > 1:
        run.backend = "hsdp"
    return run


def _say(sizes: list[GatherSize], ranks: Ranks) -> None:
    """Tell which FSDP units are sent packed, and which are not."""
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
        config: The run; ``data.date`` is settled.
        tokenizer: The model's.
        ranks: This process.

    Raises:
        ValueError: The data or the tokenizer cannot be used.
    """
    pad = together(ranks, lambda: pad_id(tokenizer))
    sequences: Sequence[Any] | None = None
    for first in (True, False):  # one rank of each machine fills the cache, then the others read it
        turn = (ranks.local_rank == 0) == first
        read = together(ranks, lambda: load_sequences(config.data, tokenizer, progress=ranks.is_main) if turn else None)  # noqa: B023
        sequences = read if turn else sequences
    assert sequences is not None
    return together(
        ranks,
        lambda: BatchStream(
            sequences,
            batch_size=config.batch_size,
            global_batch=config.global_batch,
            rank=ranks.rank,
            world_size=ranks.world_size,
            seed=config.seed,
            pad_id=pad,
        ),
    )
