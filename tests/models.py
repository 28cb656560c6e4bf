"""Small real models for the tests: random Llamas, pruned row by row."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from seft_dist.config import SeftConfig
from seft_dist.modules.targets import find_targets

VOCAB = 128
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
"""Sizes of every tiny model, under their names in transformers' configurations."""


def moving(**options: Any) -> SeftConfig:
    """A configuration whose mask moves, as in the paper, unless ``options`` say otherwise: the harder case."""
    return SeftConfig(**({"reactivation": 1.0} | options))


class Parent:
    """The weights of a model before it is pruned, as ``SeftOptimizer`` reads them."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.weights = {name: target.weight.detach().clone() for name, target in find_targets(model).items()}

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        assert all(tuple(self.weights[name].shape) == shape for name, shape in shapes.items())

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.weights[name].view(-1)[start:stop]


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **over: Any) -> LlamaForCausalLM:
    """A random two-layer Llama, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**({"vocab_size": VOCAB} | SIZES | over)))
    model.config.use_cache = False
    return model.to(dtype)


@torch.no_grad()
def prune_(model: torch.nn.Module, sparsity: float = 0.6, pattern: str = "all-linear") -> torch.nn.Module:
    """Set the smallest weights of each row of each target to 0, in place."""
    for module in find_targets(model, pattern).values():
        count = int(sparsity * module.weight.shape[1] + 0.5)
        order = module.weight.abs().argsort(dim=1, stable=True)[:, :count]
        module.weight.scatter_(1, order, 0.0)
    return model


@torch.no_grad()
def prune_groups_(model: torch.nn.Module, pattern: str, targets: str = "all-linear") -> torch.nn.Module:
    """Keep the N largest of each M consecutive weights of a row of each target, in place; pattern is "N:M"."""
    most, size = map(int, pattern.split(":"))
    for module in find_targets(model, targets).values():
        grouped = module.weight.view(-1, size)
        grouped.scatter_(1, grouped.abs().argsort(dim=1, stable=True)[:, : size - most], 0.0)
    return model


def batch(step: int, rank: int = 0, size: int = 2, length: int = 16, vocab: int = VOCAB) -> dict[str, torch.Tensor]:
    """Learnable token sequences (arithmetic progressions), a function of step and rank."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    start = torch.randint(0, vocab, (size, 1), generator=generator)
    stride = torch.randint(1, 4, (size, 1), generator=generator)
    ids = (start + stride * torch.arange(length)) % vocab
    return {"input_ids": ids, "labels": ids}
