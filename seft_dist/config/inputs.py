"""Models and data, as every command reads them."""

from dataclasses import dataclass
from datetime import date
from typing import Literal

from seft_dist.config.checks import check, check_numbers

DType = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model, and the type in which its weights are held."""

    path: str
    """Folder of a Hugging Face causal LM (config.json, *.safetensors, tokenizer), or a hub name."""
    dtype: DType = "auto"
    """Type of the weights: "float32", "bfloat16", or "auto", that of the checkpoint."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer; None: the model's own."""
    activation_checkpointing: bool = False
    """True: keep decoder layers' inputs only, compute layers again in backward (less memory, about 1/3 more time)."""

    def __post_init__(self) -> None:
        check(bool(self.path), "model.path is empty", "a folder of a Hugging Face causal LM, or a hub name")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The records to read, and the way they become token sequences."""

    path: str
    """A file (.json, .jsonl, .parquet, or .txt as one record), a folder of such files, or a dataset's hub name."""
    name: str | None = None
    """Configuration of a hub dataset, e.g. "wikitext-2-raw-v1"."""
    split: str = "train"
    """Split of a hub dataset; local files are one split named "train"."""
    kind: Literal["auto", "text", "instruction", "chat"] = "auto"
    """Kind of records: "text" (packed into full blocks), "instruction" (prompt and answer; loss on the answer),
    "chat" (a list of messages; loss on the assistant's turns); "auto" decides by the columns."""
    text_field: str = "text"
    """Column with the text."""
    prompt_field: str = "instruction"
    """Column with the instruction or question."""
    input_field: str = "input"
    """Column with an optional further input, appended to the instruction where present and not empty."""
    answer_field: str = "output"
    """Column with the answer."""
    messages_field: str = "messages"
    """Column with a list of {"role", "content"} messages."""
    tools_field: str = "tools"
    """Column with an optional list of tools (JSON schemas), handed to the chat template with the messages."""
    join: Literal["documents", "concatenate", "newline", "blank_line"] = "documents"
    """Way to join text records to one stream. "documents": each with the special tokens that the tokenizer adds and an
    eos behind it. The others make one text of all records, with nothing, "\\n" or "\\n\\n" between them, and tokenise
    that: at most one bos, no eos. Papers on pruning join the lines of WikiText with "blank_line"."""
    date: str | None = None
    """Date that a chat template gets as today's, YYYY-MM-DD. None: today; a run keeps the day on which it began."""
    seq_len: int = 1024
    """Tokens in a sequence: the length of packed blocks, and the limit at which longer records are cut."""
    holdout_every: int = 0
    """Keep every n-th record (the n-th, 2n-th, ...) out of training, for evaluation. 0: keep none out."""
    holdout: bool = False
    """True: read the records that holdout_every keeps out, instead of the others."""
    max_records: int | None = None
    """Read at most this many records, after holding out. None: all."""

    def __post_init__(self) -> None:
        check_numbers(self, "data.")
        check(bool(self.path), "data.path is empty", "a file, a folder or the hub name of a dataset")
        if self.date is not None:
            check(_is_day(self.date), f"data.date={self.date}", "a day as YYYY-MM-DD, or null")
        check(
            self.join == "documents" or self.kind in ("auto", "text"),
            f"data.join={self.join} with data.kind={self.kind}",
            "data.kind text: only text is joined",
        )
        check(self.seq_len >= 2, f"data.seq_len={self.seq_len}", "at least 2 tokens")
        check(
            self.holdout_every == 0 or self.holdout_every >= 2,
            f"data.holdout_every={self.holdout_every}",
            "0 or at least 2",
        )
        check(
            not self.holdout or self.holdout_every >= 2,
            "data.holdout without holdout_every",
            "data.holdout_every of 2 or more",
        )
        check(
            self.max_records is None or self.max_records >= 1,
            f"data.max_records={self.max_records}",
            "at least 1, or null",
        )


def _is_day(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
