"""The state of a study, read from its files each time: tasks done, tasks that can run, settings chosen.

CELL/failed-KIND.json the last try of a task ended with an error: which task, when, its code and log
CELL/commands.jsonl   every process that was run for it: command, machine; at its end again, with seconds and exit code
CELL/diverged.json    a loss or gradient of the run was not finite: every try would end so, and this is its result
"""

import contextlib
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from seft_dist.files.reading import read_json
from seft_dist.results.run_files import EvaluatedModel, read_evaluations
from seft_dist.study.inputs import is_made
from seft_dist.study.methods import Setting, StudyMethod
from seft_dist.study.plan import FORGETTING, MODEL, TEST, VALIDATION, Base, Cell, Plan
from seft_dist.study.results import Failure
from seft_dist.training.diagnosis import FOLDER as DIAGNOSIS
from seft_dist.training.run_folder import CHECKPOINTS, is_finished

PRUNE, TRAIN = "prune", "train"
DIVERGED, COMMANDS = "diverged.json", "commands.jsonl"
MEASURED = "model"
"""Name of the one model in the files of seft evaluate."""


@dataclass(frozen=True)
class Task:
    """One process that is to be run."""

    kind: str
    """PRUNE, TRAIN, or the part that is measured."""
    label: str
    folder: Path
    """Folder of its base or cell; whoever holds its lock may run the task."""
    method: str = ""
    """Empty for a base."""
    cell: Cell | None = None
    base: Base | None = None
    done: Path = Path()
    """File or folder that exists once the task is done."""

    @property
    def key(self) -> str:
        """Name that identifies the task among all."""
        return f"{self.folder.name} {self.kind}"

    @property
    def log(self) -> Path:
        """File that gets what the task prints."""
        return self.folder / f"{self.kind}.log"

    @property
    def failure_file(self) -> Path:
        """File that says how the last try of the task failed; there is none if it did not."""
        return failure_file(self.folder, self.kind)


@dataclass
class Survey:
    """The state of a study at one moment."""

    ready: list[Task] = field(default_factory=list)
    """Tasks that can be run now, the most needed first."""
    later: list[tuple[str, str]] = field(default_factory=list)
    """Kind and method of tasks that wait for others."""
    done: int = 0
    """Tasks that are done."""
    chosen: dict[str, Setting] = field(default_factory=dict)
    """Chosen settings by method; methods that have none yet are missing."""

    @property
    def total(self) -> int:
        """Tasks of the whole study."""
        return self.done + len(self.ready) + len(self.later)


