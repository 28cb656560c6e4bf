"""Runs the missing tasks of a study, each as a process of its own; several runners may share a study.

A task belongs to a folder (a cell or a base), and only the holder of that folder's lock runs it: two runners, on one
machine or on several, never run the same task twice. A runner that was killed leaves its processes behind. They inherit
the lock, so the next runner on this machine waits for them; runs hold their own folders, too, on all machines.
"""

import json
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple, Protocol

from seft_dist.files.writing import write_json, write_text
from seft_dist.session.cli import to_dict, to_yaml
from seft_dist.session.signals import StopRequest
from seft_dist.study.inputs import is_as_made
from seft_dist.study.plan import Base, Plan
from seft_dist.study.progress import DONE, Progress
from seft_dist.study.results import Failure
from seft_dist.study.state import (
    COMMANDS,
    DIVERGED,
    MEASURED,
    PRUNE,
    TRAIN,
    State,
    Survey,
    Task,
    has_diverged,
    read_failure,
    remove_model,
)
from seft_dist.training.writer_lock import LOCK, TakenError, only_writer

SETTINGS, RECIPE, CELL = "train.yaml", "prune.yaml", "cell.json"
_POLL = 0.2
_SURVEY_EVERY = 2.0  # seconds between two surveys of what other runners have done
_TABLES_EVERY = 10.0  # seconds between two writings of the tables
_MOST_STARTS = 3  # most starts of a task that ends neither with a result nor with an error


class Process(Protocol):
    """The part of subprocess.Popen that the runner uses."""

    def poll(self) -> int | None:
        """Exit status; None while it runs."""

    def terminate(self) -> None:
        """Ask it to end."""

    def kill(self) -> None:
        """End it."""


Launch = Callable[[Task, list[str], Path, int], Process]
"""Starts the process of a task: the task, the command, the file that gets what it prints, the lock that it inherits."""


def launch(task: Task, command: list[str], log: Path, lock: int) -> Process:
    """Start a process in a session of its own: Ctrl-C reaches the runner only, which asks the process to save."""
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock,),
        )


@dataclass
class RunningTask:
    """A task that this runner runs."""

    task: Task
    command: list[str]
    process: Process
    slot: int
    claim: "Claim"
    since: float = field(default_factory=time.time)


class Claim(NamedTuple):
    """The lock of a task's folder, held."""

    stack: ExitStack
    """Closing it gives the lock back."""
    descriptor: int
    """For the process, which then holds it too."""


