"""Loading of transformers' causal language models directly into the shards that this rank stores.

The procedure is the same for one process, DDP, FSDP2 and ZeRO-3: build the model without values, shard it, then read
each rank's part from the safetensors files. No rank ever holds more than its own part and a slice of one tensor.
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
from seft_dist.io.settings import error_summary, read_generation
from seft_dist.io.source import Source as Source
from seft_dist.io.source import locate as locate
from seft_dist.io.source import open_source as open_source
from seft_dist.io.weight_files import abbreviate
from seft_dist.optim.anchors import ANCHOR
from seft_dist.optim.packing import pack_weights
from seft_dist.sparsity.casts import cast_weight

log = logging.getLogger(__name__)

Sharding = Literal["none", "fsdp", "zero3"]

# Buffers that old releases of transformers saved and newer ones compute
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
    """Build a model and load its weights from its files. Collective if sharded.

    Args:
        source: The model on disk.
        sharding: "none", "fsdp" (FSDP2 over the default group) or "zero3" (needs ds_config).
        device: Device on which this rank computes; None: the CPU.
        replicas: FSDP only: number of groups of ranks that each hold a whole sharded copy.
        offload: FSDP only: keep the shards in CPU memory.
        ds_config: ZeRO-3 only: content of the ds_config, with its batch sizes filled in.
        activation_checkpointing: Compute each decoder layer again in backward instead of keeping its activations.
        resident: Pattern of the linears that are kept packed (see ``SeftConfig.targets``), without ZeRO-3. None: no
            linear.

    Returns:
        The model in training mode, with its key-value cache off.

    Raises:
        ValueError: The files hold too few or too many tensors, or tensors of wrong shapes, or the number of ranks does
            not fit the replicas.
    """
    device = device or torch.device("cpu")
    if sharding == "zero3":
        assert ds_config is not None
        with zero3_construction(ds_config):
            model = _construct(source)
    else:
        model = _construct_on_meta(source)
    model.tie_weights()
    names = _match_names(model, source)
    mesh = fsdp_mesh(device, replicas) if sharding == "fsdp" else None
    shards = pack_weights(model, resident, mesh=mesh, device=device) if resident is not None else None
    if mesh is not None:
        shard_fsdp(model, decoder_layers(model), mesh, offload, shards.parameters if shards else set())
    if sharding != "zero3":
        _materialise(model, torch.device("cpu") if offload else device)
        for name, parameter in model.named_parameters():
            if source.computes_in_fp32(name):  # never trained; FSDP2 needs one dtype for all trained parameters
                parameter.requires_grad_(False)
    _load_values(model, names, source, shards)
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
        model: A model in training mode; in evaluation mode there is no effect.
        use_reentrant: Use the older of torch's two implementations, which needs inputs that require gradients.
    """
    # Releases of transformers before 5.23 have only the second method, which newer releases deprecate
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


def build_meta_model(source: Source) -> tuple[PreTrainedModel, dict[str, str]]:
    """Build a model whose parameters are on the meta device, with shapes but no values. Buffers have their values.

    Args:
        source: The model on disk.

    Returns:
        The model in evaluation mode, and for each name of ``named_state`` the name of its tensor in the files.

    Raises:
        ValueError: The files hold too few or too many tensors, or tensors of wrong shapes.
    """
    model = _construct_on_meta(source)
    model.tie_weights()
    model.config.use_cache = False
    return model.eval(), _match_names(model, source)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder layers of a model: the modules that transformers does not split over devices.

    Raises:
        ValueError: The model's class does not name these modules.
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
    except Exception as error:  # the constructors of models raise errors of any type for values that do not fit
        raise ValueError(
            f"{source.folder}: transformers cannot build this model ({type(error).__name__}: {error_summary(error)}); "
            "check config.json"
        ) from error