class State:
    """The state of a study, found by reading its files."""

    def __init__(self, plan: Plan) -> None:
        """Args:
        plan: The study.
        """
        self.plan = plan
        self._models: dict[Path, EvaluatedModel] = {}
        self._finished: set[Path] = set()

    def survey(self) -> Survey:
        """Find the tasks that are done, ready and waiting."""
        survey = Survey()
        for base in self.plan.bases.values():
            if base.prune is None:
                continue
            if is_made(base.model):
                survey.done += 1
            else:
                survey.ready.append(Task(PRUNE, f"prune {base.name}", base.model.parent, base=base, done=base.model))
        wanted: dict[str, tuple[Cell, list[str]]] = {}  # by name: methods with the same settings share a cell
        early = set()
        for method in self.plan.methods:
            for cell in self.plan.search_cells(method):
                _, parts = wanted.setdefault(cell.name, (cell, []))
                parts += [VALIDATION] if VALIDATION not in parts else []
                early.add(cell.name)
            is_known, setting = self.choice(method)
            if setting is not None:
                survey.chosen[method.name] = setting
            if not is_known:
                survey.later += self._unknown_of(method)
            for cell in self._final_of(method, setting) if is_known else []:
                _, parts = wanted.setdefault(cell.name, (cell, []))
                parts += [part for part in self._final_parts if part not in parts]
        tasks: list[Task] = []
        for cell, parts in wanted.values():
            ready, later, done = self._tasks_of(cell, parts)
            tasks += ready
            survey.later += later
            survey.done += done
        survey.ready += sorted(tasks, key=lambda task: (task.kind == TRAIN, task.folder.name not in early))
        return survey

    @property
    def _final_parts(self) -> list[str]:
        return [part for part in (TEST, FORGETTING) if part in self.plan.measures]

    def _final_of(self, method: StudyMethod, setting: Setting | None) -> list[Cell]:
        return self.plan.final_cells(method, setting) if setting is not None or not method.settings else []

    def _unknown_of(self, method: StudyMethod) -> list[tuple[str, str]]:
        """List the final tasks of a method whose setting is not chosen yet."""
        seeds = self.plan.config.seeds
        trains = len(seeds) - (self.plan.config.first_seed in seeds)
        return [(TRAIN, method.name)] * trains + [(part, method.name) for part in self._final_parts] * len(seeds)

    def _tasks_of(self, cell: Cell, parts: list[str]) -> tuple[list[Task], list[tuple[str, str]], int]:
        """Find the tasks of a cell that can run now, those that must wait, and the number that are done."""
        folder, base = self.plan.cell_folder(cell), self.plan.bases[cell.base]
        missing = [part for part in parts if self.measured(cell, part) is None]
        done = len(parts) - len(missing)
        if self.diverged(cell):
            return [], [], len(parts) + 1
        if base.prune is not None and not is_made(base.model):
            waiting = [(part, cell.method) for part in missing]
            return [], waiting + ([(TRAIN, cell.method)] if cell.config is not None else []), done
        if cell.config is not None:
            run = self.plan.run_folder(cell)
            if not self.finished(run) or (missing and not (run / MODEL / "config.json").is_file()):
                task = Task(TRAIN, f"train {cell.label}", folder, cell.method, cell, done=run / "result.json")
                return [task], [(part, cell.method) for part in missing], done
            done += 1
        tasks = [
            Task(part, f"{part} of {cell.label}", folder, cell.method, cell, done=self.plan.measured_file(cell, part))
            for part in missing
        ]
        return tasks, [], done

    def finished(self, run: Path) -> bool:
        """Tell whether a run has its result."""
        if run not in self._finished and is_finished(run):
            self._finished.add(run)
        return run in self._finished

    def is_done(self, task: Task) -> bool:
        """Tell whether the output of a task exists."""
        if task.cell is None:
            assert task.base is not None
            return is_made(task.base.model)
        if task.kind == TRAIN:
            run = self.plan.run_folder(task.cell)
            return self.finished(run) and (run / MODEL / "config.json").is_file()
        return self.measured(task.cell, task.kind) is not None

    def begin_anew(self, run: Path) -> None:
        """Remove a finished run whose model is gone and is needed again."""
        if self.finished(run):
            self._finished.discard(run)
            _remove(run)

    def measured(self, cell: Cell, part: str) -> EvaluatedModel | None:
        """Read the measurement of a cell's model on a part; None if it is missing or its file is damaged."""
        path = self.plan.measured_file(cell, part)
        if path not in self._models:
            try:
                measured = read_evaluations(path)["models"][MEASURED]
            except (OSError, ValueError, KeyError):
                return None
            if "perplexity" not in measured:
                return None
            self._models[path] = measured
        return self._models[path]

    def diverged(self, cell: Cell) -> bool:
        """Tell whether a run ended because a loss or gradient was not finite."""
        return (self.plan.cell_folder(cell) / DIVERGED).is_file()

    def is_lost(self, cell: Cell, part: str) -> bool:
        """Tell whether a run diverged, or left a model whose perplexity on a part is not finite."""
        measured = self.measured(cell, part) if cell.config is not None else None
        return self.diverged(cell) or (measured is not None and not math.isfinite(measured["perplexity"]))

    def choice(self, method: StudyMethod) -> tuple[bool, Setting | None]:
        """Choose the setting with the smallest perplexity on the validation part.

        Returns:
            Whether it is known (all runs of the search are measured, or lost), and the setting; None where nothing is
            trained, or all are lost.
        """
        if not method.is_searched:
            return True, method.settings[0] if method.settings else None
        best: tuple[float, Setting] | None = None
        for setting, cell in zip(method.settings, self.plan.search_cells(method), strict=True):
            if self.is_lost(cell, VALIDATION):
                continue
            measured = self.measured(cell, VALIDATION)
            if measured is None:
                return False, None
            if best is None or measured["perplexity"] < best[0]:
                best = (measured["perplexity"], setting)
        return True, best[1] if best else None

    def idle_models(self) -> list[Path]:
        """List the runs that still have models or checkpoints which nothing needs any more, by ``keep``."""
        if self.plan.config.keep == "all":
            return []
        needed: dict[Path, bool] = {}
        for method in self.plan.methods:
            is_known, setting = self.choice(method)
            if not method.settings:
                continue
            searched, final = self.plan.search_cells(method), self._final_of(method, setting) if is_known else []
            names = {cell.name for cell in final}
            for cell in [*searched, *final]:
                open_parts = any(self.measured(cell, part) is None for part in self._final_parts)
                needs = not is_known or (cell.name in names and (self.plan.config.keep == "chosen" or open_parts))
                run = self.plan.run_folder(cell)
                needed[run] = needed.get(run, False) or needs
        return [
            run
            for run, needs in needed.items()
            if not needs and self.finished(run) and any(path.exists() for path in _leftovers(run))
        ]


def failure_file(folder: Path, kind: str) -> Path:
    """Return the file for the failure of a task of some kind in a base's or cell's folder."""
    return folder / f"failed-{kind}.json"


def read_failure(path: Path) -> Failure | None:
    """Read how the last try of a task failed; None if it did not end with an error."""
    try:
        return read_json(path, Failure)
    except (OSError, ValueError):
        return None


def has_diverged(run: Path) -> bool:
    """Tell from the diagnosis of a run whether a loss or gradient that was not finite stopped it."""
    for path in run.glob(f"{DIAGNOSIS}/*.json"):
        try:
            if str(read_json(path, dict[str, object]).get("error", "")).startswith("FloatingPointError"):
                return True
        except (OSError, ValueError):
            continue
    return False


def remove_model(run: Path) -> None:
    """Remove a run's exported model and checkpoints; its result stays."""
    for name in (MODEL, CHECKPOINTS):
        _remove(run / name)


def _leftovers(run: Path) -> list[Path]:
    """List the model and the checkpoints of a run, and what a kill has left of them while they were removed."""
    return [path for name in (MODEL, CHECKPOINTS) for path in (run / name, _aside(run / name))]


def _aside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.removed")


def _remove(folder: Path) -> None:
    """Remove a folder, if it is there, under another name: half removed, it is not taken for whole."""
    shutil.rmtree(_aside(folder), ignore_errors=True)  # left by a kill
    with contextlib.suppress(OSError):  # it is not there, or something is left at the other name
        folder.rename(_aside(folder))
    for path in (_aside(folder), folder):
        shutil.rmtree(path, ignore_errors=True)
