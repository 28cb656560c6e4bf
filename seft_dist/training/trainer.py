"""One fine-tuning run, from the configuration to the repaired model: the only file that sees every part."""

import hashlib
import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from seft_dist.baselines.baseline import Ending
from seft_dist.config import TrainConfig
from seft_dist.data.batches import Batch, BatchStream, count_loss_tokens
from seft_dist.data.tokenizer import load_tokenizer
from seft_dist.export.export import export_model
from seft_dist.files.writing import write_json
from seft_dist.io.checkpoint import BackgroundSaver
from seft_dist.io.source import locate, open_source
from seft_dist.kernels.describe import describe
from seft_dist.session import distributed, facts
from seft_dist.session.cli import to_yaml
from seft_dist.session.distributed import Ranks, together
from seft_dist.session.signals import StopRequest, name_of, stop_requests
from seft_dist.training.build import Run, build, check_baseline, read_batches
from seft_dist.training.diagnosis import write_diagnosis
from seft_dist.training.ds_config import read_ds_config
from seft_dist.training.fingerprint import data_fingerprint, model_fingerprint
from seft_dist.training.metrics import Metrics, check_trackers, say, stopped, summary
from seft_dist.training.record import Record
from seft_dist.training.run_folder import (
    CHECKPOINTS,
    DELTA,
    MODEL,
    RESULT,
    Origin,
    check_run_folder,
    extra_of,
    open_run_folder,
    resume,
    settle_batch,
    settle_date,
)
from seft_dist.training.writer_lock import only_writer


def train(config: TrainConfig, request: StopRequest | None = None) -> dict[str, Any]:
    """Fine-tune a pruned model as configured and write the run's folder. Collective.

    SIGUSR1, SIGTERM, SIGINT or SIGHUP to any rank makes all of them save after the step they are in (the next logged
    one), and return.

    Args:
        config: The run.
        request: Of a caller who catches stop signals already; None: they are caught from here to the end.

    Returns:
        What result.json holds: method, backend, world_size, density, trainable, steps, sparsity (target, final,
        layers_off_target), evolutions, reactivated, seconds, tokens, loss, peak_memory_bytes. If a signal stopped the run:
        stopped (the signal), step.

    Raises:
        ValueError: Configuration, model, data or run folder cannot be used; nothing was written.
        FloatingPointError: A loss or gradient is not finite; that gradient changed no weight.
        OSError: A checkpoint could not be written; earlier ones are whole.
    """
    needs_group = config.backend in ("fsdp", "ddp") or config.replicas > 1 or config.offload
    with ExitStack() as held:
        request = request or held.enter_context(stop_requests())
        request.watch(distributed.find_launcher)
        ranks = distributed.start(
            deepspeed=config.deepspeed is not None, group=needs_group, timeout=config.timeout, threads=config.threads
        )
        together(ranks, lambda: held.enter_context(only_writer(Path(config.output))) if ranks.is_main else None)
        return _train(config, ranks, request)


def _train(config: TrainConfig, ranks: Ranks, request: StopRequest) -> dict[str, Any]:
    together(ranks, lambda: check_run_folder(config) if ranks.is_main else None)
    together(ranks, lambda: check_trackers(config))
    given = config.settled()
    config = together(ranks, lambda: settle_batch(given, ranks.world_size))
    ds = together(ranks, lambda: read_ds_config(config, ranks.world_size))
    distributed.check_agreement(ranks, to_yaml(config) + repr(ds))
    source = together(ranks, lambda: open_source(config.model, ds.dtype if ds else None))
    tokenizer = together(ranks, lambda: load_tokenizer(config.model))
    config = settle_date(config, tokenizer, ranks)
    data = read_batches(config, tokenizer, ranks)
    together(ranks, lambda: check_baseline(config, source, data))
    run = build(config, ranks, source, ds)
    run.method.attach()
    origin = Origin(
        model=model_fingerprint(source, run.method, ranks),
        data=data_fingerprint(data, ranks),
        sequences=data.num_sequences,
        global_batch=data.global_batch,
        seed=config.seed,
    )
    state = resume(config, ranks, run.method, origin) or {}
    together(ranks, lambda: open_run_folder(config) if ranks.is_main else None)
    record = Record(config, ranks, source, run.method, origin=origin, backend=run.backend, ds=ds)
    _restore_scheduler(run, state)
    if ranks.is_main:
        say(f"kernels: {describe(ranks.device)}")
    metrics = Metrics(config, writes=ranks.is_main, start=run.method.num_steps, state=state.get("metrics"))
    try:
        number = fit(run, data, origin, metrics, record, request)
    finally:
        metrics.close()
        record.close()
    number = number or _agreed_stop(ranks, request)
    if number:
        if ranks.is_main:
            stopped(config, name_of(number), run.method.num_steps)
        return {"stopped": name_of(number), "step": run.method.num_steps}
    return finish(run, data, metrics, record)


