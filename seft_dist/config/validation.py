"""Evaluation of a run while it trains."""

from dataclasses import dataclass

from seft_dist.config.checks import check, check_numbers
from seft_dist.config.data import DataConfig


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Validation while a run trains: the perplexity that seft evaluate measures, on the layout of the run."""

    data: DataConfig | None = None
    """Text to measure the loss on, which training does not see; options as those of data. None: the records that
    data.holdout_share keeps out of training, else no evaluation."""
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
        check(not self.patience or self.every > 0, f"eval.patience={self.patience} with eval.every=0", "eval.every")
        if self.data is not None:
            self.check_text(self.data, "eval.data")
            held_out = self.data.holdout_share or self.data.holdout_every
            check(
                not held_out or self.data.holdout,
                "eval.data with holdout_share or holdout_every measures what is not held out",
                "eval.data.holdout true; or the share in data, and no eval.data",
            )

    def check_text(self, data: DataConfig | None, name: str) -> None:
        """Check the options against the text that is measured.

        Args:
            data: The text; None: there is none.
            name: Its name on the command line.

        Raises:
            ValueError: They contradict each other.
        """
        if data is None:
            wanted = "text to measure: --eval.data.path FILE, or --data.holdout_share 0.02"
            for option in ("every", "stride", "max_tokens", "patience"):
                check(not getattr(self, option), f"eval.{option} without eval.data", wanted)
            return
        if self.stride is not None:
            windows = "one text, in windows that slide over it"
            check(not data.separate, f"eval.stride={self.stride} with {name}.separate", f"{windows}: separate false")
            check(data.mix is None, f"eval.stride={self.stride} with {name}.mix", f"{windows}: no mix")
        check(
            self.stride is None or 1 <= self.stride < data.seq_len,
            f"eval.stride={self.stride} with {name}.seq_len={data.seq_len}",
            f"a stride of 1 to {name}.seq_len - 1 tokens",
        )
