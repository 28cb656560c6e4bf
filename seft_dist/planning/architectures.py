"""Published architectures by name, and the shapes of a model's parameters from its configuration.

The numbers are those of the models' own config.json. transformers builds the modules on the meta device, without
values.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from seft_dist.files.reading import read_json
from seft_dist.io.models import decoder_layers
from seft_dist.io.settings import ModelSettings, check_usual_sizes, error_summary
from seft_dist.modules.targets import find_targets
from seft_dist.modules.vectors import find_vectors
from seft_dist.sparsity.partition import position_dtype
from seft_dist.sparsity.schedule import fraction_of

_LLAMA2: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_LLAMA3 = _LLAMA2 | {"vocab_size": 128256, "max_position_embeddings": 8192, "num_key_value_heads": 8}
_WIDE = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
_MEDIUM = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama-2-7B": _LLAMA2 | _MEDIUM | {"intermediate_size": 11008, "num_key_value_heads": 32},
    "Llama-2-13B": _LLAMA2
    | {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
    "Llama-2-70B": _LLAMA2 | _WIDE | {"num_key_value_heads": 8},
    "Llama-3-8B": _LLAMA3 | _MEDIUM,
    "Llama-3-70B": _LLAMA3 | _WIDE,
    "Mistral-7B": _LLAMA2
    | _MEDIUM
    | {
        "model_type": "mistral",
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    },
    "Qwen2.5-72B": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "DeepSeek-V3": {
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "routed_scaling_factor": 2.5,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "qk_nope_head_dim": 128,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
}
"""Published configuration of each model, by name."""


def find_architecture(model: str) -> PreTrainedConfig:
    """Find the configuration of a model.

    Args:
        model: Name of a published architecture, folder of a model, or path of a config.json.

    Raises:
        ValueError: There is no such model, or transformers does not know its type.
    """
    known = {name.lower(): entry for name, entry in ARCHITECTURES.items()}
    path = Path(model).expanduser()
    if model.lower() in known:
        entry = dict(known[model.lower()])
    elif path.is_file() or (path / "config.json").is_file():
        file = path if path.is_file() else path / "config.json"
        try:
            entry = dict(read_json(file, ModelSettings))
        except (OSError, ValueError) as error:
            raise ValueError(f"{error}; needs a model's config.json") from error
        check_usual_sizes(entry, file)
    else:
        raise ValueError(
            f"model={model} is neither a folder with a config.json, nor such a file, nor one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    kind = entry.pop("model_type")
    try:
        return AutoConfig.for_model(kind, **entry)
    except Exception as error:  # the constructors of configurations raise errors of any type
        raise ValueError(
            f"model={model}: transformers knows no model_type {kind!r}, or not with such entries "
            f"({error_summary(error)})"
        ) from error


@dataclass(frozen=True)
class ParameterShape:
    """The shape of one parameter of a model; tied parameters appear once."""

    name: str
    shape: tuple[int, ...]
    target: tuple[int, int] | None
    """Shape as a matrix [rows, columns] if the parameter carries deltas; None otherwise."""
    layer: int | None
    """Index of the decoder layer that the parameter belongs to; None if it is outside of them."""

    @property
    def numel(self) -> int:
        """Number of entries."""
        return prod(self.shape)

    def row_shard_numel(self, world_size: int) -> int:
        """Entries of the fullest rank with FSDP2, which gives each rank ceil(rows / ranks) slices of dimension 0."""
        return -(-self.shape[0] // world_size) * prod(self.shape[1:])

    def flat_shard_numel(self, world_size: int) -> int:
        """Entries of the fullest rank if the flattened parameter is split evenly."""
        return -(-self.numel // world_size)


@dataclass(frozen=True)
class ModelShapes:
    """The shapes of all parameters of a model."""

    config: PreTrainedConfig
    weights: list[ParameterShape]
    kinds: list[tuple[Any, ...]]
    """For each decoder layer a key that is equal for layers with the same parameters."""
    buffers: int
    """Bytes of all buffers, the same on every rank."""
    vector_numel: int
    """Number of entries in all norms and biases that ``train_norms`` trains."""

    @classmethod
    def of(cls, config: PreTrainedConfig, targets: str) -> "ModelShapes":
        """Build the model on the meta device and read its shapes.

        Args:
            config: Configuration of the model.
            targets: Pattern of the targets, see ``SeftConfig.targets``.

        Raises:
            ValueError: No model can be built from the configuration, or the targets cannot carry deltas.
        """
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except Exception as error:  # the constructors of models raise errors of any type
            raise ValueError(
                f"transformers cannot build a {config.model_type} with such a config.json ({error_summary(error)})"
            ) from error
        matrices = {t.weight_name(name): t.matrix_shape for name, t in find_targets(model, targets).items()}
        layers = decoder_layers(model)
        owner = {id(parameter): i for i, layer in enumerate(layers) for parameter in layer.parameters()}
        weights = [
            ParameterShape(name, tuple(p.shape), matrices.get(name), owner.get(id(p)))
            for name, p in model.named_parameters()
        ]
        kinds = [tuple((name, tuple(p.shape)) for name, p in layer.named_parameters()) for layer in layers]
        buffers = sum(b.numel() * b.element_size() for b in model.buffers())
        vectors = sum(vector.parameter.numel() for vector in find_vectors(model).values())
        return cls(config, weights, kinds, buffers, vectors)

    @cached_property
    def targets(self) -> list[ParameterShape]:
        """Parameters that carry deltas."""
        return [weight for weight in self.weights if weight.target]

    @cached_property
    def numel(self) -> int:
        """Number of entries in all parameters."""
        return sum(weight.numel for weight in self.weights)

    @cached_property
    def window_sums(self) -> int:
        """Number of row and column sums that windows keep of all targets; each fused expert has columns of its own."""
        return sum(
            weight.target[0] + weight.target[1] * (weight.shape[0] if len(weight.shape) == 3 else 1)
            for weight in self.targets
            if weight.target
        )

    @cached_property
    def target_numel(self) -> int:
        """Number of entries in all targets."""
        return sum(weight.numel for weight in self.targets)

    @cached_property
    def position_bytes(self) -> int:
        """Bytes of the position of a delta: 4, or 8 if a target has 2^31 weights or more."""
        return position_dtype(max((weight.numel for weight in self.targets), default=0)).itemsize

    def unit_numels(self) -> list[int]:
        """Number of entries in the parameters of each decoder layer."""
        sums = [0] * len(self.kinds)
        for weight in self.weights:
            if weight.layer is not None:
                sums[weight.layer] += weight.numel
        return sums

    def budget(self, density: float) -> int:
        """Number of deltas in the whole model."""
        return sum(fraction_of(density, weight.numel) for weight in self.targets)
