"""SEFT in ``transformers.Trainer`` and its subclasses, e.g. TRL's ``SFTTrainer``."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from seft_dist.io import checkpoint
from seft_dist.optim.notices import SeftWarning
from seft_dist.optim.optimizer import SeftOptimizer

FOLDER = "seft"
"""Folder of SEFT's checkpoint in one of Trainer's."""


class SeftCallback(TrainerCallback):  # type: ignore[misc]  # has no types
    """Lets Trainer clip, log, save, resume and choose the best model with a ``SeftOptimizer``.

        seft = SeftOptimizer(model, SeftConfig(density=0.01), lr=1e-3)
        trainer = Trainer(model, args, train_dataset=data, optimizers=(seft, None))
        SeftCallback.add_to(trainer)
        trainer.train()

    With FSDP, Trainer takes ``optimizer_cls_and_kwargs=(SeftOptimizer, {"model": model, ...})`` instead.

    - ``max_grad_norm`` of TrainingArguments holds for SEFT, unless the optimizer has one of its own.
    - ``SeftConfig.steps`` becomes the number of steps of the training if it is None.
    - ``grad_norm`` in Trainer's log is the norm of the deltas' gradient.
    - Each checkpoint-N gets a folder "seft" with masks and deltas. ``resume_from_checkpoint`` goes on from it, exactly.
      After ``add_to`` it is written before Trainer's part, so older checkpoints are deleted only when all is there.
    - With ``load_best_model_at_end`` the optimizer goes back to the best checkpoint too.
    """

    def __init__(self, resume_from: str | Path | None = None) -> None:
        """Args:
        resume_from: Checkpoint of Trainer that training resumes from; None: the one of that step in ``output_dir``.
        """
        self._resume_from = resume_from
        self._seft: SeftOptimizer | None = None
        self._is_first = False
        self._saved_step: int | None = None

    @classmethod
    def add_to(cls, trainer: Trainer, resume_from: str | Path | None = None) -> "SeftCallback":
        """Add a callback to a trainer, before those that report to TensorBoard, W&B and so on.

        Callbacks that are given to Trainer come after them, so the reports would have Trainer's own ``grad_norm``.

        Args:
            trainer: The trainer.
            resume_from: As in the constructor.
        """
        callback = cls(resume_from)
        callback._is_first = True
        trainer.callback_handler.callbacks.insert(0, callback)
        save = trainer._save_checkpoint

        def save_both(*args: Any, **kwargs: Any) -> None:
            callback.on_save(trainer.args, trainer.state, trainer.control)
            save(*args, **kwargs)

        trainer._save_checkpoint = save_both
        return callback

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over clipping and the number of steps, and resume. Collective.

        Raises:
            ValueError: Trainer has another optimizer, the schedules differ, or there is nothing to resume from.
        """
        seft = self._seft = _find(kwargs["optimizer"])
        self._saved_step = None
        _check(seft, args, state, kwargs["model"])
        if seft.max_grad_norm is None and args.max_grad_norm:
            seft.max_grad_norm = args.max_grad_norm
        seft.is_managed = True
        if seft.config.steps is None:
            seft.config = dataclasses.replace(seft.config, steps=state.max_steps)
        elif seft.config.steps != state.max_steps:
            raise ValueError(
                f"SeftConfig.steps={seft.config.steps}, but Trainer takes {state.max_steps} optimizer steps: SEFT's "
                "schedule needs the same number; leave SeftConfig.steps out, and it is taken from Trainer"
            )
        if args.report_to and not self._is_first:
            warnings.warn(
                f"{', '.join(args.report_to)} get Trainer's grad_norm, which does not see the deltas: use "
                "SeftCallback.add_to(trainer) instead of callbacks=[SeftCallback()]",
                stacklevel=2,
            )
        seft.attach()
        if state.global_step and seft.num_steps != state.global_step:
            folder = self._resume_from or _folder(args, state.global_step)
            found = checkpoint.latest(Path(folder) / FOLDER)
            if found is None:
                newest = _newest_whole(Path(str(args.output_dir)))
                raise ValueError(
                    f"{folder} has no complete checkpoint of SEFT in its folder {FOLDER!r}, so masks and deltas of "
                    f"step {state.global_step} are missing: resume from a checkpoint that was saved with SeftCallback "
                    f"(the newest in output_dir: {newest or 'none'}), or name the one that Trainer resumes from "
                    "(SeftCallback(resume_from=...)) if it is not in output_dir"
                )
            checkpoint.load(seft, found)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put the norm of the deltas' gradient where Trainer has that of the anchors."""
        for entry in (logs or {}, *state.log_history[-1:]):
            if "grad_norm" in entry and self._seft is not None:
                entry["grad_norm"] = self._seft.grad_norm

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write masks and deltas beside what Trainer saves, once in a step. Collective."""
        if self._seft is not None and not args.save_only_model and self._saved_step != state.global_step:
            checkpoint.save(self._seft, _folder(args, state.global_step) / FOLDER, {}, keep=1)
            self._saved_step = state.global_step

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Follow Trainer back to the best checkpoint. Collective."""
        if self._seft is not None and args.load_best_model_at_end and state.best_model_checkpoint is not None:
            found = checkpoint.latest(Path(state.best_model_checkpoint) / FOLDER)
            if found is not None:
                checkpoint.load(self._seft, found)


