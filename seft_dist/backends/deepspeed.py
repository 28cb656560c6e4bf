"""Weights sharded by DeepSpeed ZeRO-3, and the optimizer's settings in a ds_config.

ZeRO-3 cuts each flattened weight into equal chunks; the last is padded with uninitialised memory that nobody reads. The
shard of a frozen weight is ``p.ds_tensor`` (on the CPU with offload_param) and a write to it is seen by the next
gather, except while the engine keeps a gathered copy (parameters below ``stage3_param_persistence_threshold``).
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor
from typing_extensions import TypedDict

from seft_dist.backends.base import DenseBackend, Holder
from seft_dist.backends.group import Group
from seft_dist.config import AdamConfig
from seft_dist.files.kinds import check_kind, lenient
from seft_dist.files.reading import read_json
from seft_dist.files.shipped import DS_CONFIGS, find_file, short_names
from seft_dist.session.suggest import did_you_mean
from seft_dist.sparsity.partition import Partition

_ADAM_TYPES = ("adam", "adamw")
_MOST_DEPTH = 20
"""Levels of a ds_config; DeepSpeed's own keys need 5."""

Auto = Literal["auto"]


@lenient
class _Enabled(TypedDict, total=False):
    enabled: bool | Auto | None


@lenient
class _Offload(TypedDict, total=False):
    device: str | None


@lenient
class _Zero(TypedDict, total=False):
    stage: Literal[0, 1, 2, 3]
    offload_param: _Offload
    zero_hpz_partition_size: int
    zero_quantized_weights: bool
    zero_quantized_nontrainable_weights: bool
    mics_shard_size: int


@lenient
class _Optimizer(TypedDict, total=False):
    type: str
    params: dict[str, Any]


@lenient
class _Params(TypedDict, total=False):
    lr: float
    betas: list[float]
    eps: float
    weight_decay: float
    adam_w_mode: bool
    bias_correction: bool


@lenient
class _DsConfig(TypedDict, total=False):
    """The keys of a ds_config that are read here; DeepSpeed checks the others."""

    zero_optimization: _Zero
    optimizer: _Optimizer
    gradient_clipping: float | Auto
    fp16: _Enabled
    bf16: _Enabled
    train_batch_size: int | Auto
    train_micro_batch_size_per_gpu: int | Auto
    gradient_accumulation_steps: int | Auto


def is_zero3(weight: Tensor) -> bool:
    """Return whether DeepSpeed ZeRO-3 holds a weight."""
    return hasattr(weight, "ds_id")


class Zero3Backend(DenseBackend):
    """Flat chunks of ceil(numel / world size), the tail of the last rank being padding."""

    name = "zero3"

    def __init__(self, targets: Mapping[str, Holder]) -> None:
        """Args:
        targets: Holders of the weights by name.

        Raises:
            ValueError: A target is not held by ZeRO-3, or in a form whose shard cannot be written safely.
        """
        for name, holder in targets.items():
            _check_shard(name, holder.weight)
        first: Any = next(iter(targets.values())).weight
        group = first.ds_process_group
        owners = Group(group if dist.get_world_size(group) > 1 else None)
        super().__init__(targets, owners, replicas=Group(None))

    def _weight(self, i: int) -> Any:
        return self.holders[i].weight  # with DeepSpeed's ds_* attributes

    def _shape(self, i: int) -> tuple[int, int]:
        return self._matrix(self._weight(i).ds_shape)

    def _partition(self, i: int) -> Partition:
        weight = self._weight(i)
        return Partition(weight.ds_numel, weight.ds_tensor.numel(), self.owners.size)

    def local(self, i: int) -> Tensor:
        shard: Tensor = self._weight(i).ds_tensor
        return shard.detach().view(-1)[: len(self.interval(i))]

    def drop_gathered(self) -> None:
        pass

    def publish_write(self) -> None:
        # A gathered copy that outlives the step hides the write, silently: free it, the next forward gathers again.
        for weight in map(self._weight, range(len(self.names))):
            if weight.ds_status.name == "AVAILABLE":
                weight.partition(param_list=[weight])

    def read(self, i: int, positions: Tensor) -> Tensor:
        return self.full(self.holders[i].weight).view(-1)[positions]

    def full(self, parameter: Tensor) -> Tensor:
        if not is_zero3(parameter):
            return parameter.detach()
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()


def _check_shard(name: str, weight: Any) -> None:
    if not is_zero3(weight):
        raise ValueError(
            f"{name}.weight is not held by ZeRO-3 although other targets are: pass the whole model to deepspeed"
        )
    if weight.ds_tensor.__dict__.get("final_location") is not None and weight.ds_tensor.final_location.name == "nvme":
        raise ValueError(
            f"{name}.weight is offloaded to NVMe: its shard is not in memory to be written; "
            'set offload_param.device to "cpu" or "none" in the ds_config'
        )
    if weight.ds_secondary_tensor is not None or weight.ds_zero_param_process_group is not None:
        raise ValueError(
            f"{name}.weight has a second copy (ZeRO++ hpZ) that would miss every update; "
            "remove zero_hpz_partition_size from the ds_config"
        )
    if not weight.ds_tensor.is_floating_point() or hasattr(weight.ds_tensor, "ds_quant_scale"):
        raise ValueError(f"{name}.weight is quantized by ZeRO: remove the zero_quantized_* keys from the ds_config")


