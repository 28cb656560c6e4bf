"""Tiny random models of every family in docs/models.md, as folders with a tokenizer."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.models import SIZES
from tests.texts import VOCAB, fast_tokenizer

_SIZES: dict[str, Any] = {"vocab_size": VOCAB} | SIZES
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "topk_group": 1,
    "n_group": 1,
}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # each rank would draw its own
_GEMMA = {"head_dim": 8, "tie_word_embeddings": True}

# Name of the family to model_type and what its configuration has beside the sizes
LINEAR: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama", {"num_key_value_heads": 4}),
    "llama3": (
        "llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "deepseek_dense": (
        "llama",
        {"attention_bias": True, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5}},
    ),
    "gemma": ("gemma", _GEMMA),
    "gemma2": ("gemma2", _GEMMA | {"sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", _GEMMA | {"sliding_window": 8, "query_pre_attn_scalar": 8, "sliding_window_pattern": 2}),
}
CONV1D: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 64} | _NO_DROPOUT),
}
EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", _EXPERTS | {"shared_expert_intermediate_size": 16, "decoder_sparse_step": 1}),
    "qwen3_moe": ("qwen3_moe", _EXPERTS | {"head_dim": 8, "decoder_sparse_step": 1}),
    "deepseek_v2": ("deepseek_v2", _MLA | {"topk_method": "greedy"}),
    "deepseek_v3": ("deepseek_v3", _MLA),
}
FAMILIES = LINEAR | CONV1D | EXPERTS

# Read, pruned and exported in tests; not trained on every layout
READ_ONLY: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neox": ("gpt_neox", {"num_key_value_heads": None, "rotary_pct": 0.5, "rotary_emb_base": 50000.0}),
    "granitemoe": ("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": ("phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "phi3": (
        "phi3",
        {
            "pad_token_id": 0,
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e5,
                "short_factor": [1.0, 1.5, 2.0, 3.0],
                "long_factor": [1.5, 1.5, 2.0, 3.0],
            },
        },
    ),
}


def family_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A random model, the same for the same seed."""
    kind, over = (FAMILIES | READ_ONLY)[family]
    sizes = {} if kind == "gpt2" else _SIZES
    config = AutoConfig.for_model(kind, **{"vocab_size": VOCAB, "initializer_range": 0.1} | sizes | over)
    config.bos_token_id = config.eos_token_id = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():  # several families start with all zeros or all ones where trained models do not
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1 or "gate.weight" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def family_folder(folder: Path, family: str) -> Path:
    """The random model with a byte-level BPE, saved by transformers."""
    family_model(family).save_pretrained(folder)
    fast_tokenizer(folder)
    return folder
