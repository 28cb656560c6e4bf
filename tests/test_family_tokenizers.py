"""Tokenizers as they are published: byte-level BPE of Llama 3 and Qwen (tiktoken's kind), with chat templates."""

import base64
import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, PreTrainedTokenizerFast

from seft_dist.config import DataConfig, ModelConfig
from seft_dist.data.chat import encode_chat
from seft_dist.data.load import load_sequences
from seft_dist.data.tokenizer import load_tokenizer, pad_id
from tests.texts import text_jsonl, texts

# The split of cl100k, as Llama 3 and Qwen have it (digits by three or one)
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
_LLAMA3_TEMPLATE = (
    "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_CHATML_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = "It's 2024: x = 1234567;\n\tnaïve café, 你好 🙂  done"
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "well met"},
]


def bpe(special: list[str]) -> Tokenizer:
    """A byte-level BPE with tiktoken's split, trained on English."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(_SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts()[:10], trainer)
    return tokenizer


def test_llama3(tmp_path: Path) -> None:
    raw = bpe(_LLAMA3)
    raw.post_processor = processors.TemplateProcessing(
        single=f"{_LLAMA3[0]} $A", special_tokens=[(_LLAMA3[0], raw.token_to_id(_LLAMA3[0]))]
    )
    saved = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=_LLAMA3[0], eos_token="<|eot_id|>")
    saved.chat_template = _LLAMA3_TEMPLATE
    saved.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").is_file()
    tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path)))
    ids = tokenizer(TEXT).input_ids
    assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids[1:]) == TEXT
    chat = encode_chat(CHAT, tokenizer, "here")
    ids, scored = chat.ids, chat.scored
    assert ids.count(tokenizer.bos_token_id) == 1  # not one more from the tokenizer
    answer = [token for token, yes in zip(ids, scored, strict=True) if yes]
    assert tokenizer.decode(answer) == "well met<|eot_id|>"
    assert len(load_sequences(DataConfig(path=str(text_jsonl(tmp_path / "a.jsonl")), seq_len=32), tokenizer)) > 100


def test_qwen_from_vocabulary_and_merges(tmp_path: Path) -> None:
    """The files of Qwen 2: vocab.json and merges.txt, special tokens in the configuration, model_type qwen2."""
    bpe([]).model.save(str(tmp_path))
    first = len(json.loads((tmp_path / "vocab.json").read_text()))
    added = {str(first + i): {"content": token, "special": True} for i, token in enumerate(_CHATML)}
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": added,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": _CHATML_TEMPLATE,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    AutoConfig.for_model("qwen2").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path)))
    assert type(tokenizer).__name__.startswith("Qwen2Tokenizer")
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
    assert pad_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    chat = encode_chat(CHAT, tokenizer, "here")
    ids, scored = chat.ids, chat.scored
    answer = [token for token, yes in zip(ids, scored, strict=True) if yes]
    assert tokenizer.decode(answer).strip() == "well met<|im_end|>"


def test_a_bare_tiktoken_file_is_refused(tmp_path: Path) -> None:
    """Meta's own download: ranks in base64, no special tokens and no split in it."""
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
    (tmp_path / "tokenizer.model").write_text("\n".join(lines))
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no tokenizer that transformers can read"):
        load_tokenizer(ModelConfig(path=str(tmp_path)))
