"""Distillation: the model whose predictions a pruned one learns to match (docs/distillation.md)."""

from dataclasses import dataclass

from seft_dist.config.checks import check, check_numbers

TEACHER_CHUNK = 1024
"""Number of tokens whose predictions are compared at a time: fp32 copies of all would be a step's largest tensors."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The teacher of a run of seft train; without a path there is none."""

    path: str | None = None
    """Folder or hub name of a Hugging Face causal LM with the same vocabulary, usually the model before it was pruned.
    It is held as the model is (sharded by FSDP2 and ZeRO-3) and in its type, and is never trained. None: no teacher."""
    logits: float = 0.5
    """Share of the loss that is the divergence (KL) of the model's predictions from the teacher's, 0 to 1. The rest is
    cross entropy. Both are means over the tokens that are learnt."""
    temperature: float = 1.0
    """Both predictions are softened by it, and their divergence is multiplied by its square. Above 0."""
    hidden: float = 0.0
    """Weight of a further term: the squared distance between the outputs of the model and of the teacher as a share of
    the teacher's square, mean over tokens and decoder layers. Needs a teacher of the same depth and width. 0: none."""

    def __post_init__(self) -> None:
        check_numbers(self, "teacher.")
        check(self.path != "", "teacher.path is empty", "a folder or a hub name, or null for no teacher")
        check(0 <= self.logits <= 1, f"teacher.logits={self.logits}", "a share of the loss from 0 to 1")
        check(self.temperature > 0, f"teacher.temperature={self.temperature}", "a number above 0")
        check(self.hidden >= 0, f"teacher.hidden={self.hidden}", "a weight from 0 on")
        if self.path is None:
            default = TeacherConfig.__dataclass_fields__
            changed = [
                name for name in ("logits", "temperature", "hidden") if getattr(self, name) != default[name].default
            ]
            check(not changed, f"teacher.{'/'.join(changed)} without teacher.path", "teacher.path, or none of them")
        else:
            check(
                self.logits > 0 or self.hidden > 0,
                "teacher.path with teacher.logits=0 and teacher.hidden=0",
                "one of them above 0: else the teacher is computed for nothing",
            )