def fit(run: Run, data: BatchStream, origin: Origin, metrics: Metrics, record: Record, request: StopRequest) -> int:
    """The training loop. Collective.

    Args:
        run: What is trained.
        data: This rank's micro-batches.
        origin: Goes into the checkpoints.
        metrics: Where steps are recorded.
        record: Where they are recorded exactly.
        request: Asks this rank to stop.

    Returns:
        The signal that stopped all ranks before the last step; 0: all steps are done. The state is saved either way.

    Raises:
        FloatingPointError: A loss or gradient is not finite; the weights were not changed by that step.
        OSError: A checkpoint could not be written; earlier ones are whole.
    """
    config, method = run.config, run.method
    saver = method.saver(Path(config.output) / CHECKPOINTS)
    micro: list[Batch] = []
    since: list[Done] = []
    done = method.num_steps
    try:
        for step, micro in zip(range(done + 1, method.total_steps + 1), data.batches(done), strict=False):
            torch.manual_seed(_seed_of(config.seed, step, run.ranks.rank))  # of dropout; nothing to save
            loss, _ = run.accumulate(micro)
            since.append(Done(step, loss, sum(_tokens_of(batch) for batch in micro)))
            saves = step == config.steps or bool(config.save_every and step % config.save_every == 0)
            if not (saves or method.moves(step) or config.trace or step % config.log_every == 0):
                since[-1].lr = run.update(step)
                continue
            agreed = agree(run.ranks, since, request, saver)
            since[-1].lr = run.update(step)
            for one, loss_of_all, tokens in zip(since, agreed.losses, agreed.tokens, strict=True):
                metrics.step(
                    one.step,
                    loss=loss_of_all,
                    tokens=tokens,
                    lr=one.lr,
                    grad_norm=method.grad_norm,
                    evolution=method.evolution if one.step == step else None,
                )
            record.step(step, micro, loss=agreed.losses[-1], tokens=agreed.tokens[-1], lr=since[-1].lr)
            since = []
            if agreed.written:
                saver.finish()
            if saves or agreed.stop:
                metrics.sync()
                record.sync()
                saver.start(extra_of(config, origin, _state_of(run, metrics)))
            if agreed.stop:
                saver.finish()
                return agreed.stop if step < config.steps else 0
        saver.finish()
    except Exception as error:
        write_diagnosis(error, Path(config.output), run.ranks, method, data.indices(method.num_steps), micro)
        raise
    return 0


def _restore_scheduler(run: Run, state: dict[str, Any]) -> None:
    if "scheduler" not in state or run.scheduler is None:
        return
    try:
        run.scheduler.load_state_dict(state["scheduler"])
        run.method.param_groups[0]["lr"] = float(state["lr"])  # the scheduler itself sets it only after the next step
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the checkpoint's state of the scheduler does not fit: {error!r}; use another checkpoint"
        ) from error


def _state_of(run: Run, metrics: Metrics) -> dict[str, Any]:
    state: dict[str, Any] = {"metrics": metrics.state()}
    if run.scheduler is not None:
        state |= {"scheduler": run.scheduler.state_dict(), "lr": run.method.param_groups[0]["lr"]}
    return state


def _seed_of(seed: int, step: int, rank: int) -> int:
    """Random numbers of a step are a function of these three: a resumed run draws what the whole one would have."""
    return int.from_bytes(hashlib.sha256(f"step {seed} {step} {rank}".encode()).digest()[:8], "little", signed=True)


def _agreed_stop(ranks: Ranks, request: StopRequest) -> int:
    """The largest stop signal that any rank has got, 0 for none. Collective."""
    number = torch.tensor(request.number)
    if ranks.world_size > 1:
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return int(number)


def _tokens_of(batch: Batch) -> int:
    return int(batch["attention_mask"].sum()) if count_loss_tokens(batch) else 0


