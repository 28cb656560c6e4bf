"""One fine-tuning run, from the configuration to the repaired model: the only file that sees every part."""

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from seft_dist.baselines.baseline import FinalizeInputs
from seft_dist.config import TrainConfig
from seft_dist.data.batches import BatchStream
from seft_dist.data.several import MixedSequences
from seft_dist.data.tokenizer import load_tokenizer
from seft_dist.export.export import export_model
from seft_dist.files.writing import write_json, write_text
from seft_dist.io.checkpoint import DamagedError, checkpoint_of
from seft_dist.io.readers import CHAT_TEMPLATE
from seft_dist.io.source import locate
from seft_dist.kernels.describe import describe
from seft_dist.session import distributed, facts
from seft_dist.session.agreement import check_agreement, max_over_ranks, on_all_ranks, wait_for_all_ranks
from seft_dist.session.cli import to_yaml
from seft_dist.session.distributed import Ranks
from seft_dist.session.signals import StopRequest, name_of, stop_requests
from seft_dist.training.build import (
    TrainingRun,
    build_and_attach,
    check_baseline,
    open_model,
    open_parent,
    read_batches,
)
from seft_dist.training.diagnosis import write_diagnosis
from seft_dist.training.ds_config import read_ds_config
from seft_dist.training.fingerprint import data_fingerprint, model_fingerprint, parent_fingerprint, with_order
from seft_dist.training.metrics import Metrics, print_stopped, print_summary
from seft_dist.training.progress import print_line
from seft_dist.training.record import Record
from seft_dist.training.run_folder import (
    CHECKPOINTS,
    DELTA,
    MODEL,
    RESULT,
    RunOrigin,
    check_run_folder,
    checkpoint_extra,
    fill_in_date,
    fill_in_global_batch,
    fill_in_pattern,
    fill_in_steps,
    open_run_folder,
    resume,
)
from seft_dist.training.saving import SaveClock
from seft_dist.training.separation import check_separation
from seft_dist.training.step import Stepper
from seft_dist.training.teacher import check_teacher
from seft_dist.training.topology import first_masks, write_layers
from seft_dist.training.trackers import check_trackers
from seft_dist.training.validation import Validation, ValidationText, read_validation
from seft_dist.training.writer_lock import only_writer


@dataclass(frozen=True)
class Finished:
    """A run that has done all its steps; its model is exported."""

    result: dict[str, Any]
    """Content of result.json.

    Entries: method, backend, world_size, density, trainable, steps, sparsity (target, final, layers_off_target),
    evolutions, reactivated, seconds, tokens, loss, peak_memory_bytes; validation (last, best, stopped_early) with
    eval.data; further entries by method.
    """


@dataclass(frozen=True)
class Stopped:
    """A run that a signal has stopped; its state is saved, and the same command goes on from there."""

    signal: str
    """Name of the signal, e.g. "SIGTERM"."""
    step: int
    """Optimizer steps done."""


