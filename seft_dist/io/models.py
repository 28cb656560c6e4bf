"""Causal language models of transformers, loaded straight into the shards that this rank stores.

The way is the same for one process, DDP, FSDP2 and ZeRO-3: build the model without values, shard it, then fill every
rank's part from the safetensors files. No rank ever holds more than its own part and one tensor's slice.
"""

import copy
import logging
import re
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from seft_dist.backends.packed import PackedShards, packed_of
from seft_dist.backends.shards import fsdp_mesh, shard_fsdp, stored_part, whole_shape, zero3_construction
from seft_dist.io.settings import first_line, read_generation
from seft_dist.io.source import Source as Source
from seft_dist.io.source import locate as locate
from seft_dist.io.source import open_source as open_source
from seft_dist.optim.linear import ANCHOR
from seft_dist.optim.packing import pack_weights
from seft_dist.sparsity.casts import cast_weight

log = logging.getLogger(__name__)

Sharding = Literal["none", "fsdp", "zero3"]

# Old checkpoints store what is computed today.
_COMPUTED = r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$"


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
    """Build a model and fill it from its files. Collective if sharded.

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
        model = _without_values(source)
    model.tie_weights()
    names = _match(model, source)
    mesh = fsdp_mesh(device, replicas) if sharding == "fsdp" else None
    shards = pack_weights(model, resident, mesh=mesh, device=device) if resident is not None else None
    if mesh is not None:
        shard_fsdp(model, decoder_layers(model), mesh, offload, shards.parameters if shards else set())
    if sharding != "zero3":
        _materialise(model, torch.device("cpu") if offload else device)
        for name, parameter in model.named_parameters():
            if source.computes_in_fp32(name):  # never trained, and FSDP2 wants one type of all that is
                parameter.requires_grad_(False)
    _fill(model, names, source, shards)
    generation = read_generation(source.folder)
    if generation is not None:
        model.generation_config = generation
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
    """Build a model whose parameters have shapes but no values; buffers are real.

    Args:
        source: The model on disk.

    Returns:
        The model in evaluation mode, and for each name of ``named_state`` the name of its tensor in the files.

    Raises:
        ValueError: The files hold too few or too many tensors or wrong shapes.
    """
    model = _without_values(source)
    model.tie_weights()
    model.config.use_cache = False
    return model.eval(), _match(model, source)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The repeated blocks of a model, as transformers names them.

    Raises:
        ValueError: The model does not say which modules they are.
    """
    kinds = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    if not layers:
        raise ValueError(f"{type(model).__name__} names no decoder layers: FSDP cannot shard it; use DeepSpeed ZeRO-3")
    return layers


def _construct(source: Source) -> PreTrainedModel:
    config = copy.deepcopy(source.config)
    try:
        return AutoModelForCausalLM.from_config(config, dtype=source.dtype, trust_remote_code=False)
    except Exception as error:  # models raise whatever their own arithmetic does
        raise ValueError(
            f"{source.folder}: transformers cannot build this model ({type(error).__name__}: {first_line(error)}); check "
            "config.json"
        ) from error


def _without_values(source: Source) -> PreTrainedModel:
    """The model on the meta device; buffers (rotary frequencies) have their real values."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = _construct(source)
    for path, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for key, value in tensors.items():
                if value is not None and value.dtype != torch.float32 and source.computes_in_fp32(f"{path}.{key}"):
                    tensors[key] = _as_fp32(value)
    return model


def _as_fp32(value: Tensor) -> Tensor:
    return nn.Parameter(value.float()) if isinstance(value, nn.Parameter) else value.float()


def named_state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer of a model by its first name, in order; tied ones once.

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
    state, small = named_state(model), 0
    for name, stored in names.items():
        packed = packed_of(state[name])
        if packed is None:
            part, start = stored_part(state[name])
            stop, dtype = start + part.numel(), part.dtype
        else:
            start, stop, dtype = packed.interval.start, packed.interval.stop, packed.dtype
        values, lifted = cast_weight(source.weights.read(stored, start, stop), dtype)
        small += lifted
        if packed is not None:
            packed.put(values)
        else:
            part.copy_(values)
    source.weights.release()
    if small:
        log.warning(
            "%s: %d weights are too small for %s; they are held at its smallest number, not at 0",
            source.folder,
            small,
            source.dtype,
        )
    if shards is not None:
        shards.sync_mask_counts()
