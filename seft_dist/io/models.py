"""Causal language models of transformers, loaded straight into the shards that this rank stores.

The way is the same for one process, DDP, FSDP2 and ZeRO-3: build the model without values, shard it, then fill every
rank's part from the safetensors files. No rank ever holds more than its own part and one tensor's slice.
"""

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from seft_dist.backends.packed import PackedShards, packed_of
from seft_dist.backends.shards import fsdp_mesh, shard_fsdp, stored_part, whole_shape, zero3_construction
from seft_dist.config import ModelConfig
from seft_dist.io.packed import open_weights
from seft_dist.io.weights import Weights
from seft_dist.optim.linear import ANCHOR
from seft_dist.optim.packing import pack_weights

Sharding = Literal["none", "fsdp", "zero3"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
# Old checkpoints store what is computed today.
_COMPUTED = r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$"


def locate(path: str) -> Path:
    """Find the folder of a model, from the Hugging Face hub if it is not a local one. Local.

    Args:
        path: A folder, or a hub name such as "org/model".

    Returns:
        The folder (of the hub's cache).

    Raises:
        ValueError: There is no such folder, and the hub does not give the model.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ValueError(
            f"model.path={path} is not a folder: needs a Hugging Face folder, or a hub name like org/model"
        )
    from huggingface_hub import snapshot_download

    try:
        patterns = [
            "*.safetensors",
            "*.safetensors.index.json",
            "config.json",
            "generation_config.json",
            *TOKENIZER_FILES,
        ]
        return Path(snapshot_download(path, allow_patterns=patterns))
    except Exception as error:  # the hub's client has no common error type
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"model.path={path} is not a folder here, and the hub did not give it: {reason}") from error


@dataclass(frozen=True)
class Source:
    """A causal LM on disk, checked but not loaded."""

    folder: Path
    config: PreTrainedConfig
    weights: Weights
    dtype: torch.dtype
    """Type in which the weights will be held."""


def open_source(config: ModelConfig, dtype: torch.dtype | None = None) -> Source:
    """Find a model and read its headers. Local.

    Args:
        config: Which model.
        dtype: Type the weights must have (a ds_config's); None: what config.dtype says.

    Returns:
        What ``load_model`` needs.

    Raises:
        ValueError: No such model, weights that are not safetensors or are quantized, remote code, or a wrong dtype.
    """
    folder = locate(config.path)
    try:
        hf = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{folder}: no model that transformers knows ({reason}); needs a config.json of a causal LM"
        ) from error
    if getattr(hf, "quantization_config", None) is not None:
        raise ValueError(
            f"{folder} is quantized: needs plain float32 or bfloat16 weights; launch/export.py plain makes them, where "
            "transformers can"
        )
    weights = open_weights(folder)
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(config.dtype)
    if dtype is not None and named not in (None, dtype):
        raise ValueError(
            f'model.dtype={config.dtype}, but the ds_config trains in {dtype}: set "bf16": {{"enabled": true}} in the '
            "ds_config for bfloat16, remove it for float32, or leave model.dtype at auto"
        )
    chosen = dtype or named or weights.dtype
    if chosen not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{folder} is stored in {chosen}: choose --model.dtype float32 or bfloat16")
    return Source(folder, hf, weights, chosen)


def load_model(
    source: Source,
    *,
    sharding: Sharding = "none",
    device: torch.device | None = None,
    replicas: int = 1,
    offload: bool = False,
    ds_config: dict[str, Any] | None = None,
    activation_checkpointing: bool = False,
    resident: str | None = None,
) -> PreTrainedModel:
    """Build a model and fill it from its files. **Collective** if sharded.

    Args:
        source: The model on disk.
        sharding: "none", "fsdp" (FSDP2 over the default group) or "zero3" (needs ds_config).
        device: Where this rank computes; None: CPU.
        replicas: FSDP only: groups of ranks with a whole sharded copy each.
        offload: FSDP only: keep the shards in CPU memory.
        ds_config: ZeRO-3 only: the ds_config's content, batch sizes filled in.
        activation_checkpointing: Compute each decoder layer again in backward instead of keeping its activations.
        resident: Without ZeRO-3: keep the linears that this pattern names packed (``SeftConfig.targets``); None: none.

    Returns:
        The model in training mode, its key-value cache off.

    Raises:
        ValueError: The files hold too few or too many tensors or wrong shapes, or the ranks cannot be arranged so.
    """
    device = device or torch.device("cpu")
    if sharding == "zero3":
        assert ds_config is not None
        with zero3_construction(ds_config):
            model = _construct(source)
    else:
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):  # buffers (rotary frequencies) get their real values
            model = _construct(source)
    model.tie_weights()
    names = _match(model, source)
    mesh = fsdp_mesh(device, replicas) if sharding == "fsdp" else None
    shards = pack_weights(model, resident, mesh=mesh, device=device) if resident is not None else None
    if mesh is not None:
        shard_fsdp(model, decoder_layers(model), mesh, offload, shards.parameters if shards else set())
    if sharding != "zero3":
        _materialise(model, torch.device("cpu") if offload else device)
    _fill(model, names, source, shards)
    if (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    model.config.use_cache = False
    if activation_checkpointing:
        checkpoint_activations(model)
    return model.train()


def checkpoint_activations(model: PreTrainedModel, *, use_reentrant: bool = False) -> None:
    """Compute each decoder layer again in backward instead of keeping its activations.

    Args:
        model: In training mode, or it has no effect.
        use_reentrant: The older of torch's two ways; it needs inputs that require gradients.
    """
    # Releases of transformers before 5.23 have the second name only, which newer ones deprecate.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


def outline(source: Source) -> tuple[PreTrainedModel, dict[str, str]]:
    """Build a model whose parameters have shapes but no values; buffers are real. Local.

    Args:
        source: The model on disk.

    Returns:
        The model in evaluation mode, and for each name of ``named_state`` the name of its tensor in the files.

    Raises:
        ValueError: The files hold too few or too many tensors or wrong shapes.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = _construct(source)
    model.tie_weights()
    model.config.use_cache = False
    return model.eval(), _match(model, source)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The repeated blocks of a model, as transformers names them. Local.

    Raises:
        ValueError: The model does not say which modules they are.
    """
    kinds = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    if not layers:
        raise ValueError(f"{type(model).__name__} names no decoder layers: FSDP cannot shard it; use DeepSpeed ZeRO-3")
    return layers


def _construct(source: Source) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(copy.deepcopy(source.config), dtype=source.dtype, trust_remote_code=False)


def named_state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer of a model by its first name, in order; tied ones once. Local.

    ``state_dict()`` would name tied ones twice. The anchors of ``SeftOptimizer`` are not part of the model.
    """
    state: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if not name.endswith(ANCHOR)}
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                state[f"{prefix}.{name}" if prefix else name] = buffer
    return state


def _aliases(model: nn.Module) -> dict[str, str]:
    """Each name of a tied parameter to its first name."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if first[id(parameter)] != name}


def _match(model: PreTrainedModel, source: Source) -> dict[str, str]:
    """Find the tensor in the files for each name of the model's state.

    Returns:
        Name in the model to name in the files.
    """
    weights = source.weights
    found = weights.tensors
    aliases = _aliases(model)
    state = named_state(model)
    names: dict[str, str] = {name: stored for name in state if (stored := weights.find(name)) is not None}
    for alias, name in aliases.items():
        if alias in found:
            names.setdefault(name, alias)
    ignored = "|".join([_COMPUTED, *(model._keys_to_ignore_on_load_unexpected or ())])
    known = {*state, *aliases, *names.values()}
    known.update(piece for stored in names.values() for piece in weights.info(stored).pieces)
    extra = sorted(name for name in found if name not in known and not re.search(ignored, name))
    missing = sorted(state.keys() - names.keys())
    kind = type(model).__name__
    if missing or extra:
        raise ValueError(
            f"{source.folder} does not fit {kind}: {_some(missing)} missing, {_some(extra)} not expected. It may be "
            "of another model, partly written, or an adapter; save it again with transformers' save_pretrained"
        )
    for name, stored in names.items():
        shape = whole_shape(state[name])
        held = weights.info(stored).shape
        if shape != held:
            raise ValueError(f"{source.folder}: {stored} has shape {held}, {kind} needs {shape}; check config.json")
    return names


def _some(names: list[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _materialise(model: PreTrainedModel, device: torch.device) -> None:
    """Give the parameters memory; keep the buffers, which have values already."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    outlines = [
        (module, key, parameter)
        for module in model.modules()
        for key, parameter in module.named_parameters(recurse=False)
        if packed_of(parameter) is not None
    ]
    for module, key, _ in outlines:  # they stay without memory
        module.register_parameter(key, None)
    model.to_empty(device=device)
    for module, key, parameter in outlines:
        module.register_parameter(key, parameter)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        buffer.copy_(buffers[name])
    model.tie_weights()  # to_empty gave each name of a tied parameter memory of its own


@torch.no_grad()
def _fill(model: PreTrainedModel, names: dict[str, str], source: Source, shards: PackedShards | None) -> None:
    state = named_state(model)
    for name, stored in names.items():
        packed = packed_of(state[name])
        if packed is not None:
            packed.put(source.weights.read(stored, packed.interval.start, packed.interval.stop))
            continue
        part, start = stored_part(state[name])
        part.copy_(source.weights.read(stored, start, start + part.numel()))
    source.weights.release()
    if shards is not None:
        shards.settle()
