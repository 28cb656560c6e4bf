"""A run's ds_config: the file's own keys, with the batch sizes filled in from the run's options."""

import copy
from dataclasses import dataclass
from typing import Any

import torch

from seft_dist.backends.deepspeed import ds_optimizer_args, load_ds_config
from seft_dist.config import TrainConfig
from seft_dist.data.micro_batches import num_micro_batches

_OURS = ("optimizer", "gradient_clipping")
"""Keys that SeftOptimizer honours in place of the engine."""


@dataclass(frozen=True)
class DsConfig:
    """A ds_config, ready to use."""

    content: dict[str, Any]
    """Settings for DeepSpeed."""
    optimizer: dict[str, Any]
    """Arguments of SeftOptimizer: lr, betas, eps, weight_decay, max_grad_norm."""

    @property
    def stage(self) -> int:
        """ZeRO stage, 0 to 3."""
        return int(self.content.get("zero_optimization", {}).get("stage", 0))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return torch.bfloat16 if self.content.get("bf16", {}).get("enabled") else torch.float32

    def check(self) -> None:
        """Let DeepSpeed check its own keys, before anything is loaded.

        Raises:
            ValueError: It refuses one.
        """
        from deepspeed.runtime.config import DeepSpeedConfig

        try:
            DeepSpeedConfig(copy.deepcopy(self.content))
        except Exception as error:  # DeepSpeed raises assertions, pydantic's errors and whatever a wrong type leads to
            reason = " ".join(str(error).split())
            raise ValueError(f"DeepSpeed refuses the ds_config: {type(error).__name__}: {reason[:400]}") from error


def read_ds_config(config: TrainConfig, world_size: int) -> DsConfig | None:
    """Read the ds_config and fill in the batch sizes of the run's own options.

    Args:
        config: The run; its global batch is known.
        world_size: Number of ranks.

    Returns:
        None without ``config.deepspeed``.

    Raises:
        ValueError: It cannot be honoured, contradicts the run's batch sizes, or has an "auto" that nobody fills.
    """
    if config.deepspeed is None:
        return None
    content = load_ds_config(config.deepspeed)
    try:
        optimizer = ds_optimizer_args(content, config.optim)
    except ValueError as error:
        raise ValueError(f"{config.deepspeed}: {error}") from error
    # 0: else DeepSpeed's default of 1.0 would clip the anchors, which looks as if somebody meant to clip
    content = {key: value for key, value in content.items() if key not in _OURS} | {"gradient_clipping": 0.0}
    assert config.global_batch is not None
    accumulate = num_micro_batches(config.global_batch, config.batch_size, world_size)
    filled = {
        "train_micro_batch_size_per_gpu": ("batch_size", config.batch_size),
        "gradient_accumulation_steps": ("global_batch / (batch_size x ranks), rounded up,", accumulate),
        "train_batch_size": ("that x batch_size x ranks", accumulate * config.batch_size * world_size),
    }
    for key, (option, value) in filled.items():
        if content.setdefault(key, "auto") not in ("auto", value):
            raise ValueError(
                f'{config.deepspeed}: {key} is {content[key]}, but {option} is {value}; make them equal, or say "auto"'
            )
        content[key] = value
    content["zero_allow_untested_optimizer"] = True
    unfilled = ", ".join(sorted(path for key, value in content.items() for path in _autos(value, key)))
    if unfilled:
        raise ValueError(f'{config.deepspeed}: {unfilled} is "auto": give a value, or leave it out for the default')
    return DsConfig(content, optimizer)


def _autos(tree: Any, path: str) -> list[str]:
    if isinstance(tree, dict):
        return [auto_path for key, value in tree.items() for auto_path in _autos(value, f"{path}.{key}")]
    return [path] if tree == "auto" else []
