"""The tokenizer of a model, and what it does of its own accord."""

import hashlib
import json

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from seft_dist.config import ModelConfig
from seft_dist.data.records import reason
from seft_dist.io.source import locate


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model: fast ones and slow sentencepiece ones.

    Raises:
        ValueError: There is none in the folder, or it would need code of its own.
    """
    folder = locate(config.tokenizer or config.path)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:  # what transformers raises depends on the files
        raise ValueError(
            f"{folder} holds no tokenizer that transformers can read ({reason(error)}): needs tokenizer.json or "
            "tokenizer.model beside tokenizer_config.json, or --model.tokenizer with a folder that has them"
        ) from error


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills up short sequences.

    Any token will do, it is masked out; eos comes first because a pad token is often one that was added behind the
    vocabulary, for which the model has no embedding.

    Raises:
        ValueError: The tokenizer has neither an eos, a pad nor an unk token.
    """
    for token in (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id):
        if token is not None:
            return int(token)
    raise ValueError("the tokenizer has no eos, pad or unk token: set eos_token in its tokenizer_config.json")


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer puts its bos token in front of ordinary text."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a", verbose=False)["input_ids"][:1]) == [bos]


def one_bos(ids: list[int], bos: int | None) -> list[int]:
    """Take out all but one bos token at the beginning: text that begins with it gets it from the tokenizer once more."""
    extra = 0
    while bos is not None and extra + 1 < len(ids) and ids[extra] == ids[extra + 1] == bos:
        extra += 1
    return ids[extra:]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash a tokenizer's vocabulary and special tokens, whatever files it came from.

    Returns:
        16 hexadecimal digits.
    """
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    content = [sorted(tokenizer.get_vocab().items()), sorted(special.items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
