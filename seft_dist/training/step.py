"""One optimizer step of a run, in its order: forward and backward, agreement between the ranks, update, record.

build.py makes what a step moves (model, engine, optimizer); trainer.py has the loop over the steps.

    micro-batches of this rank -> loss weights -> forward and backward       gradients, not yet averaged
                               -> agreement, if the step is recorded         losses, tokens, stop signal of all ranks
                               -> learning rate -> optimizer                 averages, clips and applies the gradients
                               -> evaluation, if one is due                  loss on other text
                               -> record, if the step is recorded            metrics.jsonl, trace.jsonl, manifest.json
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from seft_dist.config import AdamConfig
from seft_dist.data.batches import Batch, count_loss_tokens, model_inputs
from seft_dist.io.checkpoint import BackgroundSaver
from seft_dist.session.agreement import stack_over_ranks, sum_over_ranks
from seft_dist.session.distributed import Ranks
from seft_dist.session.signals import StopRequest
from seft_dist.training.build import TrainingRun
from seft_dist.training.metrics import Metrics
from seft_dist.training.record import Record
from seft_dist.training.saving import SaveClock
from seft_dist.training.teacher import learnt_positions
from seft_dist.training.validation import Evaluated, Validation


@dataclass
class LocalStep:
    """A step as this rank knows it, before the ranks have exchanged losses."""

    step: int
    loss: Tensor
    """This rank's share of the mean loss times the number of ranks, on the device: nobody has waited for it."""
    tokens: int
    """Tokens that this rank has processed."""
    lr: float = 0.0


@dataclass(frozen=True)
class Agreement:
    """Facts that the ranks have exchanged after the backward pass of a recorded step; the same on every rank."""

    losses: list[float]
    """Mean over all loss tokens, for each step since the one that was recorded before."""
    tokens: list[int]
    """Tokens of all ranks, for each of these steps."""
    stop_signal: int
    """The signal that asks for a stop, 0 for none."""
    is_save_due: bool
    """True: a checkpoint is due by rank 0's clock."""
    is_written: bool
    """True: every rank's part of the checkpoint that has begun is on disk, or has failed."""


class Stepper:
    """Takes the optimizer steps of a run and records them.

    Gradients are exchanged in every step. Losses, stop signals and the state of the checkpoint are exchanged in steps
    that are recorded (see ``is_recorded``). Only these, and steps inside a window, wait for the device.
    """

    def __init__(
        self,
        run: TrainingRun,
        metrics: Metrics,
        record: Record,
        request: StopRequest,
        saver: BackgroundSaver,
        clock: SaveClock,
        validation: Validation,
    ) -> None:
        """Args:
        run: The parts of the run.
        metrics: Gets loss, learning rate and speed.
        record: Gets the exact state, for comparisons of runs.
        request: Asks this rank to stop.
        saver: Writes the checkpoints.
        clock: Says when one is due by time.
        validation: Evaluates the model.
        """
        self._run, self._metrics, self._record = run, metrics, record
        self._request, self._saver, self._clock, self._validation = request, saver, clock, validation
        self._unrecorded: list[LocalStep] = []

    def train_step(self, step: int, micro_batches: list[Batch], *, is_saved: bool) -> Agreement | None:
        """Take one optimizer step. Collective.

        Args:
            step: Counted from 1.
            micro_batches: This rank's, as many as on every other rank.
            is_saved: True: a checkpoint follows.

        Returns:
            Facts that the ranks have exchanged; None for a step in which they exchanged gradients only.

        Raises:
            FloatingPointError: A loss or gradient is not finite; that step has changed no weight. It is raised by a
                later call if the step was not recorded.
        """
        run, config = self._run, self._run.config
        # For dropout. It is derived anew in each step, so that no checkpoint needs the state of a generator.
        torch.manual_seed(_seed_of_step(config.seed, step, run.ranks.rank))
        loss = forward_backward(run, micro_batches)
        self._unrecorded.append(LocalStep(step, loss, _count_tokens(micro_batches)))

        # Before the update: a loss that is not finite must not change the weights.
        is_evaluated = self._validation.is_due(step)
        is_logged = config.trace or step % config.log_every == 0 or run.method.changes_topology(step)
        is_recorded = is_saved or is_evaluated or is_logged
        agreement = None
        if is_recorded:
            agreement = agree(run.ranks, self._unrecorded, self._request, self._saver, self._clock)

        self._unrecorded[-1].lr = update_weights(run, step)
        evaluated = self._validation.evaluate(step) if is_evaluated else None
        if agreement is not None:
            self._record_steps(agreement, micro_batches, evaluated)
        return agreement

    def _record_steps(self, agreement: Agreement, micro_batches: list[Batch], evaluated: Evaluated | None) -> None:
        """Record the last step, and in the metrics also those since the one that was recorded before. Collective."""
        method, last = self._run.method, self._unrecorded[-1]
        for local, loss, tokens in zip(self._unrecorded, agreement.losses, agreement.tokens, strict=True):
            self._metrics.step(
                local.step,
                loss=loss,
                tokens=tokens,
                lr=local.lr,
                grad_norm=method.grad_norm,
                evolution=method.evolution if local is last else None,
                validation=evaluated if local is last else None,
            )
        self._record.step(last.step, micro_batches, loss=agreement.losses[-1], tokens=agreement.tokens[-1], lr=last.lr)
        self._unrecorded = []