def _check(seft: SeftOptimizer, args: TrainingArguments, state: TrainerState, model: Any) -> None:
    """Refuse what would train nothing or another schedule, and warn of arguments that have no effect.

    Raises:
        ValueError: Says what was found and what to change.
    """
    modules = set(model.modules())
    if not any(target.module in modules for target in seft._targets.values()):
        raise ValueError(
            "SeftOptimizer was made on another model than Trainer trains (model_init, or a copy?), so nothing would be "
            "trained: pass the same model object to both"
        )
    if seft.num_steps and not state.global_step:
        raise ValueError(
            f"SeftOptimizer has done {seft.num_steps} steps, and Trainer begins with step 1: resume_from_checkpoint, "
            "or make a new trainer and a new optimizer, whose schedule begins anew"
        )
    if seft.config.reactivate == "trial" and args.load_best_model_at_end:
        raise ValueError(
            "reactivate=trial with load_best_model_at_end: the best model may have positions on trial, which are no "
            'zeros; use reactivate="commit", or leave load_best_model_at_end out'
        )
    if seft.config.reactivate == "trial" and (args.save_strategy != "no" or args.eval_strategy != "no"):
        warnings.warn(
            "reactivate=trial: models that Trainer saves or evaluates between two evolutions have positions on trial, "
            "which are no zeros. The last evolution ends all trials; until then, save and evaluate inside "
            "seft.exact_zeros()",
            SeftWarning,
            stacklevel=3,
        )
    beta1, beta2 = seft.param_groups[0]["betas"]
    own = {"adam_beta1": beta1, "adam_beta2": beta2, "adam_epsilon": seft.param_groups[0]["eps"]}
    own["weight_decay"] = seft.param_groups[0]["weight_decay"]
    defaults = {field.name: field.default for field in dataclasses.fields(type(args))}
    ignored = [name for name, value in own.items() if getattr(args, name) not in (value, defaults[name])]
    if ignored:
        warnings.warn(
            f"{', '.join(ignored)} of TrainingArguments have no effect on SeftOptimizer: pass betas, eps and "
            "weight_decay to it",
            SeftWarning,
            stacklevel=3,
        )


def _folder(args: TrainingArguments, step: int) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def _newest_whole(folder: Path) -> Path | None:
    """Return the newest of Trainer's checkpoints in a folder that is complete and has SEFT's part, if there is one."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    numbered = [(int(path.name.removeprefix(prefix)), path) for path in folder.glob(f"{prefix}[0-9]*")]
    whole = [
        path
        for _, path in sorted(numbered)
        if (path / TRAINER_STATE_NAME).is_file() and checkpoint.latest(path / FOLDER) is not None
    ]
    return whole[-1] if whole else None


def _find(optimizer: Any) -> SeftOptimizer:
    """Return the SeftOptimizer inside the wrappers of accelerate and DeepSpeed."""
    inner = optimizer
    while not isinstance(inner, SeftOptimizer):
        last, inner = inner, getattr(inner, "optimizer", None)
        if inner is None:
            raise ValueError(
                f"Trainer has the optimizer {type(last).__name__}, not SeftOptimizer, so SEFT would train nothing: "
                'pass optimizer_cls_and_kwargs=(SeftOptimizer, {"model": model, "config": ..., "lr": ...}); with FSDP '
                "and DeepSpeed Trainer takes no optimizers=. With offload_optimizer in the ds_config, accelerate puts "
                'DeepSpeedCPUAdam in its place: remove it, or set "zero_force_ds_cpu_optimizer": false'
            )
    return inner
