"""One fine-tuning run, from the configuration to the repaired model: the only file that sees every part."""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from seft_dist.config import AdamConfig, TrainConfig
from seft_dist.io.data import Batch, BatchStream, load_sequences, load_tokenizer, pad_id
from seft_dist.io.export import export_model
from seft_dist.io.models import Sharding, Source, load_model, locate, open_source
from seft_dist.optim.optimizer import SeftOptimizer
from seft_dist.training import distributed
from seft_dist.training.cli import to_yaml
from seft_dist.training.distributed import Ranks, together
from seft_dist.training.ds_config import DsConfig, read_ds_config
from seft_dist.training.metrics import Metrics, check_trackers, summary
from seft_dist.training.run_folder import (
    DELTA,
    MODEL,
    RESULT,
    check_run_folder,
    open_run_folder,
    resume,
    save_checkpoint,
)


@dataclass
class Run:
    """The parts of a run that training moves."""

    config: TrainConfig
    ranks: Ranks
    source: Source
    model: PreTrainedModel
    called: nn.Module
    """What a forward pass calls: the model, or what wraps it."""
    seft: SeftOptimizer
    engine: Any = None
    """The DeepSpeed engine, if there is one."""
    backend: str = "single"
    peak_lr: float = 0.0

    @property
    def scheduler(self) -> Any:
        """DeepSpeed's scheduler of the learning rate, if the ds_config has one; else the rate is ours."""
        return self.engine.lr_scheduler if self.engine is not None else None

    def accumulate(self, batches: list[Batch]) -> Tensor:
        """Forward and backward over the micro-batches of one optimizer step. **Collective** if sharded.

        Returns:
            Mean loss of this rank, a scalar on its device.
        """
        total = torch.zeros((), device=self.ranks.device)
        for i, batch in enumerate(batches):
            loss = self.called(**{key: value.to(self.ranks.device) for key, value in batch.items()}).loss
            if self.engine is None:
                (loss / len(batches)).backward()
            else:
                self.engine.backward(loss)  # divides by itself
                if i + 1 < len(batches):
                    self.engine.step()  # only counts micro-batches here
            total += loss.detach().float() / len(batches)
        return total

    def update(self, step: int) -> float:
        """Let the optimizer do its step. **Collective.**

        Returns:
            The learning rate it used.
        """
        group = self.seft.param_groups[0]
        if self.scheduler is not None:
            lr = group["lr"]
        else:
            lr = group["lr"] = self.peak_lr * lr_factor(self.config.optim, step, self.config.steps)
        if self.engine is not None:
            self.engine.step()
        else:
            self.seft.step()
            self.seft.zero_grad()
        return float(lr)


def train(config: TrainConfig) -> dict[str, Any]:
    """Fine-tune a pruned model as configured and write the run's folder. **Collective.**

    Args:
        config: The run.

    Returns:
        What result.json holds: backend, world_size, density, steps, sparsity (target, final, layers_off_target),
        evolutions, reactivated, seconds, tokens, loss.

    Raises:
        ValueError: Configuration, model, data or run folder cannot be used; nothing was written.
        FloatingPointError: A loss or gradient is not finite; the weights were not changed by that step.
    """
    needs_group = config.backend in ("fsdp", "ddp") or config.replicas > 1 or config.offload
    ranks = distributed.start(
        deepspeed=config.deepspeed is not None, group=needs_group, timeout=config.timeout, threads=config.threads
    )
    together(ranks, lambda: check_run_folder(config) if ranks.is_main else None)
    together(ranks, lambda: check_trackers(config))
    ds = together(ranks, lambda: read_ds_config(config, ranks.world_size))
    distributed.check_agreement(ranks, to_yaml(config) + repr(ds))
    source = together(ranks, lambda: open_source(config.model, ds.dtype if ds else None))
    data = read_batches(config, ranks)
    run = build(config, ranks, source, ds)
    run.seft.attach()
    state = resume(config, run.seft, data) or {}
    together(ranks, lambda: open_run_folder(config) if ranks.is_main else None)
    if "scheduler" in state and run.scheduler is not None:
        run.scheduler.load_state_dict(state["scheduler"])
        run.seft.param_groups[0]["lr"] = state["lr"]  # the scheduler itself sets it only after the next step
    metrics = Metrics(config, writes=ranks.is_main, start=run.seft.num_steps, state=state.get("metrics"))
    try:
        fit(run, data, metrics)
    finally:
        metrics.close()
    return finish(run, metrics)


def fit(run: Run, data: BatchStream, metrics: Metrics) -> None:
    """The training loop. **Collective.**

    Args:
        run: What is trained.
        data: This rank's micro-batches.
        metrics: Where steps are recorded.

    Raises:
        FloatingPointError: A loss or gradient is not finite; the weights were not changed by that step.
    """
    config = run.config
    done = run.seft.num_steps
    for step, micro in zip(range(done + 1, config.steps + 1), data.batches(done), strict=False):
        loss, tokens = agree_on_loss(run.ranks, run.accumulate(micro), micro, step)
        lr = run.update(step)
        metrics.step(step, loss=loss, tokens=tokens, lr=lr, grad_norm=run.seft.grad_norm, evolution=run.seft.evolution)
        if step == config.steps or (config.save_every and step % config.save_every == 0):
            state: dict[str, Any] = {"metrics": metrics.state()}
            if run.scheduler is not None:
                state |= {"scheduler": run.scheduler.state_dict(), "lr": run.seft.param_groups[0]["lr"]}
            save_checkpoint(config, run.seft, data, state)