def _construct_on_meta(source: Source) -> PreTrainedModel:
    """Build the model on the meta device. Its buffers (rotary frequencies) are real, because no file holds them."""
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
    """Return every parameter and persistent buffer of a model, in order; tied parameters once, by their first name.

    This differs from ``state_dict()``, which lists tied parameters twice and includes the anchors of ``SeftOptimizer``.
    """
    state: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if not name.endswith(ANCHOR)}
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                state[f"{prefix}.{name}" if prefix else name] = buffer
    return state


def _aliases(model: nn.Module) -> dict[str, str]:
    """Map each further name of a tied parameter to its first name."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if first[id(parameter)] != name}


def _match_names(model: PreTrainedModel, source: Source) -> dict[str, str]:
    """Find the tensor in the files for each name of the model's state.

    A tensor that nothing needs and a name without a tensor are errors alike: either means that the files belong to
    another model. Only what transformers itself ignores may be left over.

    Returns:
        Name in the model to name in the files.

    Raises:
        ValueError: Tensors are missing, not expected or of wrong shapes.
    """
    weights = source.weights
    stored_tensors = weights.tensors
    aliases = _aliases(model)
    state = named_state(model)
    names: dict[str, str] = {name: stored for name in state if (stored := weights.find(name)) is not None}
    for alias, name in aliases.items():
        if alias in stored_tensors:
            names.setdefault(name, alias)
    ignored = "|".join([_COMPUTED, *(model._keys_to_ignore_on_load_unexpected or ())])
    known = {*state, *aliases, *names.values()}
    known.update(piece for stored in names.values() for piece in weights.info(stored).pieces)
    extra = sorted(name for name in stored_tensors if name not in known and not re.search(ignored, name))
    missing = sorted(state.keys() - names.keys())
    kind = type(model).__name__
    if missing or extra:
        raise ValueError(
            f"{source.folder} does not fit {kind}: {abbreviate(missing) or 'nothing'} missing, "
            f"{abbreviate(extra) or 'nothing'} not expected. It may be "
            "of another model, partly written, or an adapter; save it again with transformers' save_pretrained"
        )
    for name, stored in names.items():
        shape = whole_shape(state[name])
        held = weights.info(stored).shape
        if shape != held:
            raise ValueError(f"{source.folder}: {stored} has shape {held}, {kind} needs {shape}; check config.json")
    return names


def _materialise(model: PreTrainedModel, device: torch.device) -> None:
    """Allocate memory for the parameters, and keep the buffers, which have values already.

    ``to_empty`` would allocate dense memory for packed weights too, so their placeholders on the meta device are taken
    out of the modules while it runs.
    """
    buffers = dict(model.named_buffers(remove_duplicate=False))
    placeholders = [
        (module, key, parameter)
        for module in model.modules()
        for key, parameter in module.named_parameters(recurse=False)
        if packed_of(parameter) is not None
    ]
    for module, key, _ in placeholders:
        module.register_parameter(key, None)
    model.to_empty(device=device)
    for module, key, parameter in placeholders:
        module.register_parameter(key, parameter)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        buffer.copy_(buffers[name])
    model.tie_weights()  # to_empty has allocated separate memory for each name of a tied parameter


@torch.no_grad()
def _load_values(model: PreTrainedModel, names: dict[str, str], source: Source, shards: PackedShards | None) -> None:
    """Read this rank's part of every tensor from the files, into the model's shards or its packed weights."""
    state, num_lifted = named_state(model), 0
    for name, stored in names.items():
        packed = packed_of(state[name])
        if packed is None:
            part, start = stored_part(state[name])
            stop, dtype = start + part.numel(), part.dtype
        else:
            start, stop, dtype = packed.interval.start, packed.interval.stop, packed.dtype
        values, lifted = cast_weight(source.weights.read(stored, start, stop), dtype)
        num_lifted += lifted
        if packed is not None:
            packed.put(values)
        else:
            part.copy_(values)
    source.weights.release()
    if num_lifted:
        log.warning(
            "%s: %d weights are too small for %s; they are held at its smallest number, not at 0",
            source.folder,
            num_lifted,
            source.dtype,
        )
    if shards is not None:
        shards.sync_mask_counts()
