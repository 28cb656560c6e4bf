"""Prune a causal language model to a plain Hugging Face folder.

Example: python launch/prune.py --model.path MODEL --data.path TEXT.jsonl --output PRUNED --sparsity 0.6
"""

from seft_dist.config import PruneConfig
from seft_dist.training.cli import parse, run


def main() -> None:
    config = parse(PruneConfig, description=__doc__)

    from rich.console import Console

    from seft_dist.io.tables import sparsity_table
    from seft_dist.pruning.prune import prune_folder

    counts = prune_folder(config)
    Console().print(sparsity_table({"pruned": counts}, f"{config.output}: {config.method}, per {config.group}"))


if __name__ == "__main__":
    run(main)
