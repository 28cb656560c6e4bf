"""Random Llamas of known shapes for the parts of benchmarks/gpu.py, dense or packed, created on the device."""

from typing import Any

import torch
from torch import nn

LLAMAS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "tinier": {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 1}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "34B": {
        "hidden_size": 8192,
        "intermediate_size": 22016,
        "num_hidden_layers": 48,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
"""Shapes of TinyLlama, Llama-2-7B, -13B, Code-Llama-34B and Llama-2-70B; values are always random."""
SPARSITY = 0.6


def content_of(name: str) -> dict[str, Any]:
    """Content of the config.json of a model of this shape."""
    shape = {"num_key_value_heads": LLAMAS[name]["num_attention_heads"]} | LLAMAS[name]
    common = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5}
    return common | {"tie_word_embeddings": False} | shape


def empty_llama(name: str) -> Any:
    """Build a model on the meta device, in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    content = content_of(name)
    content.pop("model_type")
    config = LlamaConfig(**content, attn_implementation="sdpa")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.config.use_cache = False
    return model.train()


@torch.no_grad()
def fill_dense_rest(model: Any, device: torch.device) -> None:
    """Give parameters that are on the meta device random values, and the rotary embedding its frequencies.

    The placeholders of packed weights stay on the meta device.
    """
    from seft_dist.backends.packed import packed_of

    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type != "meta" or packed_of(parameter) is not None:
                continue
            value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            value.normal_(std=0.02) if parameter.dim() > 1 else value.fill_(1.0)
            setattr(module, key, nn.Parameter(value, requires_grad=parameter.requires_grad))
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(model.config).to(device)


@torch.no_grad()
def prune_(weight: torch.Tensor) -> torch.Tensor:
    """Set randomly chosen weights to 0, in place, a piece at a time."""
    for piece in weight.view(-1).split(1 << 26):
        piece.masked_fill_(torch.rand(piece.shape, device=piece.device) < SPARSITY, 0)
    return weight


def random_llama(name: str, device: torch.device) -> Any:
    """Build a dense random model in which 60 % of the target weights are 0."""
    from seft_dist.modules.targets import find_targets

    model = empty_llama(name)
    fill_dense_rest(model, device)
    for target in find_targets(model).values():
        prune_(target.weight.detach())
    return model


def packed_llama(name: str, device: torch.device) -> Any:
    """Build such a model with packed targets, one weight after the other, so that no dense copy of the model exists."""
    from seft_dist import pack_weights
    from seft_dist.backends.packed import packed_of
    from seft_dist.modules.targets import find_targets

    model = empty_llama(name)
    shards = pack_weights(model, device=device)
    fill_dense_rest(model, device)
    for target in find_targets(model).values():
        packed = packed_of(target.weight)
        assert packed is not None
        own = torch.empty(len(packed.interval), dtype=packed.dtype, device=device).normal_(std=0.02)
        packed.put(prune_(own))
    shards.sync_mask_counts()
    return model


def checkpointed(model: Any) -> Any:
    """Compute each decoder layer again in backward."""
    # The method was renamed in transformers 5.2x; GPU machines may have either version
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    return model


def random_tokens(model: Any, sequences: int, tokens: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Draw random tokens; no method's time depends on the text."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (sequences, tokens), generator=generator).to(device)
    return {"input_ids": ids, "labels": ids}
