"""One study, from its YAML to its tables: the only file here that sees every part."""

import contextlib
import dataclasses
import os
import signal
from pathlib import Path

from rich.console import Console

from seft_dist.config import StudyConfig
from seft_dist.session.distributed import find_ranks
from seft_dist.session.extras import require
from seft_dist.session.signals import StopRequest, name_of
from seft_dist.study.collect import collect
from seft_dist.study.figures import write_figures
from seft_dist.study.folder import open_study
from seft_dist.study.plan import Plan
from seft_dist.study.progress import Progress
from seft_dist.study.results import write_results
from seft_dist.study.runner import Launch, Runner, launch
from seft_dist.study.state import State, Survey
from seft_dist.study.tables import print_results, table_console, write_tables
from seft_dist.training.writer_lock import PATIENCE, TakenError, only_writer


def run_study(
    config: StudyConfig, scripts: Path, request: StopRequest, console: Console | None = None, launch: Launch = launch
) -> int:
    """Run the missing tasks of a study and write its results. Every run is a process of its own.

    Args:
        config: The study.
        scripts: Folder of train.py and its like.
        request: Asks this process to stop: runs then save and end.
        console: Console to print on; None: the terminal.
        launch: Starts a process.

    Returns:
        Exit status: 0 all is done, or a signal stopped it; 1 a process failed; 130 Ctrl-C.

    Raises:
        ValueError: The study cannot be made so, or its folder holds another one.
    """
    if find_ranks().world_size > 1:
        raise ValueError(
            "started on several ranks: start it once, as one process; --launcher starts the ranks of every run"
        )
    if config.figures:
        require("matplotlib", "--figures", ", or --figures false")
    console = console or table_console()
    console.print(f"Study {config.output}: reading texts and models ...", highlight=False, markup=False)
    plan = dataclasses.replace(open_study(config), config=fill_in_threads(config))
    with Progress(plan, console) as progress:
        runner = Runner(plan, scripts, progress, request, lambda state, survey: write(plan, state, survey), launch)
        failures = runner.run()
    survey = runner.state.survey()
    write(plan, runner.state, survey, PATIENCE)
    results = collect(runner.state, survey)
    print_results(results, console)
    files = ["results.md", "results.csv", "runs.csv", "search.csv", "results.json"]
    if config.figures:
        files += [str(path.relative_to(plan.folder)) for path in write_figures(results, plan.folder)]
    console.print(f"Written in {plan.folder}: {', '.join(files)}", highlight=False, markup=False, soft_wrap=True)
    if request.number:
        console.print(f"stopped by {name_of(request.number)}; the same command goes on", highlight=False)
        return 130 if request.number == signal.SIGINT else 0
    return 1 if failures or survey.done < survey.total else 0


def fill_in_threads(config: StudyConfig) -> StudyConfig:
    """Fill in the CPU threads of a process."""
    if config.threads is not None:
        return config
    return dataclasses.replace(config, threads=max(1, len(os.sched_getaffinity(0)) // config.jobs))


def write(plan: Plan, state: State, survey: Survey, patience: float = 0.0) -> None:
    """Write results.json and the tables.

    Args:
        plan: The study.
        state: State of the study.
        survey: The newest survey of it.
        patience: Seconds to wait for another runner that is writing them; after that nothing is written.
    """
    with contextlib.suppress(TakenError), only_writer(plan.folder, patience):
        results = collect(state, survey)
        write_results(results, plan.folder)
        write_tables(results, plan.folder)
