"""Collects the results of a study from the files of its runs and measurements."""

import contextlib
import itertools
import json
import logging
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from seft_dist.results.run_files import list_differences, measurement_of, read_evaluations, read_result
from seft_dist.study.folder import read_record
from seft_dist.study.methods import StudyMethod
from seft_dist.study.options import as_text
from seft_dist.study.plan import FORGETTING, TEST, VALIDATION, Cell, Plan
from seft_dist.study.results import FORMAT, Results, Row, RunRow, Search, Tried
from seft_dist.study.state import COMMANDS, MEASURED, TRAIN, State, Survey, failure_file, read_failure
from seft_dist.study.statistics import Difference, difference, spread
from seft_dist.training.manifest import lasting_attempts, read_manifest

log = logging.getLogger(__name__)


def collect(state: State, survey: Survey) -> Results:
    """Collect the results of all runs and measurements that are complete.

    Args:
        state: State of the study.
        survey: The newest survey of it.
    """
    plan, record = state.plan, read_record(state.plan.folder)
    cells = {method.name: _final_cells(state, method) for method in plan.methods}
    runs = {name: [_run_row(state, cell) for cell in method_cells] for name, method_cells in cells.items()}
    reference = plan.config.default_reference
    made = {
        cell.label: made_with(plan.run_folder(cell))
        for method_cells in cells.values()
        for cell in method_cells
        if cell.config is not None and state.finished(plan.run_folder(cell))
    }
    return Results(
        format=FORMAT,
        written=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        name=plan.folder.resolve().name,
        tokens=plan.config.tokens,
        seeds=list(plan.config.seeds),
        search_seed=plan.config.first_seed,
        reference=reference,
        unequal_grids=plan.config.unequal_grids,
        done=survey.done,
        total=survey.total,
        failures=[failure for task in survey.ready if (failure := read_failure(task.failure_file)) is not None],
        warnings=_warnings(state, cells, made),
        made_with=next(iter(made.values()), {}),
        rows=[_row(plan, method, runs[method.name], runs[reference], survey) for method in plan.methods],
        searches=[_search(state, method) for method in plan.methods if method.settings],
        runs=[row for rows in runs.values() for row in rows],
        parts=record["parts"],
        starts=record["starts"],
    )


def _final_cells(state: State, method: StudyMethod) -> list[Cell]:
    is_known, setting = state.choice(method)
    if not is_known or (setting is None and method.settings):
        return []
    return state.plan.final_cells(method, setting)


def _run_row(state: State, cell: Cell) -> RunRow:
    """Collect one cell's results; what is not measured yet is None."""
    plan = state.plan
    test, forgetting = (state.measured(cell, part) if part in plan.measures else None for part in (TEST, FORGETTING))
    run = plan.run_folder(cell)
    result = _result(run) if cell.config is not None and state.finished(run) else {}
    zeros = result.get("sparsity", {})
    tasks = {
        f"{task} {metric.removesuffix(',none')}": float(value)
        for task, metrics in (test.get("tasks", {}) if test else {}).items()
        for metric, value in metrics.items()
        if metric != "samples" and "_stderr" not in metric
    }
    return RunRow(
        method=cell.method,
        seed=cell.seed,
        status=_status(state, cell, TEST),
        folder=str(plan.cell_folder(cell).relative_to(plan.folder)),
        test=test["perplexity"] if test else None,
        forgetting=forgetting["perplexity"] if forgetting else None,
        tasks=tasks,
        trainable=0 if cell.config is None else result.get("trainable"),
        zeros=test.get("sparsity") if test else None,
        off_target=0 if cell.config is None else zeros.get("layers_off_target"),
        peak_memory_bytes=result.get("peak_memory_bytes"),
        seconds=result.get("seconds"),
        steps=0 if cell.config is None else result.get("steps"),
        tokens=0 if cell.config is None else result.get("tokens"),
    )


def _result(run: Path) -> Any:
    try:
        return read_result(run / "result.json")
    except ValueError as error:
        log.warning("left out of the tables: %s", error)
        return {}


def _status(state: State, cell: Cell, part: str) -> str:
    if state.is_lost(cell, part):
        return "diverged"
    if state.measured(cell, part) is not None:
        return "finished"
    files = [failure_file(state.plan.cell_folder(cell), kind) for kind in (TRAIN, part)]
    return "failed" if any(map(read_failure, files)) else "missing"


def _row(plan: Plan, method: StudyMethod, runs: list[RunRow], reference: list[RunRow], survey: Survey) -> Row:
    """Sum up a method's seeds, and pair them with those of the reference."""
    done = [run for run in runs if run["status"] == "finished"]
    steps = [run["seconds"] / run["steps"] for run in done if run["seconds"] is not None and run["steps"]]
    chosen = survey.chosen.get(method.name)
    names = dict.fromkeys(name for run in done for name in run["tasks"])
    tasks = {name: spread([run["tasks"][name] for run in done if name in run["tasks"]]) for name in names}
    off = [run["off_target"] for run in done if run["off_target"] is not None]
    return Row(
        method=method.name,
        base=method.base,
        setting=chosen.text if chosen else "-",
        runs=len(done),
        wanted=len(plan.config.seeds) if method.settings else 1,
        diverged=sum(run["status"] == "diverged" for run in runs),
        test=spread(_values(done, "test")),
        versus=None if method.name == plan.config.default_reference else _versus(done, reference),
        forgetting=spread(_values(done, "forgetting")),
        tasks={name: value for name, value in tasks.items() if value is not None},
        trainable=_mean(done, "trainable"),
        zeros=_mean(done, "zeros"),
        off_target=max(off) if off else None,
        peak_memory_bytes=_mean(done, "peak_memory_bytes"),
        seconds_per_step=spread(steps),
        seconds=spread(_values(done, "seconds")),
        tokens=_mean(done, "tokens"),
        steps=_mean(done, "steps"),
    )


