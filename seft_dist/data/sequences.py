"""Token sequences of a data set, read from a memory-mapped file.

A sequence is a tuple of 1-D int64 tensors of equal length, ``input_ids`` and ``labels``. A label of -100 has no loss.
With ``data.separate`` a third tensor, ``position_ids``, begins at 0 with each document.
"""

import hashlib
import json
import logging
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seft_dist.config import DataConfig
from seft_dist.data.chat import REASONS
from seft_dist.data.records import LOCATION

log = logging.getLogger(__name__)

IGNORE = -100

Sample = tuple[Tensor, ...]


@dataclass(frozen=True)
class Provenance:
    """The records that token sequences were made from, and the settings that they were made with."""

    config: DataConfig
    kind: str
    """"text", "instruction" or "chat"."""
    records: Any
    """The records that were read, a ``datasets.Dataset``."""
    date: str | None
    """Day that the chat template was given as today, YYYY-MM-DD; None: the template does not use the date."""
    invented_template: str | None
    """Chat template that took the place of the tokenizer's, which has none; None: there was no need of one."""
    adds_bos: bool
    """The tokenizer puts a bos token in front of ordinary text."""

    @property
    def bos(self) -> str:
        """Description of where bos tokens are, in words."""
        if self.kind != "text":
            return "as the chat template writes it"
        if not self.adds_bos:
            return "none"
        return "one in front of each record" if self.config.join == "documents" else "one in front of the text"

    def fingerprint(self) -> str:
        """Hash the records that were read, independently of the tokenizer.

        Returns:
            32 hexadecimal digits; equal for equal records in equal columns, whichever files they are in.
        """
        digest = hashlib.sha256()
        columns = sorted(name for name in self.records.column_names if name != LOCATION)
        for start in range(0, len(self.records), 1000):
            some = self.records[start : start + 1000]
            for row in zip(*(some[name] for name in columns), strict=True):
                digest.update(json.dumps(dict(zip(columns, row, strict=True))).encode() + b"\n")
        return digest.hexdigest()[:32]


class TokenSequences(Sequence[Sample]):
    """Token sequences of one source or several."""

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """Number of tokens in the whole data set."""

    @property
    @abstractmethod
    def provenances(self) -> list[Provenance]:
        """Origin of the sequences, one for each source."""

    @property
    def invented_template(self) -> str | None:
        """Chat template that took the place of the tokenizer's, which has none; None: there was no need of one."""
        return next((each.invented_template for each in self.provenances if each.invented_template), None)

    @property
    def date(self) -> str | None:
        """Day that the chat template was given as today, YYYY-MM-DD; None: nothing was written with a date."""
        return next((each.date for each in self.provenances if each.date), None)

    @abstractmethod
    def contents(self, start: int, stop: int) -> Iterator[Any]:
        """Yield the lengths and then the tokens of the sequences start <= i < stop, as int32 arrays, for a digest."""

    def lengths(self) -> NDArray[np.int32]:
        """Return the number of tokens of every sequence."""
        starts = range(0, len(self), 10_000)
        parts = [next(iter(self.contents(start, min(start + 10_000, len(self))))) for start in starts]
        return np.concatenate(parts).astype(np.int32, copy=False)


