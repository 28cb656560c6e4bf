"""Compare two runs: are they equal, and if not, where do they first differ and by how much?

    seft compare runs/a runs/b
    seft compare runs/a their-manifest.json --output comparison.json

Exit status: 0 if docs/numerics.md is kept, 1 if not, 2 if something cannot be read.
"""

import sys
from pathlib import Path

from seft_dist.session.cli import call, run


def compare(first: Path, second: Path, output: Path | None = None, weights: bool = True) -> None:
    """Compare two runs: are they equal, and if not, where do they first differ and by how much?

    Exit status: 0 if docs/numerics.md is kept (all bits equal on the same layout, its tolerances on another), 1 if
    not, 2 if something cannot be read.

    Args:
        first: Folder of a run of seft train, or its manifest.json alone.
        second: The same of the other run. Runs with --trace true are compared step by step and layer by layer.
        output: JSON file for everything that was found.
        weights: False: leave out the exported models, of which every byte would be read.
    """
    from rich.console import Console

    from seft_dist.reproduce.compare import compare, write_comparison
    from seft_dist.reproduce.compare_report import print_comparison

    comparison = compare(first, second, weights=weights)
    print_comparison(comparison, Console())
    if output is not None:
        write_comparison(comparison, output)
    sys.exit(0 if comparison.held else 1)


def main() -> None:
    """Compare as the command line says."""
    run(lambda: call(compare, __doc__))
