"""What a perplexity was measured on, and how: numbers may be compared, or averaged, only if this is the same."""

import dataclasses
import hashlib
from dataclasses import dataclass

from seft_dist.config import EvaluateConfig
from seft_dist.data.sequences import Conversations, PackedBlocks
from seft_dist.data.tokenizer import tokenizer_fingerprint
from seft_dist.io.library_types import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Policy:
    """All that decides about a perplexity beside the model's weights; ``policy`` of a model in eval.json."""

    data: str
    """``data.path`` as it was given; the only entry that may differ between numbers that are compared."""
    name: str | None
    """Configuration of a hub data set."""
    split: str
    """Its split; "train" for local files."""
    kind: str
    """How records were read: "text", "instruction" or "chat"."""
    holdout: str
    """Which records: "all", "1 in 10" (held out) or "all but 1 in 10"."""
    records: int
    """Number of records."""
    text: str
    """Fingerprint of the records, before any tokenizer."""
    join: str
    """How records became one stream, ``data.join``."""
    bos: str
    """Where bos tokens stand."""
    date: str | None
    """Day that the chat template was shown as today; None: it does not look at it."""
    tokenizer: str
    """Fingerprint of the vocabulary and special tokens."""
    tokens: int
    """Tokens of all sequences."""
    tokens_hash: str
    """Hash of these tokens, and of which of them are answers."""
    seq_len: int
    """Tokens of a window (block, or longest conversation)."""
    stride: int | None
    """Tokens between two windows; None: side by side."""
    max_tokens: int | None
    """Limit on the tokens measured; None: all."""
    dtype: str
    """Type of the weights, e.g. "float32"."""


def policy_of(
    sequences: PackedBlocks | Conversations, tokenizer: PreTrainedTokenizerBase, config: EvaluateConfig, dtype: str
) -> Policy:
    """Write down how a perplexity is measured.

    Args:
        sequences: From ``load_sequences``.
        tokenizer: That made them.
        config: The evaluation; it has data.
        dtype: Type of the model's weights.
    """
    data, origin = config.data, sequences.origin
    assert data is not None
    digest = hashlib.sha256()
    for start in range(0, len(sequences), 1 << 14):
        for values in sequences.contents(start, min(start + (1 << 14), len(sequences))):
            digest.update(values.data)
    held = f"1 in {data.holdout_every}"
    return Policy(
        data=data.path,
        name=data.name,
        split=data.split,
        kind=origin.kind,
        holdout="all" if not data.holdout_every else held if data.holdout else f"all but {held}",
        records=len(origin.records),
        text=origin.fingerprint(),
        join=data.join if origin.kind == "text" else "documents",
        bos=origin.bos,
        date=origin.date,
        tokenizer=tokenizer_fingerprint(tokenizer),
        tokens=sequences.num_tokens,
        tokens_hash=digest.hexdigest()[:16],
        seq_len=data.seq_len,
        stride=config.stride,
        max_tokens=config.max_tokens,
        dtype=dtype,
    )


def describe(policy: Policy) -> str:
    """Say in one line what was measured."""
    shown = dataclasses.asdict(policy)
    windows = "side by side" if policy.stride is None else f"every {policy.stride} tokens"
    how = {
        "documents": "each a document with an eos behind it",
        "concatenate": "joined to one text",
        "newline": "joined by newlines",
        "blank_line": "joined by blank lines",
    }[policy.join]
    if policy.kind != "text":
        return "{kind}: {records} records ({holdout}), {tokens} tokens, bos {bos}, up to {seq_len} tokens each".format(
            **shown
        )
    return (
        f"text {policy.text[:8]}: {policy.records} records ({policy.holdout}), {how}; bos: {policy.bos}; "
        f"{policy.tokens} tokens in windows of {policy.seq_len}, {windows}"
    )
