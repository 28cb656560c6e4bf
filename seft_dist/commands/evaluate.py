"""Compare causal language models: perplexity on a text, tasks of lm-evaluation-harness, and zeros by kind of weight.

    seft evaluate --models.dense DENSE --models.pruned PRUNED --data.path TEXT.jsonl --stride 256
    seft evaluate --models.dense DENSE --tasks arc_easy --task_files.arc_easy arc_easy.jsonl
    torchrun --nproc-per-node 8 -m seft_dist evaluate --models.repaired runs/r1/model --data.path TEXT.jsonl

Several ranks hold each model in FSDP2 shards and share the work.
"""

from seft_dist.config import EvaluateConfig
from seft_dist.session.cli import parse, run


def main() -> None:
    """Evaluate as the command line says."""
    run(_evaluate)


def _evaluate() -> None:
    config = parse(EvaluateConfig, description=__doc__)

    from rich.console import Console

    from seft_dist.evaluation.evaluation import evaluate, result_table, task_table
    from seft_dist.io.tables import sparsity_table
    from seft_dist.session.distributed import shutdown, start

    ranks = start(threads=config.threads)
    results = evaluate(config, ranks=ranks)
    if ranks.is_main:
        console = Console()
        console.print(sparsity_table({entry.name: entry.zeros for entry in results}, "Sparsity"))
        if config.data is not None:
            console.print(result_table(results))
        if config.tasks is not None:
            console.print(task_table(results))
    shutdown()