def _values(runs: Sequence[RunRow], name: str) -> list[float]:
    return [float(value) for run in runs if (value := dict(run)[name]) is not None]  # type: ignore[arg-type]


def _mean(runs: Sequence[RunRow], name: str) -> float | None:
    over_runs = spread(_values(runs, name))
    return over_runs["mean"] if over_runs else None


def _versus(runs: Sequence[RunRow], reference: Sequence[RunRow]) -> Difference | None:
    """Compare runs with the reference, paired by seed; a base, which has no seed, is paired with every seed."""
    own = {run["seed"]: run["test"] for run in runs if run["test"] is not None}
    others = {run["seed"]: run["test"] for run in reference if run["status"] == "finished" and run["test"] is not None}
    if None in own and own.keys() != others.keys():
        own = dict.fromkeys(others, own[None])
    if None in others and own.keys() != others.keys():
        others = dict.fromkeys(own, others[None])
    seeds = [seed for seed in own if seed in others]
    return difference([float(own[seed] or 0) for seed in seeds], [float(others[seed] or 0) for seed in seeds])


def _search(state: State, method: StudyMethod) -> Search:
    """Collect what was tried for a method, and what was chosen by validation."""
    is_known, setting = state.choice(method)
    tried = []
    for one, cell in zip(method.settings, state.plan.search_cells(method), strict=bool(method.is_searched)):
        status, measured = _status(state, cell, VALIDATION), state.measured(cell, VALIDATION)
        value = measured["perplexity"] if measured and status == "finished" else None
        tried.append(Tried(setting=one.text, validation=value, status=status))
    return Search(
        method=method.name,
        options={key: as_text(value) for key, value in method.options.items()},
        grid={key: [as_text(value) for value in values] for key, values in method.grid.items()},
        tried=tried,
        chosen=setting.text if is_known and setting is not None else None,
        edges=method.at_the_edge(setting) if is_known and setting is not None else [],
    )


def _warnings(state: State, cells: dict[str, list[Cell]], made: dict[str, dict[str, Any]]) -> list[str]:
    """Find differences in how rows of one table were made or measured."""
    texts = []
    for part in (part for part in (TEST, FORGETTING) if part in state.plan.measures):
        how = {
            cell.label: measurement_of(read_evaluations(state.plan.measured_file(cell, part)), MEASURED)
            for method_cells in cells.values()
            for cell in method_cells
            if state.measured(cell, part) is not None
        }
        if apart := list_differences(how):
            texts.append(f"These perplexities of the {part} part cannot be compared: {'; '.join(apart)}")
    if apart := list_differences(made):
        texts.append(f"Runs were not made alike: {'; '.join(apart)}")
    if apart := list_differences(_origins(state, cells)):
        texts.append(f"Models were others when some runs began (hashes): {'; '.join(apart)}")
    return texts


def _origins(state: State, cells: dict[str, list[Cell]]) -> dict[str, dict[str, Any]]:
    """Collect the hashes of the base and the teacher that each run has read."""
    origins: dict[str, dict[str, Any]] = {}
    for cell in itertools.chain(*cells.values()):
        if cell.config is None:
            continue
        names = {"model": f"base {cell.base}", "teacher": cell.config.teacher.path}
        with contextlib.suppress(OSError, ValueError):
            manifest = read_manifest(state.plan.run_folder(cell))
            origins[cell.label] = {str(name): manifest[kind] for kind, name in names.items() if manifest.get(kind)}
    return origins


def made_with(run: Path) -> dict[str, Any]:
    """Collect what may decide about a run's result or its seconds beside its settings.

    Args:
        run: Its folder, inside a cell's.
    """
    ways: dict[str, dict[str, None]] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError, TypeError):  # damaged: what was read so far
        for attempt in lasting_attempts(read_manifest(run)):
            hosts = attempt["hosts"]
            way = {
                "code": attempt["code"]["source"],
                "torch": attempt["versions"]["torch"],
                "transformers": attempt["versions"]["transformers"],
                "processor": hosts[0]["cpu"],
                "device": hosts[0]["device"],
                "threads": hosts[0]["threads"],
                "ranks": sum(host["ranks"] for host in hosts),
            }
            for name, value in way.items():
                ways.setdefault(name, {})[str(value)] = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        texts = (run.parent / COMMANDS).read_text(encoding="utf-8").splitlines()
        for line in (json.loads(text) for text in texts if text.endswith("}")):
            if line["task"] == TRAIN:
                ways.setdefault("processes at a time", {})[str(line["jobs"])] = None
    # A run that was resumed in another way has two of them
    return {name: ", then ".join(values) for name, values in ways.items()}
