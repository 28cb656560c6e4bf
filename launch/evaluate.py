"""Compare causal language models: perplexity on a text, and zeros in each kind of weight.

Example: python launch/evaluate.py --models.dense DENSE --models.pruned PRUNED --data.path TEXT.jsonl
"""

from seft_dist.config import EvaluateConfig
from seft_dist.training.cli import parse, run


def main() -> None:
    config = parse(EvaluateConfig, description=__doc__)

    from rich.console import Console

    from seft_dist.io.tables import sparsity_table
    from seft_dist.training.evaluation import evaluate, result_table

    results = evaluate(config)
    console = Console()
    console.print(sparsity_table({entry.name: entry.zeros for entry in results}, "Sparsity"))
    console.print(result_table(results))


if __name__ == "__main__":
    run(main)
