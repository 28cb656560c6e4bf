"""Run a recipe twice, or on several layouts, and see whether the results are what docs/numerics.md promises.

    seft reproduce --output runs/twice -- --config quickstart --steps 10
    seft reproduce --output runs/layouts --layouts "single:1, fsdp:2, zero3:2" -- --config R.yaml

Behind "--" stand the options of seft train. Exit status: 0 if every promise was kept, 1 if not or if a run failed, 2
if the options cannot be used.
"""

import sys

from seft_dist.config import ReproduceConfig, TrainConfig
from seft_dist.files.shipped import SCRIPTS
from seft_dist.session.cli import parse, run


def main() -> None:
    """Make the runs, compare them, show a table."""
    run(_reproduce)


def _reproduce() -> None:
    own, options = sys.argv[1:], []
    if "--" in own:
        separator = own.index("--")
        own, options = own[:separator], own[separator + 1 :]
    config = parse(ReproduceConfig, own, description=__doc__)
    # Each run gets an output of its own, so the options need not have one.
    train = parse(TrainConfig, ["--output", config.output, *options], description="Options behind --:")

    from rich.console import Console

    from seft_dist.reproduce.reproduce import all_held, reproduce
    from seft_dist.reproduce.reproduce_report import outcome_table

    outcomes = reproduce(config, train, options, SCRIPTS / "train.py")
    Console().print(outcome_table(outcomes))
    print("every promise was kept" if all_held(outcomes) else "not every promise was kept")
    sys.exit(0 if all_held(outcomes) else 1)
