"""Data, as every command reads it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from datetime import date
from typing import Any, Literal

from seft_dist.config.checks import check, check_numbers


@dataclass(frozen=True, kw_only=True)
class RecordsConfig:
    """The records of one source, and the columns in which they hold what."""

    path: tuple[str, ...] | str = ()
    """A file (.json, .jsonl, .parquet, or .txt as one record), a folder of such files, a pattern such as
    "data/part-*.jsonl", a list of these ("[a.jsonl, b.jsonl]", all of one kind), or a dataset's hub name."""
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
    """Column with the instruction or question. Without it and answer_field, "prompt" and "completion" are taken."""
    input_field: str = "input"
    """Column with an optional further input, appended to the instruction where present and not empty."""
    answer_field: str = "output"
    """Column with the answer."""
    messages_field: str = "messages"
    """Column with a list of {"role", "content"} messages, or of ShareGPT's {"from", "value"}. Without it,
    "conversations" is taken."""
    tools_field: str = "tools"
    """Column with an optional list of tools (JSON schemas), handed to the chat template with the messages."""
    max_records: int | None = None
    """Read at most this many records, after holding out. None: all."""

    def __post_init__(self) -> None:
        check_numbers(self, "data.")
        check(all(self.paths), f"data.path={self.path} has an empty entry", "files, folders or patterns")
        check(
            self.max_records is None or self.max_records >= 1,
            f"data.max_records={self.max_records}",
            "at least 1, or null",
        )

    @property
    def paths(self) -> tuple[str, ...]:
        """The entries of path."""
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def label(self) -> str:
        """The paths as one text, for messages."""
        return ", ".join(self.paths)


@dataclass(frozen=True, kw_only=True)
class SourceConfig(RecordsConfig):
    """One source of a mix; what is not said about its records is as in the defaults of data."""

    weight: float
    """Share of the sequences that come from this source, as a part of the sum of all weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.path), "a source of data.mix has no path", "a file, a folder, a pattern or a hub name")
        check(self.weight > 0, f"weight={self.weight} of {self.label}", "a number above 0")


@dataclass(frozen=True, kw_only=True)
class DataConfig(RecordsConfig):
    """The records to read, and the way they become token sequences."""

    mix: dict[str, SourceConfig] | None = None
    """Several sources instead of path, by names of your choice: {docs: {path: a.jsonl, weight: 3}, chats: {path:
    b.jsonl, weight: 1}}. Each may have options of its own for kind, columns, name, split and max_records. Training
    takes each one's share of the sequences evenly over the run, and repeats a source that has too few."""
    join: Literal["documents", "concatenate", "newline", "blank_line"] = "documents"
    """Way to join text records to one stream. "documents": each with the special tokens that the tokenizer adds and an
    eos behind it. The others make one text of all records, with nothing, "\\n" or "\\n\\n" between them, and tokenise
    that: at most one bos, no eos. Papers on pruning join the lines of WikiText with "blank_line"."""
    date: str | None = None
    """Date that a chat template gets as today's, YYYY-MM-DD. None: today; a run keeps the day on which it began."""
    separate: bool = False
    """True: several documents or conversations share a sequence of up to seq_len tokens, and each is read as if it were
    alone: positions begin at 0, attention stays inside, and no first token is learned from the document before. False:
    documents of text see those before them in their block, and each conversation is a sequence of its own."""
    num_proc: int = 1
    """Processes that tokenise, for data that is not in the cache yet. The tokens are the same for any number."""
    seq_len: int = 1024
    """Tokens in a sequence: the length of packed blocks, and the limit at which longer records are cut."""
    holdout_every: int = 0
    """Keep every n-th record (the n-th, 2n-th, ...) out of training, for evaluation. 0: keep none out."""
    holdout_share: float = 0.0
    """Keep this share of the records out of training, e.g. 0.02, chosen by a hash of their content: equal records are
    all kept out or none, and more records change nothing for those that were there. seft train evaluates on them if
    there is no eval.data. 0: keep none out."""
    holdout: bool = False
    """True: read the records that holdout_every or holdout_share keeps out, instead of the others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mix is None:
            check(bool(self.path), "data.path is empty", "a file, a folder or the hub name of a dataset")
        else:
            self._check_mix(self.mix)
        check(self.num_proc >= 1, f"data.num_proc={self.num_proc}", "at least 1")
        self._check_separate()
        self._check_holdout()
        if self.date is not None:
            check(_is_day(self.date), f"data.date={self.date}", "a day as YYYY-MM-DD, or null")
        check(
            self.join == "documents" or self.kind in ("auto", "text"),
            f"data.join={self.join} with data.kind={self.kind}",
            "data.kind text: only text is joined",
        )
        check(self.seq_len >= 2, f"data.seq_len={self.seq_len}", "at least 2 tokens")

    def _check_mix(self, mix: dict[str, SourceConfig]) -> None:
        check(bool(mix), "data.mix is empty", "at least one source, as {NAME: {path: FILE, weight: 1}}, or null")
        own = [field.name for field in fields(RecordsConfig) if getattr(self, field.name) != field.default]
        given = ", ".join(f"data.{name}" for name in own)
        check(not own, f"{given} beside data.mix", "these for each source: {NAME: {path: FILE, weight: 1, ...}}")

    def _check_separate(self) -> None:
        check(
            not self.separate or self.join == "documents",
            f"data.separate with data.join={self.join}",
            "data.join documents: one text has nothing to be separated",
        )

    def _check_holdout(self) -> None:
        every, share = self.holdout_every, self.holdout_share
        check(every == 0 or every >= 2, f"data.holdout_every={every}", "0 or at least 2")
        check(0 <= share < 1, f"data.holdout_share={share}", "0 or a share below 1, e.g. 0.02")
        check(not (every and share), f"data.holdout_every={every} with data.holdout_share={share}", "one of the two")
        check(
            not self.holdout or every >= 2 or share > 0,
            "data.holdout without holdout_every",
            "data.holdout_every of 2 or more, or data.holdout_share above 0",
        )

    @property
    def sources(self) -> "dict[str, DataConfig]":
        """The sources of the mix as data sets of their own; empty without a mix."""
        records = [field.name for field in fields(RecordsConfig)]
        return {
            name: replace(self, mix=None, **{key: getattr(source, key) for key in records})
            for name, source in (self.mix or {}).items()
        }

    @property
    def held_out(self) -> "DataConfig":
        """The records that are kept out, all of them."""
        mix = self.mix and {name: replace(source, max_records=None) for name, source in self.mix.items()}
        return replace(self, holdout=True, max_records=None, mix=mix)


def paths_of(data: Mapping[str, Any]) -> list[str]:
    """Return the paths that a data set's options name, those of a mix too.

    Args:
        data: Options as a file holds them; entries of other types than a configuration's count as missing.
    """
    path, mix = data.get("path"), data.get("mix")
    own = path if isinstance(path, list) else [path]
    sources = [source for source in mix.values() if isinstance(source, dict)] if isinstance(mix, dict) else []
    return [each for each in own if isinstance(each, str) and each] + [each for s in sources for each in paths_of(s)]


def _is_day(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