def train(config: TrainConfig, request: StopRequest | None = None) -> Finished | Stopped:
    """Fine-tune a pruned model as configured and write the run's folder. Collective.

    SIGUSR1, SIGTERM, SIGINT or SIGHUP to any rank makes all of them save after the step they are in (the next logged
    one), and return.

    Args:
        config: The run.
        request: Stop signals that the caller catches already; None: they are caught from here to the end.

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
        on_all_ranks(ranks, lambda: held.enter_context(only_writer(Path(config.output))) if ranks.is_main else None)
        return _train(config, ranks, request)


def _train(config: TrainConfig, ranks: Ranks, request: StopRequest) -> Finished | Stopped:
    """Check everything that can be checked before a model is loaded; then build, resume, train and export. Collective.

    Args:
        config: The run, as it was given.
        ranks: This process.
        request: Tells whether a signal asks for a stop.
    """
    on_all_ranks(ranks, lambda: check_run_folder(config) if ranks.is_main else None)
    on_all_ranks(ranks, lambda: check_trackers(config))
    given = config.with_method_settings()
    config = on_all_ranks(ranks, lambda: fill_in_pattern(fill_in_global_batch(given, ranks.world_size)))
    ds = on_all_ranks(ranks, lambda: read_ds_config(config, ranks.world_size))
    check_agreement(ranks, to_yaml(config) + repr(ds))
    source = on_all_ranks(ranks, lambda: open_model(config, ds))
    tokenizer = on_all_ranks(ranks, lambda: load_tokenizer(config.model))
    config = fill_in_date(config, tokenizer, ranks)
    data = read_batches(config, tokenizer, ranks)
    config = _resolve_steps(config, data, ranks)
    text = read_validation(config, tokenizer, ranks)
    on_all_ranks(ranks, lambda: check_baseline(config, source, data))
    parent = on_all_ranks(ranks, lambda: open_parent(config))
    run = build_and_attach(config, ranks, source, ds, data, check_teacher(config, source, ranks), parent)
    first = first_masks(run.method)  # before a checkpoint brings the masks that they have become
    # Attaching has looked for a pattern that was not named
    config = dataclasses.replace(config, seft=dataclasses.replace(config.seft, pattern=config.seft.known_pattern))
    run.config = config
    origin = RunOrigin(
        model=model_fingerprint(source, run.method, ranks),
        data=with_order(data_fingerprint(data.sequences, ranks), data.order),
        sequences=data.num_sequences,
        global_batch=data.global_batch,
        seed=config.seed,
        teacher=run.teacher.fingerprint if run.teacher else None,
        parent=parent_fingerprint(parent, run.method, ranks) if parent else None,
    )
    state = resume(config, ranks, run.method, origin) or {}
    check_separation(run)
    validation = _open_validation(run, text, origin, state)
    on_all_ranks(ranks, lambda: open_run_folder(config) if ranks.is_main else None)
    with ExitStack() as files:
        record = Record(config, ranks, source, run.method, origin=origin, backend=run.backend, ds=ds, first=first)
        files.callback(record.close)
        _restore_scheduler(run, state)
        if ranks.is_main:
            print_line(f"kernels: {describe(ranks.device)}")
        start, counts = run.method.num_steps, state.get("metrics")
        metrics = on_all_ranks(
            ranks, lambda: Metrics(config, ranks.device, writes=ranks.is_main, start=start, state=counts)
        )
        files.callback(metrics.close)
        stopped = fit(run, data, origin, metrics, record, request, validation)
    stopped = stopped or _stopped_after_all_steps(run, request)
    if stopped is None:
        return Finished(finish(run, data, metrics, record, validation))
    if ranks.is_main:
        print_stopped(config, stopped.signal, stopped.step)
    return stopped


def _resolve_steps(given: TrainConfig, data: BatchStream, ranks: Ranks) -> TrainConfig:
    """Turn epochs into steps, and print what became of them and of a mix. Collective."""
    config = on_all_ranks(ranks, lambda: fill_in_steps(given, data))
    if given.epochs is not None and ranks.is_main:
        print_line(
            f"epochs={given.epochs:g}: {config.steps} steps ({data.num_sequences:,} sequences, {data.global_batch} in "
            "a step)"
        )
    if isinstance(data.sequences, MixedSequences) and ranks.is_main:
        for line in data.sequences.describe(config.total_steps * data.global_batch):
            print_line(line)
    return config


def _open_validation(
    run: TrainingRun, text: ValidationText | None, origin: RunOrigin, state: dict[str, Any]
) -> Validation:
    """Check what the run is evaluated on, and take over its earlier evaluations. Collective."""
    if text is not None and text.tokens == origin.data and run.ranks.is_main:
        print_line("warning: eval.data has the very sequences of data: its loss does not say how the model generalises")
    return Validation(run, text, state.get("validation"))


def fit(
    run: TrainingRun,
    data: BatchStream,
    origin: RunOrigin,
    metrics: Metrics,
    record: Record,
    request: StopRequest,
    validation: Validation,
) -> Stopped | None:
    """Take all optimizer steps that are left, evaluate, and save checkpoints, also of the best steps. Collective.

    Args:
        run: The parts of the run.
        data: This rank's micro-batches.
        origin: Fingerprints of model and data, for the checkpoints.
        metrics: Gets loss, learning rate and speed of every step.
        record: Gets the exact state after each recorded step.
        request: Asks this rank to stop.
        validation: Evaluates the model, and may end the run early.

    Returns:
        The signal that stopped all ranks before the last step; None: all steps are done, or the run has ended early.
        The state is saved either way.

    Raises:
        FloatingPointError: A loss or gradient is not finite; the weights were not changed by that step.
        OSError: A checkpoint could not be written; earlier ones are whole.
    """
    config, method = run.config, run.method
    saver, clock = method.saver(Path(config.output) / CHECKPOINTS, config.keep), SaveClock(config.save_every_minutes)
    stepper = Stepper(run, metrics, record, request, saver, clock, validation)
    first, last = method.num_steps + 1, method.total_steps
    step, steps = 0, range(0) if validation.is_over else range(first, last + 1)
    try:
        for step, micro_batches in zip(steps, data.batches(first - 1), strict=False):
            is_saved = step == last or bool(config.save_every and step % config.save_every == 0)
            agreement = stepper.train_step(step, micro_batches, is_saved=is_saved)
            if agreement is None:
                continue
            if agreement.is_written:
                saver.finish()
            is_saved |= validation.improved_at(step) or validation.is_over
            if is_saved or agreement.is_save_due or agreement.stop_signal:
                metrics.sync()
                record.sync()
                extra = checkpoint_extra(config, origin, _state_of(run, metrics, validation))
                saver.start(extra, validation.needs(step))
                clock.restart()
            if agreement.stop_signal:
                saver.finish()
                return Stopped(name_of(agreement.stop_signal), step) if step < last else None
            if validation.is_over:
                break
        saver.finish()
    except Exception as error:
        # On a GPU the error of a step is raised in the step after it, whose micro-batches are others.
        known = micro_batches if step == method.num_steps + 1 else []
        write_diagnosis(error, Path(config.output), run.ranks, method, data.indices(method.num_steps), known)
        raise
    return None


def _restore_scheduler(run: TrainingRun, state: dict[str, Any]) -> None:
    if "scheduler" not in state or run.scheduler is None:
        return
    try:
        run.scheduler.load_state_dict(state["scheduler"])
        run.method.param_groups[0]["lr"] = float(state["lr"])  # the scheduler itself sets it only after the next step
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the checkpoint's state of the scheduler does not fit: {error!r}; use another checkpoint"
        ) from error


def _state_of(run: TrainingRun, metrics: Metrics, validation: Validation) -> dict[str, Any]:
    state: dict[str, Any] = {"metrics": metrics.state()}
    evaluations = validation.state()
    if evaluations is not None:
        state["validation"] = evaluations
    if run.scheduler is not None:
        state |= {"scheduler": run.scheduler.state_dict(), "lr": run.method.param_groups[0]["lr"]}
    return state


def _stopped_after_all_steps(run: TrainingRun, request: StopRequest) -> Stopped | None:
    """Return the stop by the largest signal that any rank has got; None without one. Collective."""
    number = int(max_over_ranks(run.ranks, torch.tensor(request.number)))
    return Stopped(name_of(number), run.method.num_steps) if number else None


def _go_back_to_best(run: TrainingRun, validation: Validation) -> None:
    """Give the model the weights of the best evaluation, if they are to be exported. Collective.

    Raises:
        ValueError: Their checkpoint cannot be read.
    """
    best = validation.best
    if run.config.export != "best" or best is None or best.step == run.method.num_steps:
        return
    path = on_all_ranks(run.ranks, lambda: checkpoint_of(Path(run.config.output) / CHECKPOINTS, best.step))
    advice = "give the same command with --export last for the model of the last step"
    if path is None:
        raise ValueError(f"the checkpoint of step {best.step}, the best one, is gone: {advice}")
    if run.ranks.is_main:
        print_line(f"the model of step {best.step} is exported: its validation loss was the lowest, {best.loss:.4f}")
    try:
        run.method.rewind(path, run.source)
    except DamagedError as error:
        raise ValueError(f"{error}; {advice}") from error


def finish(
    run: TrainingRun, data: BatchStream, metrics: Metrics, record: Record, validation: Validation
) -> dict[str, Any]:
    """Check every layer's sparsity, export, and write the result. Collective.

    Returns:
        Content of result.json.
    """
    config, folder, method = run.config, Path(run.config.output), run.method
    steps = method.num_steps
    trained = {"trainable": method.trainable, "peak_memory_bytes": _peak_memory(run.ranks)}
    validation.complete()
    _go_back_to_best(run, validation)
    inputs = FinalizeInputs(folder, run.source, data.sequences, run.ranks.device, run.ranks.is_main)
    trained |= method.finalize(inputs)
    if method.prunes_in_the_end and config.export:
        validation.evaluate_exported(method.num_steps)
    with method.exact_zeros():  # the best step, or an early end, may lie between two evolutions
        layers = method.sparsity()
        if config.export:
            _export(run, data.sequences.invented_template)
    numel = sum(layer.numel for layer in layers)
    loss = metrics.last_loss if steps else None
    result = {
        "method": config.method,
        "backend": run.backend,
        "world_size": run.ranks.world_size,
        "density": method.density,
        "steps": steps,
        "sparsity": {
            "target": 1 - sum(layer.mask_size for layer in layers) / numel,
            "final": sum(layer.zeros for layer in layers) / numel,
            "layers_off_target": sum(layer.zeros != layer.numel - layer.mask_size for layer in layers),
        },
        "evolutions": metrics.evolutions,
        "reactivated": metrics.reactivated,
        "seconds": round(metrics.seconds, 3),
        "tokens": metrics.tokens,
        "loss": loss,
        **validation.result(steps),
        **trained,
    }
    record.finish(loss)
    if run.ranks.is_main:
        write_layers(folder, layers)
        write_json(folder / RESULT, result)
        print_summary(result)
    wait_for_all_ranks()  # no rank returns before the files are there
    return result


def _export(run: TrainingRun, chat_template: str | None) -> None:
    """Write the model and its delta file. Collective.

    Args:
        run: The parts of the run.
        chat_template: Chat template that the model was trained with and its tokenizer has not; None: no such.
    """
    config, folder = run.config, Path(run.config.output)

    def add_template(exported: Path) -> None:
        if chat_template is not None:
            write_text(exported / CHAT_TEMPLATE, chat_template)

    export_model(
        run.model,
        run.method.backend.full,
        folder / MODEL,
        run.source,
        writes=run.ranks.is_main,
        tokenizer=locate(config.model.tokenizer) if config.model.tokenizer else None,
        delta=folder / DELTA if config.is_seft else None,
        targets=run.method.changed_names,
        finish=add_template,
    )


def _peak_memory(ranks: Ranks) -> int:
    """Find the peak memory, in bytes, of the rank that used most. Collective."""
    return int(max_over_ranks(ranks, torch.tensor(facts.peak_memory(ranks.device))))