class PackedBlocks(TokenSequences):
    """Concatenated documents as blocks of ``seq_len`` tokens. A block is copied only when it is read."""

    def __init__(self, encoded: Any, provenance: Provenance) -> None:
        config = provenance.config
        self.provenance, self.num_documents = provenance, len(encoded)
        chunks = encoded.data.column("input_ids").chunks if len(encoded) else []
        self._chunks = [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in chunks]
        self._starts = np.cumsum([0] + [len(chunk) for chunk in self._chunks])
        self._seq_len = config.seq_len
        self._documents: NDArray[np.int64] | None = None
        """First token of each document; None if documents are not separate."""
        if config.separate:
            rows = encoded.data.column("input_ids").chunks if len(encoded) else []
            lengths = [row.value_lengths().to_numpy(zero_copy_only=False) for row in rows]
            self._documents = np.cumsum(np.concatenate([[0], *lengths]).astype(np.int64))
        self._encoded = encoded  # keeps the memory map open
        if len(self) == 0:
            raise ValueError(
                f"{config.label}: {self.num_tokens} tokens in {len(encoded)} records, less than one block of "
                f"data.seq_len={config.seq_len}: needs more text or a smaller seq_len"
            )

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the whole text, including those behind the last full block."""
        return int(self._starts[-1])

    def __len__(self) -> int:
        return self.num_tokens // self._seq_len

    def __getitem__(self, index: Any) -> Any:
        assert 0 <= index < len(self)
        start, stop = index * self._seq_len, (index + 1) * self._seq_len
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts = []
        while start < stop:
            begin = int(self._starts[first])
            part = self._chunks[first][start - begin : stop - begin]
            parts.append(part)
            start, first = start + len(part), first + 1
        ids = torch.from_numpy(np.concatenate(parts).astype(np.int64))
        if self._documents is None:
            return ids, ids.clone()
        labels, starts = ids.clone(), self._starts_in(stop - self._seq_len, stop)
        labels[starts] = IGNORE
        return ids, labels, positions(starts, self._seq_len)

    def _starts_in(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the places where documents begin in a stretch of tokens, counted from its beginning, which is one."""
        assert self._documents is not None
        first, last = np.searchsorted(self._documents, (start, stop))
        return np.union1d(0, self._documents[first:last] - start)

    @property
    def provenances(self) -> list[Provenance]:
        """Origin of the text."""
        return [self.provenance]

    def contents(self, start: int, stop: int) -> Iterator[Any]:
        """Yield lengths and tokens of the sequences start <= i < stop, as int32 arrays; if documents are separate also
        1 for each token that begins one, else 0."""
        yield np.full(stop - start, self._seq_len, dtype=np.int32)
        start, stop = start * self._seq_len, stop * self._seq_len
        for begin, chunk in zip(self._starts, self._chunks, strict=False):
            part = chunk[max(0, start - begin) : max(0, stop - begin)]
            if len(part):
                yield part
        if self._documents is not None:
            first, last = np.searchsorted(self._documents, (start, stop))
            begins = np.zeros(stop - start, dtype=np.int32)
            begins[self._documents[first:last] - start] = 1
            yield begins


def positions(starts: NDArray[np.int64], length: int) -> Tensor:
    """Return the position of each token in its own document, int64 [length].

    Args:
        starts: Where documents begin, the first one at 0.
        length: Number of tokens of all documents.
    """
    lengths = np.diff(starts, append=length)
    return torch.from_numpy(np.arange(length, dtype=np.int64) - np.repeat(starts, lengths))


class Conversations(TokenSequences):
    """Conversations as sequences, one for each record that has an answer."""

    def __init__(self, encoded: Any, provenance: Provenance) -> None:
        config, self.provenance = provenance.config, provenance
        why = np.asarray(encoded.with_format("numpy")["skipped"][:])
        counts = {reason: int((why == number).sum()) for number, reason in enumerate(REASONS, start=1)}
        summary = "; ".join(f"{count} {reason}" for reason, count in counts.items() if count)
        kept = np.flatnonzero(why == 0)
        if len(kept) == 0:
            raise ValueError(
                f"{config.label}: none of {len(why)} records has an answer within data.seq_len={config.seq_len} tokens "
                f"({summary}): raise seq_len, or check the fields and data.kind"
            )
        if len(kept) < len(why):
            log.warning("%s: %d of %d records are left out: %s", config.label, len(why) - len(kept), len(why), summary)
        lost = int(np.asarray(encoded.with_format("numpy")["lost_turns"][:]).sum())
        if lost:
            log.warning(
                "%s: %d turns of the assistant are not learned: the chat template rewrites them, so that they cannot "
                "be found; mark them in the template with {%% generation %%}",
                config.label,
                lost,
            )
        encoded = encoded.select_columns(["input_ids", "labels"])
        self._encoded = (encoded if len(kept) == len(why) else encoded.select(kept)).with_format("numpy")

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all conversations."""
        return int(self.lengths().sum(dtype=np.int64))

    @property
    def provenances(self) -> list[Provenance]:
        """Origin of the conversations."""
        return [self.provenance]

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, index: Any) -> Any:
        assert 0 <= index < len(self)
        row = self._encoded[index]
        return torch.from_numpy(row["input_ids"].astype(np.int64)), torch.from_numpy(row["labels"].astype(np.int64))

    def contents(self, start: int, stop: int) -> Iterator[Any]:
        """Yield lengths, tokens and labels of the sequences start <= i < stop, as int32 arrays, for a digest."""
        rows = self._encoded.with_format("arrow")[start:stop]
        yield rows["input_ids"].combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
        for name in ("input_ids", "labels"):
            yield rows[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
