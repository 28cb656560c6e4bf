"""Evaluation while a run trains: when it is due, on what, and at which step the model was best so far.

An evaluation is seft evaluate's perplexity on the layout of the run. It draws no random numbers and changes no
weight, so a run trains the same with it and without. What it found is in every checkpoint; a run that goes on makes the
evaluations that are left, and comes to the same best step.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from typing_extensions import NotRequired, TypedDict

from seft_dist.backends.fsdp import reshard
from seft_dist.backends.group import world_group
from seft_dist.config import EvalConfig, TrainConfig
from seft_dist.data.load import load_sequences
from seft_dist.data.sequences import Sample
from seft_dist.evaluation.perplexity import ScoringPlan, plan_scoring, score, scored_sequences
from seft_dist.files.kinds import check_kind
from seft_dist.io.library_types import PreTrainedTokenizerBase
from seft_dist.session.agreement import on_all_ranks, one_rank_per_machine_first
from seft_dist.session.distributed import Ranks
from seft_dist.training.build import TrainingRun
from seft_dist.training.fingerprint import data_fingerprint
from seft_dist.training.progress import print_line


class _Evaluated(TypedDict):
    step: int
    loss: float
    perplexity: float
    tokens: int
    seconds: float


class _State(TypedDict):
    data: str
    last: NotRequired[_Evaluated | None]
    best: NotRequired[_Evaluated | None]
    worse: NotRequired[int]


@dataclass(frozen=True)
class Evaluated:
    """The result of one evaluation; the same on every rank."""

    step: int
    """Optimizer steps done."""
    loss: float
    """Mean negative log-likelihood of a scored token, in nats."""
    perplexity: float
    """exp(loss)."""
    tokens: int
    """Number of scored tokens."""
    seconds: float
    """Duration."""

    def record(self) -> dict[str, Any]:
        """Return the entries of ``validation`` in metrics.jsonl."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "step"}


@dataclass(frozen=True)
class ValidationText:
    """Text to measure the loss on."""

    sequences: Sequence[Sample]
    """The sequences to score."""
    fingerprint: str
    """Hash of all tokens, with the settings that say which are scored; losses with other ones cannot be compared."""
    tokens: str
    """Hash of all tokens."""


def read_validation(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, ranks: Ranks) -> ValidationText | None:
    """Read and tokenise the text of the evaluations. Collective.

    Args:
        config: The run; dates are filled in.
        tokenizer: The model's.
        ranks: This process.

    Returns:
        None if nothing is evaluated.

    Raises:
        ValueError: The text cannot be used.
    """
    settings, data = config.eval, config.validation_data
    if data is None:
        return None
    try:
        loaded = one_rank_per_machine_first(ranks, lambda: load_sequences(data, tokenizer, progress=ranks.is_main))
        scored = on_all_ranks(ranks, lambda: scored_sequences(loaded, data, settings.stride, settings.max_tokens))
    except ValueError as error:
        raise ValueError(f"{'eval.data' if config.eval.data else 'data.holdout_share'}: {error}") from error
    tokens = data_fingerprint(loaded, ranks)
    return ValidationText(scored, f"{tokens} {settings.stride} {settings.max_tokens}", tokens)


