"""Estimate before a run is queued whether it fits a cluster, and how long it takes.

    seft plan --model Llama-2-70B
    seft plan --model Llama-2-70B --cluster.nodes 2 --cluster.gpu A100-80GB --seft.density 0.005
    seft plan --model models/pruned --cluster.gpu cpu --cluster.nodes 1 --cluster.gpus_per_node 2

Nothing is loaded and no GPU is needed: shapes and activations come from the model's own class, run without values.
The table lists every layout with its memory on the fullest rank, step time and hours. Below it stand the terms of the
recommended layout, what its ranks send, full fine-tuning and LoRA for comparison, and the line that submits the run.
docs/planning.md has the formulas. GPU times are data-sheet peaks times an assumed share, and were never compared with
a GPU.
"""

from seft_dist.config import PlanConfig
from seft_dist.session.cli import parse, run


def main() -> None:
    """Plan as the command line says."""
    run(_plan)


def _plan() -> None:
    config = parse(PlanConfig, description=__doc__)

    from pathlib import Path

    from rich.console import Console

    from seft_dist.files.writing import write_text
    from seft_dist.planning.commands import submit_line
    from seft_dist.planning.plan import make_plan
    from seft_dist.planning.rates import find_rates
    from seft_dist.planning.report import render, to_json

    plan = make_plan(config, find_rates(config))
    console = Console()
    console.print(render(plan))
    if plan.best is not None:
        console.print("\nThe recommended run, to be given your pruned model and your text:", style="bold")
        line = submit_line(config, plan.best.layout)
        if line.startswith("sbatch") and not Path("slurm").is_dir():
            console.print("(`seft files --copy .` writes the folder slurm/ that it needs.)")
        print(line)
    if config.output:
        write_text(Path(config.output), to_json(plan))
