"""Evaluation of a run while it trains."""

from dataclasses import dataclass

from seft_dist.config.checks import check, check_numbers
from seft_dist.config.data import DataConfig


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Validation while a run trains: the perplexity that seft evaluate measures, on the layout of the run."""

    data: DataConfig | None = None
    """Text to measure the loss on, which training does not see; options as those of data. None: no evaluation."""
    every: int = 0
    """Optimizer steps between evaluations; there is always one after the last step. 0: only that one."""
    batch_size: int = 4
    """Sequences of a rank in one forward pass of an evaluation."""
    stride: int | None = None
    """Tokens between the beginnings of sliding windows over text, as in seft evaluate. None: blocks side by
    side."""
    max_tokens: int | None = None
    """Measure on at most this many tokens, so that an evaluation takes little time. None: all."""
    patience: int = 0
    """Early stopping: end the run after so many evaluations in a row without a lower loss. 0: never."""

    def __post_init__(self) -> None:
        check_numbers(self, "eval.")
        check(self.every >= 0, f"eval.every={self.every}", "0 or a number of steps")
        check(self.batch_size >= 1, f"eval.batch_size={self.batch_size}", "at least 1")
        check(self.patience >= 0, f"eval.patience={self.patience}", "0 or a number of evaluations")
        most = self.max_tokens
        check(most is None or most >= 2, f"eval.max_tokens={most}", "at least 2, or null")
        if self.data is None:
            for name in ("every", "stride", "max_tokens", "patience"):
                check(
                    not getattr(self, name), f"eval.{name} without eval.data", "text to measure: --eval.data.path FILE"
                )
            return
        check(not self.patience or self.every > 0, f"eval.patience={self.patience} with eval.every=0", "eval.every")
        check(
            self.stride is None or 1 <= self.stride < self.data.seq_len,
            f"eval.stride={self.stride} with eval.data.seq_len={self.data.seq_len}",
            "a stride of 1 to eval.data.seq_len - 1 tokens",
        )