def forward_backward(run: TrainingRun, micro_batches: list[Batch]) -> Tensor:
    """Compute losses and gradients of one optimizer step. Collective.

    Every loss token of the step weighs the same, whichever rank and micro-batch it falls into.

    Args:
        run: The parts of the run.
        micro_batches: This rank's.

    Returns:
        This rank's share of the mean loss times the number of ranks, a scalar on its device.
    """
    ranks = run.ranks
    loss_tokens = [count_loss_tokens(batch) for batch in micro_batches]
    global_loss_tokens = int(sum_over_ranks(ranks, torch.tensor(sum(loss_tokens))))
    total = torch.zeros((), device=ranks.device)
    for i, (batch, tokens) in enumerate(zip(micro_batches, loss_tokens, strict=True)):
        # The model's loss is a mean over this micro-batch, and gradients are averaged over the ranks.
        loss = _mean_loss(run, batch, tokens) * (tokens * ranks.world_size / global_loss_tokens)
        is_last = i + 1 == len(micro_batches)
        run.method.set_is_last_backward(is_last)
        if run.engine is None:
            loss.backward()
        else:
            run.engine.backward(loss * len(micro_batches))  # the engine divides by their number
            if not is_last:
                run.engine.step()  # before the last one it only counts micro-batches
        total += loss.detach().float()
    return total


def _mean_loss(run: TrainingRun, batch: Batch, loss_tokens: int) -> Tensor:
    """Compute the mean loss of a micro-batch; without loss tokens any number with a gradient, to be multiplied by 0."""
    inputs = {key: value.to(run.ranks.device) for key, value in model_inputs(batch).items()}
    if not loss_tokens:
        # This rank only takes part in the collectives of forward and backward: a mean over no token would be 0 / 0.
        del inputs["labels"]
    if run.teacher is not None:
        return run.teacher.loss(run.forward_module, inputs, learnt_positions(batch).to(run.ranks.device))
    outputs = run.forward_module(**inputs)
    loss: Tensor = outputs.loss if loss_tokens else outputs.logits.float().mean()
    return loss


def agree(
    ranks: Ranks, unrecorded: list[LocalStep], request: StopRequest, saver: BackgroundSaver, clock: SaveClock
) -> Agreement:
    """Exchange what must be known before the optimizer changes the weights again. Collective.

    Waits for the device. Called in recorded steps only.

    Args:
        ranks: This process.
        unrecorded: The steps since the last call; the backward pass of the last one is done, its update is not.
        request: Asks this rank to stop.
        saver: Writes the checkpoints.
        clock: Says when one is due by time.

    Raises:
        FloatingPointError: A loss is not finite; names the step and the ranks.
    """
    count = len(unrecorded)
    tokens = [float(local.tokens) for local in unrecorded]
    rest = torch.tensor(
        [*tokens, clock.is_due, request.number, saver.written], dtype=torch.float64, device=unrecorded[-1].loss.device
    )
    row = torch.cat([torch.stack([local.loss.double() for local in unrecorded]), rest])
    table = stack_over_ranks(ranks, row).cpu()
    for i, local in enumerate(unrecorded):
        bad = [f"{rank} ({value})" for rank, value in enumerate(table[:, i].tolist()) if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(
                f"step {local.step}: the loss is not finite on rank {', '.join(bad)}; the weights are those of step "
                f"{unrecorded[-1].step - 1}. Lower the learning rate, or look at this batch"
            )
    return Agreement(
        losses=[sum(table[:, i].tolist()) / ranks.world_size for i in range(count)],
        tokens=table[:, count : 2 * count].sum(0).long().tolist(),
        is_save_due=bool(table[0, -3]),
        stop_signal=int(table[:, -2].max()),
        is_written=bool(table[:, -1].all()),
    )


def update_weights(run: TrainingRun, step: int) -> float:
    """Set the learning rate and let the optimizer take its step. Collective.

    Args:
        run: The parts of the run.
        step: Counted from 1.

    Returns:
        The learning rate it used.
    """
    group = run.method.param_groups[0]
    if run.scheduler is None:  # otherwise DeepSpeed's scheduler has set it
        group["lr"] = run.peak_lr * lr_factor(run.config.optim, step, run.config.total_steps)
    lr = float(group["lr"])  # read now: the engine's scheduler changes it at the end of the step
    if run.engine is not None:
        run.engine.step()
    else:
        run.method.step()
        run.method.zero_grad()
    return lr


def lr_factor(optim: AdamConfig, step: int, steps: int) -> float:
    """Compute the learning rate of a step as a share of the peak.

    It is above 0 in every step, so that each update moves what the last evolution has grown.

    Args:
        optim: Warm-up and decay.
        step: Counted from 1.
        steps: Number of steps of the whole run.
    """
    warmup = round(optim.warmup * steps)
    if step <= warmup:
        return step / warmup
    progress = (step - warmup - 1) / max(1, steps - warmup)
    if optim.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if optim.schedule == "linear" else 1.0


def _seed_of_step(seed: int, step: int, rank: int) -> int:
    """Derive a step's seed from these three alone: a resumed run draws the numbers of the uninterrupted one."""
    return int.from_bytes(hashlib.sha256(f"step {seed} {step} {rank}".encode()).digest()[:8], "little", signed=True)


def _count_tokens(micro_batches: list[Batch]) -> int:
    """Count the tokens that this rank processes in a step; batches without loss tokens only fill up a step."""
    return sum(int(batch["attention_mask"].sum()) for batch in micro_batches if count_loss_tokens(batch))