@dataclass
class Done:
    """A step as this rank knows it."""

    step: int
    loss: Tensor
    """On the device: nobody has waited for it."""
    tokens: int
    lr: float = 0.0


@dataclass(frozen=True)
class Agreed:
    """What all ranks know of each other after the backward pass of a step that is logged."""

    losses: list[float]
    """Mean over all tokens learnt, for each step since the one that was logged before."""
    tokens: list[int]
    """Of all ranks, for each of these steps."""
    stop: int
    """The signal that asks for a stop, 0 for none."""
    written: bool
    """Every rank's part of the checkpoint that has begun is on disk, or has failed."""


def agree(ranks: Ranks, since: list[Done], request: StopRequest, saver: BackgroundSaver) -> Agreed:
    """Exchange what must be known before the optimizer changes the weights again. Collective.

    This waits for the device: nothing else does in a step that is neither logged, saved nor of an evolution's window.

    Args:
        ranks: This process.
        since: The steps since the last call; the backward pass of the last one is done, its update is not.
        request: Asks this rank to stop.
        saver: Of checkpoints.

    Returns:
        The same on every rank.

    Raises:
        FloatingPointError: A loss is not finite; names the step and the ranks.
    """
    device = since[-1].loss.device
    tokens = [float(one.tokens) for one in since]
    rest = torch.tensor([*tokens, request.number, saver.written], dtype=torch.float64, device=device)
    row = torch.cat([torch.stack([one.loss.double() for one in since]), rest])
    rows = [torch.empty_like(row) for _ in range(ranks.world_size)]
    if ranks.world_size > 1:
        dist.all_gather(rows, row)
    else:
        rows = [row]
    table, count = torch.stack(rows).cpu(), len(since)
    for i, one in enumerate(since):
        bad = [f"{rank} ({value})" for rank, value in enumerate(table[:, i].tolist()) if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(
                f"step {one.step}: the loss is not finite on rank {', '.join(bad)}; the weights are those of step "
                f"{since[-1].step - 1}. Lower the learning rate, or look at this batch"
            )
    return Agreed(
        losses=[sum(table[:, i].tolist()) / ranks.world_size for i in range(count)],
        tokens=table[:, count : 2 * count].sum(0).long().tolist(),
        stop=int(table[:, -2].max()),
        written=bool(table[:, -1].all()),
    )


def finish(run: Run, data: BatchStream, metrics: Metrics, record: Record) -> dict[str, Any]:
    """Check every layer's sparsity, export, and write the result. Collective.

    Returns:
        What result.json holds.
    """
    config, folder, method = run.config, Path(run.config.output), run.method
    trained = {"trainable": method.trainable, "peak_memory_bytes": _peak_memory(run.ranks)}
    ending = Ending(folder, run.source, data.sequences, run.ranks.device, run.ranks.is_main)
    trained |= method.finalize(ending)
    layers = method.sparsity()
    numel = sum(layer.numel for layer in layers)
    loss = metrics.last_loss if method.num_steps else None
    result = {
        "method": config.method,
        "backend": run.backend,
        "world_size": run.ranks.world_size,
        "density": method.density,
        "steps": method.num_steps,
        "sparsity": {
            "target": 1 - sum(layer.target for layer in layers) / numel,
            "final": sum(layer.zeros for layer in layers) / numel,
            "layers_off_target": sum(layer.zeros != layer.numel - layer.target for layer in layers),
        },
        "evolutions": metrics.evolutions,
        "reactivated": metrics.reactivated,
        "seconds": round(metrics.seconds, 3),
        "tokens": metrics.tokens,
        "loss": loss,
        **trained,
    }
    if config.export:
        export_model(
            run.model,
            method.backend.full,
            folder / MODEL,
            run.source,
            writes=run.ranks.is_main,
            tokenizer=locate(config.model.tokenizer) if config.model.tokenizer else None,
            delta=folder / DELTA if config.is_seft else None,
            targets=method.changed,
        )
    record.finish(loss)
    if run.ranks.is_main:
        write_json(folder / RESULT, result)
        summary(result)
    if dist.is_initialized():
        dist.barrier()  # no rank returns before the files are there
    return result


def _peak_memory(ranks: Ranks) -> int:
    """Find the peak memory, in bytes, of the rank that used most. Collective."""
    peak = torch.tensor(facts.peak_memory(ranks.device))
    if ranks.world_size > 1:
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return int(peak)
