"""Sparsity Evolution Fine-Tuning of pruned language models, on sharded weights."""

from seft_dist.backends.deepspeed import ds_optimizer_args
from seft_dist.config import SeftConfig
from seft_dist.optim.evolution import EvolutionReport
from seft_dist.optim.optimizer import SeftOptimizer

__all__ = ["EvolutionReport", "SeftConfig", "SeftOptimizer", "ds_optimizer_args"]
