"""The policy of a perplexity: its data and its settings. Perplexities are comparable only if their policies agree."""

import dataclasses
import hashlib
from dataclasses import dataclass

from seft_dist.config import EvaluateConfig
from seft_dist.data.sequences import Conversations, PackedBlocks
from seft_dist.data.tokenizer import tokenizer_fingerprint
from seft_dist.io.library_types import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Everything except the model's weights that a perplexity depends on; ``policy`` of a model in eval.json."""

    data: str
    """``data.path`` as it was given. Only this entry may differ between comparable perplexities."""
    name: str | None
    """Configuration of a hub data set."""
    split: str
    """Split of a hub data set; "train" for local files."""
    kind: str
    """Kind of the records: "text", "instruction" or "chat"."""
    holdout: str
    """Records that were used: "all", "1 in 10" (held out), "all but 1 in 10", or the same with "a share of 0.02 by
    hash"."""
    records: int
    """Number of records."""
    text: str
    """Fingerprint of the records, independent of the tokenizer."""
    join: str
    """Way in which records became one stream, ``data.join``."""
    bos: str
    """Description of where bos tokens are."""
    date: str | None
    """Day that the chat template was given as today; None: the template does not use the date."""
    tokenizer: str
    """Fingerprint of the vocabulary and special tokens."""
    tokens: int
    """Number of tokens in all sequences."""
    tokens_hash: str
    """Hash of these tokens and of the mask of answers."""
    seq_len: int
    """Number of tokens in a window (a block, or the longest conversation)."""
    stride: int | None
    """Number of tokens between the beginnings of two windows; None: windows do not overlap."""
    max_tokens: int | None
    """Limit on the number of tokens; None: all."""
    dtype: str
    """Dtype of the weights, e.g. "float32"."""


def policy_of(
    sequences: PackedBlocks | Conversations, tokenizer: PreTrainedTokenizerBase, config: EvaluateConfig, dtype: str
) -> Policy:
    """Record the policy of a perplexity.

    Args:
        sequences: The data, from ``load_source``.
        tokenizer: Tokenizer of the data.
        config: The evaluation; it has data.
        dtype: Dtype of the model's weights.
    """
    data, provenance = config.data, sequences.provenance
    assert data is not None
    digest = hashlib.sha256()
    for start in range(0, len(sequences), 1 << 14):
        for values in sequences.contents(start, min(start + (1 << 14), len(sequences))):
            digest.update(values.data)
    held = f"1 in {data.holdout_every}" if data.holdout_every else f"a share of {data.holdout_share:g} by hash"
    if not (data.holdout_every or data.holdout_share):
        held = "all"
    elif not data.holdout:
        held = f"all but {held}"
    return Policy(
        data=data.label,
        name=data.name,
        split=data.split,
        kind=provenance.kind,
        holdout=held,
        records=len(provenance.records),
        text=provenance.fingerprint(),
        join=data.join if provenance.kind == "text" else "documents",
        bos=provenance.bos,
        date=provenance.date,
        tokenizer=tokenizer_fingerprint(tokenizer),
        tokens=sequences.num_tokens,
        tokens_hash=digest.hexdigest()[:16],
        seq_len=data.seq_len,
        stride=config.stride,
        max_tokens=config.max_tokens,
        dtype=dtype,
    )


def describe_policy(policy: Policy) -> str:
    """Describe in one line what a perplexity was measured on, and how."""
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