class Validation:
    """The evaluations of a run, those of its earlier attempts included."""

    def __init__(self, run: TrainingRun, text: ValidationText | None, state: dict[str, Any] | None) -> None:
        """Check the text against the model, and take over what earlier attempts found. Collective.

        Args:
            run: The parts of the run.
            text: From ``read_validation``; None: nothing is evaluated.
            state: The state that ``state()`` gave at the last checkpoint, if there was one.

        Raises:
            ValueError: The model cannot read the text, or earlier evaluations were on another one.
        """
        self._run = run
        self._settings: EvalConfig = run.config.eval
        self._fingerprint = text.fingerprint if text else ""
        self._plan: ScoringPlan | None = None
        self.best: Evaluated | None = None
        """The evaluation with the lowest loss, the first one among equals."""
        self.last: Evaluated | None = None
        """The latest evaluation."""
        self.exported: Evaluated | None = None
        """That of the model as it is written, where that is another one."""
        self._worse = 0
        if text is None:
            return
        self._plan = on_all_ranks(run.ranks, lambda: plan_scoring(run.model, text.sequences, self._settings.batch_size))
        if state is not None:
            self._take_over(state)

    def _take_over(self, state: dict[str, Any]) -> None:
        known = check_kind(state, _State, "the checkpoint's state of the evaluations")
        if known["data"] != self._fingerprint:
            raise ValueError(
                "earlier evaluations of this run were on other text (eval.data, stride or max_tokens): their losses "
                "cannot be compared; use the same as before, or another output"
            )
        last, best = known.get("last"), known.get("best")
        self.last, self.best = Evaluated(**last) if last else None, Evaluated(**best) if best else None
        self._worse = known.get("worse", 0)

    def state(self) -> dict[str, Any] | None:
        """Return what a resumed run needs to go on evaluating, JSON; None if nothing is evaluated."""
        if self._plan is None:
            return None
        last, best = (dataclasses.asdict(each) if each else None for each in (self.last, self.best))
        return {"data": self._fingerprint, "last": last, "best": best, "worse": self._worse}

    def is_due(self, step: int) -> bool:
        """Return whether there is an evaluation after a step."""
        if self._plan is None:
            return False
        return step == self._run.config.total_steps or bool(self._settings.every and step % self._settings.every == 0)

    def evaluate(self, step: int) -> Evaluated:
        """Measure the loss after a step. Collective.

        Raises:
            FloatingPointError: The loss is not finite.
        """
        self.last = self._measure(step)
        is_best = self.best is None or self.last.loss < self.best.loss
        self.best, self._worse = (self.last, 0) if is_best else (self.best, self._worse + 1)
        return self.last

    def _measure(self, step: int) -> Evaluated:
        assert self._plan is not None
        run, begin = self._run, time.perf_counter()
        # An engine wants to be called itself; DDP's wrapper is about gradients only.
        forward_module = run.model if run.engine is None else run.forward_module
        try:
            with run.method.exact_zeros():  # as the model would be exported
                result = score(forward_module, self._plan, run.ranks.device, group=world_group())
        finally:
            reshard(run.model)  # else what an evaluation leaves gathered would hide the next update
        seconds = round(time.perf_counter() - begin, 3)
        if not math.isfinite(result.loss):
            raise FloatingPointError(
                f"evaluation after step {step}: the loss is not finite: the model's weights or activations are not"
            )
        return Evaluated(step, result.loss, result.perplexity, result.num_tokens, seconds)

    def complete(self) -> None:
        """Evaluate the model as it is if that was not done, e.g. for a method without steps. Collective."""
        step = self._run.method.num_steps
        if self._plan is not None and (self.last is None or self.last.step != step):
            self.evaluate(step)

    def evaluate_exported(self, step: int) -> None:
        """Measure the model as it is written: pruned again, it is not the one that was trained. Collective.

        Args:
            step: Optimizer steps behind it.
        """
        if self._plan is None:
            return
        try:
            self.exported = self._measure(step)
        except FloatingPointError as error:  # on every rank; the run is not lost
            if self._run.ranks.is_main:
                print_line(f"warning: {error}; it was pruned again after the last step")

    def improved_at(self, step: int) -> bool:
        """Return whether a step is the best so far."""
        return self.best is not None and self.best.step == step

    @property
    def is_over(self) -> bool:
        """True: the loss has not fallen for so long that the run ends early."""
        return bool(self._settings.patience) and self._worse >= self._settings.patience

    def needs(self, step: int) -> list[int]:
        """Return the steps of earlier checkpoints that one of this step needs: that of the best model."""
        return [self.best.step] if self.best is not None and self.best.step < step else []

    def result(self, steps: int) -> dict[str, Any]:
        """Return the entries for result.json.

        Args:
            steps: Optimizer steps that the run has done.
        """
        if self.last is None or self.best is None:
            return {}
        early = self.is_over and steps < self._run.config.total_steps
        found = {"last": dataclasses.asdict(self.last), "best": dataclasses.asdict(self.best)}
        found |= {"exported": dataclasses.asdict(self.exported)} if self.exported else {}
        return {"validation": found | {"stopped_early": early}}
