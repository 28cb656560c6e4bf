"""Sparsity Evolution Fine-Tuning of pruned language models, on sharded weights."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seft_dist.backends.deepspeed import ds_optimizer_args
    from seft_dist.backends.fsdp import pack_gathers
    from seft_dist.config import SeftConfig
    from seft_dist.io.parent import ParentModel
    from seft_dist.optim.notices import SeftWarning
    from seft_dist.optim.optimizer import SeftOptimizer
    from seft_dist.optim.packing import pack_weights, unpack_weights
    from seft_dist.optim.report import EvolutionReport

__version__ = "0.1.0"

__all__ = [
    "EvolutionReport",
    "ParentModel",
    "SeftConfig",
    "SeftOptimizer",
    "SeftWarning",
    "ds_optimizer_args",
    "pack_gathers",
    "pack_weights",
    "unpack_weights",
]

_HOMES = {
    "EvolutionReport": "seft_dist.optim.report",
    "ParentModel": "seft_dist.io.parent",
    "SeftConfig": "seft_dist.config",
    "SeftOptimizer": "seft_dist.optim.optimizer",
    "SeftWarning": "seft_dist.optim.notices",
    "ds_optimizer_args": "seft_dist.backends.deepspeed",
    "pack_gathers": "seft_dist.backends.fsdp",
    "pack_weights": "seft_dist.optim.packing",
    "unpack_weights": "seft_dist.optim.packing",
}


def __getattr__(name: str) -> Any:
    # Imported when first asked for: --help of a command needs the configuration only, not torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
