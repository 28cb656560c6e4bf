"""Compare methods on equal terms, and write tables and plots.

All methods get the same bases, text, tokens and seeds; their settings are chosen on validation data.

    seft study --config study_tiny --jobs 2
    seft study --show runs/study-tiny

A study is one YAML file (docs/studies.md). The same command again goes on with what is missing; several at a time, on
one machine or many, share the work. --show prints the tables again and runs nothing. Exit status: 0 if all is done, 1
if a process failed, 2 if the study cannot be run as it is written.
"""

import sys
from functools import partial
from pathlib import Path

from seft_dist.config import StudyConfig
from seft_dist.files.shipped import SCRIPTS
from seft_dist.session.cli import parse, run
from seft_dist.session.signals import StopRequest, stop_requests


def _show(folder: Path) -> None:
    """Print the tables of a study as they were written last."""
    from seft_dist.study.results import read_results
    from seft_dist.study.tables import print_results, table_console

    print_results(read_results(folder), table_console())


def main() -> None:
    """Run a study as the command line says, or show one."""
    with stop_requests() as request:
        run(partial(_study, request))


def _study(request: StopRequest) -> None:
    if "--show" in sys.argv[1:]:
        if len(sys.argv) != 3 or sys.argv[1] != "--show":
            raise ValueError("--show needs a folder and nothing else: seft study --show FOLDER")
        return _show(Path(sys.argv[2]))
    config = parse(StudyConfig, description=__doc__)

    from seft_dist.study.study import run_study

    sys.exit(run_study(config, SCRIPTS, request))
