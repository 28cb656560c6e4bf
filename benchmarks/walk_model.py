"""The model of random values that walk.py takes through the programs, and its tokenizer."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from seft_dist.files.writing import write_json

SEED = 0
TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
"""The shape "tiny", with which every step takes seconds, for trying the steps."""


def make_model(shape: dict[str, Any], folder: Path) -> None:
    """Write a model of random bf16 values: one file for each decoder layer and one for the rest."""
    settings = dict(shape)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings, dtype="bfloat16", use_cache=False)
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.Generator(np.random.SFC64(SEED))  # several times faster than torch's on a CPU
    parts: dict[str, list[str]] = {}
    for name in model.state_dict():
        words = name.split(".")
        parts.setdefault(f"layer-{int(words[2]):03d}" if words[1] == "layers" else "rest", []).append(name)
    where, total = {}, 0
    for part, names in parts.items():
        tensors = {}
        for name in names:
            sizes = model.get_parameter(name).shape
            values = torch.ones(sizes, dtype=torch.bfloat16)
            if len(sizes) > 1:
                values.copy_(torch.from_numpy(generator.standard_normal(sizes, dtype=np.float32)).mul_(0.02))
            tensors[name] = values
            where[name] = f"model-{part}.safetensors"
            total += values.nbytes
        save_file(tensors, folder / f"model-{part}.safetensors", metadata={"format": "pt"})
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    config.save_pretrained(folder)


def make_tokenizer(vocabulary: int, folder: Path) -> None:
    """Train a byte-level BPE on the text and save it beside the model."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocabulary, 4096),
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([topics[name] for name in sorted(topics)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