def agree_on_loss(ranks: Ranks, loss: Tensor, micro: list[Batch], step: int) -> tuple[float, int]:
    """Average the loss over the ranks, and stop all of them if one is not finite. **Collective.**

    This waits for the device in every step: a bad loss must be known before the optimizer changes the weights.

    Returns:
        The mean loss, and the tokens of all ranks.

    Raises:
        FloatingPointError: Naming the step and the ranks.
    """
    tokens = sum(int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum()) for batch in micro)
    row = torch.tensor([0.0, tokens], dtype=torch.float64, device=loss.device)
    row[0] = loss
    rows = [torch.empty_like(row) for _ in range(ranks.world_size)]
    if ranks.world_size > 1:
        dist.all_gather(rows, row)
    else:
        rows = [row]
    table = torch.stack(rows).tolist()
    bad = [f"{rank} ({value})" for rank, (value, _) in enumerate(table) if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(
            f"step {step}: the loss is not finite on rank {', '.join(bad)}; the weights are those of step {step - 1}. "
            "Lower the learning rate, or look at this batch"
        )
    return sum(value for value, _ in table) / ranks.world_size, int(sum(count for _, count in table))


def lr_factor(optim: AdamConfig, step: int, steps: int) -> float:
    """Learning rate of a step as a share of the peak. Local.

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
    """Resolve backend "auto". Local.

    Raises:
        ValueError: "single" on several ranks.
    """
    if config.deepspeed is not None:
        return "deepspeed"
    if config.backend == "single" and world_size > 1:
        raise ValueError(f"backend=single with {world_size} ranks: choose fsdp or ddp, or start one process")
    if config.backend != "auto":
        return config.backend
    return "fsdp" if world_size > 1 or config.replicas > 1 or config.offload else "single"


def build(config: TrainConfig, ranks: Ranks, source: Source, ds: DsConfig | None) -> Run:
    """Load the model as the backend wants it, with the optimizer and the backend's wrapper around it. **Collective.**

    Args:
        config: The run.
        ranks: This process.
        source: The pruned model.
        ds: None without DeepSpeed.

    Raises:
        ValueError: The model cannot be used.
    """
    backend = together(ranks, lambda: chosen_backend(config, ranks.world_size))
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
    )
    seft = SeftOptimizer(model, dataclasses.replace(config.seft, steps=config.steps), **args)
    run = Run(config, ranks, source, model, model, seft, backend=backend, peak_lr=args["lr"])
    if backend == "ddp":
        devices = [ranks.device] if ranks.device.type == "cuda" else None
        run.called = nn.parallel.DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
    elif ds is not None:
        import deepspeed

        run.engine, *_ = deepspeed.initialize(model=model, optimizer=seft, config=ds.content)
        run.called = run.engine
        run.backend = f"zero{ds.stage}"
    elif config.replicas > 1:
        run.backend = "hsdp"
    return run


def read_batches(config: TrainConfig, ranks: Ranks) -> BatchStream:
    """Read and tokenise the data. **Collective.**

    Raises:
        ValueError: The data or the tokenizer cannot be used.
    """
    tokenizer = together(ranks, lambda: load_tokenizer(config.model))
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
            accumulate=config.accumulate,
            rank=ranks.rank,
            world_size=ranks.world_size,
            seed=config.seed,
            pad_id=pad,
        ),
    )


def finish(run: Run, metrics: Metrics) -> dict[str, Any]:
    """Check every layer's sparsity, export, and write the result. **Collective.**

    Returns:
        What result.json holds.
    """
    config, folder = run.config, Path(run.config.output)
    layers = run.seft.sparsity()
    numel = sum(layer.numel for layer in layers)
    result = {
        "backend": run.backend,
        "world_size": run.ranks.world_size,
        "density": config.seft.density,
        "steps": config.steps,
        "sparsity": {
            "target": 1 - sum(layer.target for layer in layers) / numel,
            "final": sum(layer.zeros for layer in layers) / numel,
            "layers_off_target": sum(layer.zeros != layer.numel - layer.target for layer in layers),
        },
        "evolutions": metrics.evolutions,
        "reactivated": metrics.reactivated,
        "seconds": round(metrics.seconds, 3),
        "tokens": metrics.tokens,
        "loss": metrics.last_loss,
    }
    if config.export:
        export_model(
            run.model,
            run.seft.backend.full,
            folder / MODEL,
            run.source,
            writes=run.ranks.is_main,
            tokenizer=locate(config.model.tokenizer) if config.model.tokenizer else None,
            delta=folder / DELTA,
            targets=run.seft.target_names,
        )
    if run.ranks.is_main:
        (folder / RESULT).write_text(json.dumps(result, indent=2) + "\n")
        summary(result)
    if dist.is_initialized():
        dist.barrier()  # no rank returns before the files are there
    return result