class Runner:
    """Runs a study's tasks until none is left that can be run."""

    def __init__(
        self,
        plan: Plan,
        scripts: Path,
        progress: Progress,
        request: StopRequest,
        after: Callable[[State, Survey], None],
        launch: Launch = launch,
    ) -> None:
        """Args:
        plan: The study.
        scripts: Folder of train.py and its like.
        progress: Shows the user what happens.
        request: Asks this process to stop.
        after: Called from time to time when tasks have ended; writes the tables.
        launch: Starts a process.
        """
        self.plan, self.state = plan, State(plan)
        self._scripts, self._progress, self._request, self._after, self._launch = (
            scripts,
            progress,
            request,
            after,
            launch,
        )
        self._running: list[RunningTask] = []
        self._failed: dict[str, Failure] = {}
        self._starts: dict[str, int] = {}
        self._since = time.time()

    def run(self) -> list[Failure]:
        """Run everything that can be run.

        Returns:
            Failures of tasks, in this or in another runner since this one began; their cells are incomplete.
        """
        survey, looked, taken, stopping = self.state.survey(), -_SURVEY_EVERY, 0, False
        self._after(self.state, survey)
        written, is_written = time.monotonic(), True
        try:
            while True:
                ended = self._reap()
                if self._request.number and not stopping:
                    stopping = True
                    for running in self._running:
                        running.process.terminate()
                if ended or time.monotonic() > looked + _SURVEY_EVERY:
                    survey, looked = self.state.survey(), time.monotonic()
                    taken = 0 if stopping else self._start(survey)
                self._progress.show(survey, [(running.task, running.since) for running in self._running], taken)
                if ended:
                    for task, seconds, how in ended:
                        self._progress.ended(task, seconds, how)
                    self._tidy()
                    is_written = False
                if not is_written and time.monotonic() > written + _TABLES_EVERY:
                    self._after(self.state, survey)
                    written, is_written = time.monotonic(), True
                if not self._running and (stopping or not taken):
                    return list(self._failed.values())
                time.sleep(_POLL)
        finally:
            for running in self._running:  # only after an error, or a second Ctrl-C
                running.process.kill()
                running.claim.stack.close()

    def _start(self, survey: Survey) -> int:
        """Start as many tasks as there is room for; returns in how many folders others are working."""
        taken: set[Path] = set()
        for task in survey.ready:
            own = {running.task.folder for running in self._running}
            if task.folder in own | taken or self._has_failed(task):
                continue
            if len(self._running) >= self.plan.config.jobs:
                if self._is_taken(task):
                    taken.add(task.folder)
                continue
            claim = self._claim(task)
            if claim is None:
                taken.add(task.folder)
                continue
            try:
                self._begin(task, claim)
            except BaseException:
                claim.stack.close()
                raise
        return len(taken)

    def _is_taken(self, task: Task) -> bool:
        """Tell whether others work on a task that is not to be begun now: the time left depends on it."""
        folders = [task.folder, *([self.plan.run_folder(task.cell)] if task.cell is not None else [])]
        try:
            for folder in (folder for folder in folders if (folder / LOCK).exists()):
                with only_writer(folder, 0):  # a process that was killed has left this one
                    pass
        except TakenError:
            return True
        return False

    def _has_failed(self, task: Task) -> bool:
        if task.key in self._failed:
            return True
        failure = read_failure(task.failure_file)
        if failure is None or failure["when"] < self._since:
            return False
        self._failed[task.key] = failure  # it has just failed in another runner
        return True

    def _claim(self, task: Task) -> Claim | None:
        """Take the lock of a task's folder; None if another runner holds it or has done the task by now."""
        with ExitStack() as stack:
            try:
                descriptor = stack.enter_context(only_writer(task.folder, 0))
                if task.cell is not None:  # the run may go on although its runner was killed
                    with only_writer(self.plan.run_folder(task.cell), 0):
                        pass
            except TakenError:
                return None
            if task.base is not None and (task.base.model / "config.json").is_file():
                self._accept(task, task.base)  # its runner was killed while it was pruned
                return None
            if self.state.is_done(task):
                return None
            return Claim(stack.pop_all(), descriptor)
        return None

    def _begin(self, task: Task, claim: Claim) -> None:
        if task.kind == TRAIN and task.cell is not None:
            self.state.begin_anew(self.plan.run_folder(task.cell))
        slot = min(set(range(self.plan.config.jobs)) - {running.slot for running in self._running})
        command = self._command(task, slot)
        task.failure_file.unlink(missing_ok=True)
        self._starts[task.key] = self._starts.get(task.key, 0) + 1
        with task.log.open("a", encoding="utf-8") as file:
            file.write(f"$ {shlex.join(command)}\n")
        process = self._launch(task, command, task.log, claim.descriptor)
        self._running.append(RunningTask(task, command, process, slot, claim))
        self._record(self._running[-1])
        self._progress.began(task)

    def _command(self, task: Task, slot: int) -> list[str]:
        """Make the command of a task, and write the files that it reads into the task's folder."""
        config = self.plan.config
        launcher = shlex.split(config.launcher.replace("{slot}", str(slot))) if config.launcher else [sys.executable]
        threads = [f"--threads={config.threads}"] if config.threads else []
        if task.kind == PRUNE:
            assert task.base is not None
            write_text(task.folder / RECIPE, to_yaml(task.base.prune))
            return [*launcher, str(self._scripts / "prune.py"), f"--config={task.folder / RECIPE}", *threads]
        cell = task.cell
        assert cell is not None
        about = {"method": cell.method, "base": cell.base, "setting": cell.setting, "seed": cell.seed}
        write_json(task.folder / CELL, about | {"config": to_dict(cell.config) if cell.config else None})
        if task.kind == TRAIN:
            write_text(task.folder / SETTINGS, to_yaml(cell.config))
            given = [f"--config={task.folder / SETTINGS}", f"--output={self.plan.run_folder(cell)}", *threads]
            return [*launcher, str(self._scripts / "train.py"), *given]
        options = self.plan.measures[task.kind].options
        given = [f"--models.{MEASURED}={self.plan.model_folder(cell)}", *options, f"--output={task.done}", *threads]
        return [*launcher, str(self._scripts / "evaluate.py"), *given]

    def _reap(self) -> list[tuple[Task, float, str]]:
        """Find the processes that have ended: their tasks, seconds and outcomes."""
        ended = []
        for running in list(self._running):
            code = running.process.poll()
            if code is None:
                continue
            self._running.remove(running)
            self._record(running, seconds=round(time.time() - running.since, 1), code=code)
            ended.append((running.task, time.time() - running.since, self._note_outcome(running, code)))
            running.claim.stack.close()
        return ended

    def _record(self, running: RunningTask, **how: float) -> None:
        """Write a line about a process that has begun, or ended in this way."""
        line = {
            "task": running.task.kind,
            "method": running.task.method,
            "command": shlex.join(running.command),
            "host": socket.gethostname(),
            "began": datetime.fromtimestamp(running.since, timezone.utc).isoformat(timespec="seconds"),
            "jobs": self.plan.config.jobs,
            **how,
        }
        with (running.task.folder / COMMANDS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _note_outcome(self, running: RunningTask, code: int) -> str:
        """Record the outcome of a task, and return it in words."""
        task = running.task
        if task.base is not None and (task.base.model / "config.json").is_file():
            return self._accept(task, task.base)
        if self.state.is_done(task):
            return DONE
        if task.kind == TRAIN and code and task.cell is not None and has_diverged(self.plan.run_folder(task.cell)):
            write_json(task.folder / DIVERGED, {"log": str(task.log), "code": code})
            return f"diverged (its loss is not finite), see {task.log}"
        if self._request.number:
            return "stopped"
        if code == 0 and self._starts[task.key] < _MOST_STARTS:
            return "stopped by a signal, once more"
        self._note_failure(task, code)
        return f"failed with code {code}, see {task.log}"

    def _note_failure(self, task: Task, code: int) -> None:
        failure = Failure(task=task.kind, when=time.time(), code=code, log=str(task.log))
        self._failed[task.key] = failure
        write_json(task.failure_file, failure)

    def _accept(self, task: Task, base: Base) -> str:
        """Use a base that was pruned just now, unless it was there before and was another model, as on another machine.

        Returns:
            The outcome in words.
        """
        if is_as_made(base.model):
            return DONE
        aside = base.model.with_name("another")
        shutil.rmtree(aside, ignore_errors=True)
        base.model.rename(aside)
        self._note_failure(task, 1)
        return f"made another model than the one that there are results of: it is {aside}, see docs/studies.md"

    def _tidy(self) -> None:
        """Remove the models that no task needs any more."""
        for run in self.state.idle_models():
            try:
                with only_writer(run.parent, 0):
                    remove_model(run)
            except TakenError:
                continue
