"""Methods that benchmarks/step.py compares: a training step of each on the same model, as a function without arguments.

All methods train every decoder linear, clip to a global norm of 1 and update with AdamW (the floor updates nothing).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from seft_dist import SeftConfig, SeftOptimizer
from seft_dist.modules.targets import find_targets

Step = Callable[[], str]
"""Function that does one training step and returns its kind: "step", "window" or "evolution"."""
_LR = 1e-4
EVERY = 8
"""Number of steps from one evolution to the next, in runs with evolutions."""


def load(model: str) -> Any:
    """Load a pruned model in fp32.

    Args:
        model: A folder, or "llama2048": 2 layers of hidden size 2048 with random weights, 60 % of each row zero.
    """
    if model != "llama2048":
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    else:
        torch.manual_seed(0)
        shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 2, "num_attention_heads": 32}
        loaded = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=32, vocab_size=32000))
        for target in find_targets(loaded).values():
            weight = target.weight.detach()
            weight[weight.abs() < weight.abs().kthvalue(int(0.6 * weight.shape[1]), dim=1, keepdim=True).values] = 0
    loaded.config.use_cache = False
    return loaded.train()


def draw_batch(model: Any, sequences: int, tokens: int) -> dict[str, Tensor]:
    """Draw random tokens; no method's time depends on the text."""
    ids = torch.randint(0, model.config.vocab_size, (sequences, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def floor(model: Any, data: dict[str, Tensor], density: float) -> Step:
    """Forward pass and input gradient of every layer; nothing is trained."""
    model.requires_grad_(False)

    def step() -> str:
        embedded = model.get_input_embeddings()(data["input_ids"]).requires_grad_()
        model(inputs_embeds=embedded, labels=data["labels"]).loss.backward()
        return "step"

    return step


def seft(model: Any, data: dict[str, Tensor], density: float, evolves: bool = False) -> Step:
    """SEFT between evolutions or, with ``evolves``, with windows of 3 steps and an evolution every ``EVERY`` steps."""
    every = {"interval": EVERY, "window": 3} if evolves else {"interval": 10**6}
    config = SeftConfig(density=density, **every)  # type: ignore[arg-type]
    optimizer = SeftOptimizer(model, config, lr=_LR, max_grad_norm=1.0)

    def step() -> str:
        number = optimizer.num_steps + 1
        kind = "window" if evolves and -(-number // EVERY) * EVERY - number < 3 else "step"
        model(**data).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        report = optimizer.evolution
        return kind if report is None else "first" if report.first else f"evolution {report.seconds}"

    return step


def _adamw(model: Any, data: dict[str, Tensor]) -> Step:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=_LR, weight_decay=0.0)

    def step() -> str:
        model(**data).loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return "step"

    return step


def full(model: Any, data: dict[str, Tensor], density: float) -> Step:
    """Full fine-tuning of the decoder linears."""
    model.requires_grad_(False)
    for target in find_targets(model).values():
        target.weight.requires_grad_(True)
    return _adamw(model, data)


def lora(model: Any, data: dict[str, Tensor], density: float) -> Step:
    """PEFT's LoRA, r = 16, on all linears."""
    from peft import LoraConfig, get_peft_model

    return _adamw(get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")), data)


def shira(model: Any, data: dict[str, Tensor], density: float) -> Step:
    """PEFT's SHiRA with as many values as LoRA of r = 16: a fixed random sparse delta."""
    from peft import ShiraConfig, get_peft_model

    return _adamw(get_peft_model(model, ShiraConfig(r=16, random_seed=0, target_modules="all-linear")), data)


class _Scattered(nn.Module):
    """y = x (W + scatter(delta))^T: the weight is copied in every forward, its gradient is dense."""

    def __init__(self, inner: nn.Linear, density: float) -> None:
        super().__init__()
        self.inner = inner
        count = int(density * inner.weight.numel())
        self.register_buffer("index", torch.randperm(inner.weight.numel())[:count].sort().values)
        self.delta = nn.Parameter(torch.zeros(count))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.inner.weight
        added = weight.reshape(-1).index_add(0, self.index, self.delta)  # type: ignore[arg-type]
        return nn.functional.linear(x, added.view_as(weight), self.inner.bias)


class _MaskedLora(nn.Module):
    """y = x (W + mask * (B A))^T, so that the merged weight keeps its zeros."""

    def __init__(self, inner: nn.Linear, rank: int = 16) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("mask", (inner.weight != 0).to(inner.weight.dtype))
        self.a = nn.Parameter(torch.randn(rank, inner.in_features) * 0.01)
        self.b = nn.Parameter(torch.zeros(inner.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.inner.weight + self.mask * (self.b @ self.a)  # type: ignore[operator]
        return nn.functional.linear(x, weight, self.inner.bias)


def _wrapped(model: Any, wrap: Callable[[nn.Linear], nn.Module]) -> Any:
    model.requires_grad_(False)
    for name, target in find_targets(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, wrap(target.module))
    return model


def spiel(model: Any, data: dict[str, Tensor], density: float) -> Step:
    """Sparse deltas as SpIEL applies them: copied into the weight in the forward pass."""
    return _adamw(_wrapped(model, lambda linear: _Scattered(linear, density)), data)


def masked_lora(model: Any, data: dict[str, Tensor], density: float) -> Step:
    """LoRA of r = 16 under the mask, as SparsePEFT."""
    return _adamw(_wrapped(model, _MaskedLora), data)


def evolving(model: Any, data: dict[str, Tensor], density: float) -> Step:
    """SEFT with windows and evolutions."""
    return seft(model, data, density, evolves=True)


METHODS = {one.__name__: one for one in (floor, seft, evolving, lora, shira, spiel, masked_lora, full)}
"""Functions that make the step of a method from a model, a batch and a density, by the method's name."""
