"""Loading of a model's tokenizer, and handling of the special tokens that it adds by itself."""

import hashlib
import json

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from seft_dist.config import ModelConfig
from seft_dist.data.records import cause_of
from seft_dist.io.source import locate


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, a fast one or a slow sentencepiece one.

    Args:
        config: The model; it may name another folder for the tokenizer.

    Raises:
        ValueError: The folder has no tokenizer, or one that needs code of its own.
    """
    folder = locate(config.tokenizer, "model.tokenizer") if config.tokenizer else locate(config.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # Which of these transformers raises depends on what is wrong with the files
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder} holds no tokenizer that transformers can read ({cause_of(error)}): needs tokenizer.json or "
            "tokenizer.model beside tokenizer_config.json, or --model.tokenizer with a folder that has them"
        ) from error
    special = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    if set(tokenizer.get_vocab()) <= special:  # what transformers 5 makes for some families if there are no files
        raise ValueError(
            f"{folder} holds no vocabulary: transformers makes a tokenizer of {len(special)} special tokens of it. "
            "Needs tokenizer.json or tokenizer.model, or --model.tokenizer with a folder that has one"
        )
    return tokenizer


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Choose the token that pads short sequences.

    Padding is masked out, so any token that the model has an embedding for will do. The eos token is preferred because
    a pad token was often added behind the vocabulary, where the model has no embedding.

    Raises:
        ValueError: The tokenizer has neither an eos, a pad nor an unk token.
    """
    for token in (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id):
        if token is not None:
            return int(token)
    raise ValueError("the tokenizer has no eos, pad or unk token: set eos_token in its tokenizer_config.json")


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer puts its bos token in front of ordinary text."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a", verbose=False)["input_ids"][:1]) == [bos]


def strip_extra_bos(ids: list[int], bos: int | None) -> list[int]:
    """Remove all but one of the bos tokens at the beginning of a sequence.

    Text that already begins with the bos token gets a second one from the tokenizer.
    """
    extra = 0
    while bos is not None and extra + 1 < len(ids) and ids[extra] == ids[extra + 1] == bos:
        extra += 1
    return ids[extra:]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash a tokenizer's vocabulary and special tokens, independently of the files that it was loaded from.

    Returns:
        16 hexadecimal digits.
    """
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    content = [sorted(tokenizer.get_vocab().items()), sorted(special.items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