def load_ds_config(ds_config: str | dict[str, Any]) -> dict[str, Any]:
    """Read a ds_config and refuse what this project cannot train with.

    Args:
        ds_config: Path of a JSON file, or the name of one that comes with the package ("zero3"), or its content.

    Returns:
        The content, a new dict.

    Raises:
        ValueError: Unreadable, a key of another type, or fp16, ZeRO++ hpZ, quantized weights or NVMe parameters are
            asked for.
    """
    content: dict[str, Any]
    if isinstance(ds_config, str):
        name = f"ds_config {ds_config}"
        path = Path(find_file(ds_config, DS_CONFIGS)).expanduser()
        try:
            content = read_json(path, dict[str, Any])
        except (OSError, ValueError) as error:
            meant = "" if path.exists() else did_you_mean(path.stem, short_names(DS_CONFIGS))
            raise ValueError(f"{name}: {error}; needs a JSON file with DeepSpeed's keys{meant}") from error
    else:
        name, content = "ds_config", ds_config
    _check_depth(content, name)
    content = dict(check_kind(json.loads(json.dumps(content)), _DsConfig, name))
    if "bfloat16" in content:
        raise ValueError(f"{name} has bfloat16, an old name: call it bf16")
    zero = content.get("zero_optimization", {})
    refused = {
        "fp16.enabled": content.get("fp16", {}).get("enabled") not in (None, False),
        "zero_optimization.zero_hpz_partition_size": zero.get("zero_hpz_partition_size", 1) > 1,
        "zero_optimization.zero_quantized_weights": bool(zero.get("zero_quantized_weights")),
        "zero_optimization.zero_quantized_nontrainable_weights": bool(zero.get("zero_quantized_nontrainable_weights")),
        "zero_optimization.offload_param.device=nvme": zero.get("offload_param", {}).get("device") == "nvme",
        "zero_optimization.mics_shard_size": zero.get("mics_shard_size", -1) > 0,
    }
    requested = [key for key, present in refused.items() if present]
    if requested:
        raise ValueError(
            f"ds_config asks for {', '.join(requested)}, which would scale gradients or hide updates of the deltas: "
            "remove it (bf16 instead of fp16; offload_param to cpu instead of nvme)"
        )
    return content


def _check_depth(content: Any, name: str) -> None:
    level = [content]
    for _ in range(_MOST_DEPTH):
        level = [
            inner
            for value in level
            if isinstance(value, (dict, list))
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
    if level:
        raise ValueError(f"{name} is nested deeper than {_MOST_DEPTH} levels: needs DeepSpeed's keys")


def ds_optimizer_args(ds_config: str | dict[str, Any], optim: AdamConfig | None = None) -> dict[str, Any]:
    """Arguments for ``SeftOptimizer`` from a ds_config's optimizer block and gradient_clipping.

    Args:
        ds_config: Path of a JSON file, or its content.
        optim: Settings that hold where the ds_config has none or "auto"; None: AdamConfig's defaults.

    Returns:
        lr, betas, eps, weight_decay, max_grad_norm.

    Raises:
        ValueError: An optimizer type other than Adam or AdamW, or a parameter that has no meaning here.
    """
    content = load_ds_config(ds_config)
    optim = optim or AdamConfig()
    args: dict[str, Any] = {
        "lr": optim.lr,
        "betas": optim.betas,
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.max_grad_norm,
    }
    block = content.get("optimizer")
    if block:
        kind = str(block.get("type"))
        if kind.lower() not in _ADAM_TYPES:
            raise ValueError(
                f"ds_config optimizer type {kind}: needs AdamW or Adam, the update the deltas have; change the type"
            )
        params = {key: value for key, value in block.get("params", {}).items() if value != "auto"}
        check_kind(params, _Params, "ds_config optimizer params")
        ignored = {"torch_adam", "fused", "adam_w_mode", "bias_correction"}
        unknown = sorted(set(params) - set(args) - ignored)
        if unknown:
            raise ValueError(f"ds_config optimizer params {unknown} cannot be honoured: remove them")
        if kind.lower() == "adam" and not params.get("adam_w_mode", True) and params.get("weight_decay"):
            raise ValueError(
                "ds_config optimizer Adam with adam_w_mode false and weight_decay: needs decoupled decay (AdamW)"
            )
        if params.get("bias_correction") is False:
            raise ValueError("ds_config optimizer bias_correction false cannot be honoured: remove it")
        args.update({key: value for key, value in params.items() if key not in ignored})
        args["betas"] = _pair(args["betas"])
    clip = content.get("gradient_clipping", "auto")
    if clip != "auto":
        args["max_grad_norm"] = float(clip) or None
    try:
        replace(optim, **args)  # the checks of the options whose place they take
    except ValueError as error:
        raise ValueError(f"ds_config, optimizer block or gradient_clipping: {error}") from error
    return args


def _pair(betas: Any) -> tuple[float, ...]:
    if len(betas) != 2:
        raise ValueError(f"ds_config optimizer betas {list(betas)}: needs two rates from 0 to below 1")
    return tuple(betas)
