"""Real files for runs in tests: a tiny pruned model with a tokenizer, and text it can learn."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.models import VOCAB, prune_, tiny_llama

NUM_WORDS = VOCAB - 2


def model_folder(folder: Path, dtype: torch.dtype = torch.float32, sparsity: float = 0.6, **over: Any) -> Path:
    """Save a tiny Llama, pruned unless sparsity is 0, with a tokenizer of whole words."""
    model = tiny_llama(dtype=dtype, **over)
    if sparsity:
        prune_(model, sparsity)
    model.config.use_cache = True  # as every published model has it
    model.save_pretrained(folder)
    vocabulary = {"<unk>": 0, "</s>": 1} | {f"w{i}": i + 2 for i in range(NUM_WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    return folder


def text_file(path: Path, records: int = 60, words: int = 40) -> Path:
    """Save documents of words that follow each other in steps of 1 to 3."""
    lines = []
    for i in range(records):
        document = " ".join(f"w{(7 * i + (1 + i % 3) * j) % NUM_WORDS}" for j in range(words))
        lines.append(json.dumps({"text": document}))
    path.write_text("\n".join(lines) + "\n")
    return path
