"""Prune a causal language model to a plain Hugging Face folder, or show the zeros it has (--method none).

    seft prune --model.path MODEL --data.path TEXT.jsonl --output PRUNED --sparsity 0.6
    torchrun --nproc_per_node 8 -m seft_dist prune --model.path MODEL --data.path TEXT.jsonl --output PRUNED \\
      --method sparsegpt --pattern 2:4

On several ranks the text and the rows of the weights are shared between them; the result is the same.
"""

from seft_dist.config import PruneConfig
from seft_dist.session.cli import parse, run, to_yaml


def main() -> None:
    """Prune as the command line says."""
    run(_prune)


def _prune() -> None:
    config = parse(PruneConfig, description=__doc__)

    from rich.console import Console

    from seft_dist.backends.group import world_group
    from seft_dist.io.tables import sparsity_table
    from seft_dist.pruning.prune import prepare, prune
    from seft_dist.session.agreement import check_agreement, on_all_ranks
    from seft_dist.session.distributed import shutdown, start

    ranks = start(threads=config.threads)
    check_agreement(ranks, to_yaml(config))
    plan = on_all_ranks(ranks, lambda: prepare(config, device=ranks.device, progress=ranks.is_main))
    counts = prune(plan, world_group(), progress=ranks.is_main)
    if ranks.is_main:
        title = f"{config.output or config.model.path}: {config.method}"
        Console().print(sparsity_table({"pruned": counts}, title))
    shutdown()
