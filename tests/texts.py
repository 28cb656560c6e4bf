"""English text, tokenizers trained on it (fast, and sentencepiece), and a dense tiny model with one of them."""

import io
import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from seft_dist.config import ModelConfig
from seft_dist.data.tokenizer import load_tokenizer
from tests.models import tiny_llama

VOCAB = 400
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def texts() -> list[str]:
    """English documents, a few hundred words each."""
    return [pydoc_data.topics.topics[name][:1500] for name in sorted(pydoc_data.topics.topics)[:40]]


def fast_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A byte-level BPE, trained and saved."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts()[:10], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def chat_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """``fast_tokenizer`` as commands load it, with ``CHAT_TEMPLATE``."""
    fast_tokenizer(folder)
    tokenizer = load_tokenizer(ModelConfig(path=str(folder)))
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def sentencepiece_tokenizer(folder: Path, slow: bool = False) -> PreTrainedTokenizerBase:
    """A sentencepiece BPE with byte fallback and no tokenizer.json beside it, as Llama 2 has.

    transformers reads it for the class LlamaTokenizer by conversion to a fast one; classes such as GPTSw3Tokenizer stay
    on sentencepiece itself (slow).
    """
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(texts()[:10]).splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / ("spiece.model" if slow else "tokenizer.model")).write_bytes(model.getvalue())
    settings = {
        "tokenizer_class": "GPTSw3Tokenizer" if slow else "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return AutoTokenizer.from_pretrained(folder)


def dense_folder(folder: Path, dtype: torch.dtype = torch.float32, **over: Any) -> Path:
    """A random tiny Llama with a fast tokenizer, as a Hugging Face folder."""
    settings = {"vocab_size": VOCAB, "max_position_embeddings": 128} | over
    tiny_llama(dtype=dtype, **settings).save_pretrained(folder)
    fast_tokenizer(folder)
    return folder


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    """One record a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def text_jsonl(path: Path) -> Path:
    """``texts()``, one document a line."""
    return write_jsonl(path, [{"text": text} for text in texts()])
