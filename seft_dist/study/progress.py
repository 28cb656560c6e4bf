"""The progress of a study: a line for each process that begins or ends, and on a terminal bars with the time left."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from seft_dist.study.plan import CELLS, Plan
from seft_dist.study.state import COMMANDS, TRAIN, Survey, Task
from seft_dist.training.metrics import FILE as METRICS

DONE = "done"
_TAIL = 1 << 16


class Durations:
    """Estimates what tasks will take from what others took."""

    def __init__(self) -> None:
        """Begin without any durations."""
        self._seconds: dict[tuple[str, str], list[float]] = {}

    def read(self, plan: Plan) -> None:
        """Read the durations that earlier runners have recorded."""
        for path in plan.folder.glob(f"{CELLS}/*/{COMMANDS}"):
            sums: dict[tuple[str, str], float] = {}
            for text in path.read_text(encoding="utf-8").splitlines():
                try:
                    line = json.loads(text)
                    key = (str(line["task"]), str(line["method"]))
                    sums[key] = sums.get(key, 0.0) + float(line["seconds"])
                except (ValueError, KeyError, TypeError):
                    continue  # the line was cut when its runner was killed
            for (kind, method), seconds in sums.items():
                self.add(kind, method, seconds)

    def add(self, kind: str, method: str, seconds: float) -> None:
        """Add the duration of a task."""
        self._seconds.setdefault((kind, method), []).append(seconds)

    def guess(self, kind: str, method: str) -> float | None:
        """Estimate the seconds of a task by others of its kind and method, else of its kind; None if there are none."""
        own = self._seconds.get((kind, method))
        alike = [
            one for (other, _), many in self._seconds.items() if (other == TRAIN) == (kind == TRAIN) for one in many
        ]
        known = own or alike
        return sum(known) / len(known) if known else None

    def left(self, survey: Survey, running: Sequence[tuple[Task, float, float]], jobs: int) -> float | None:
        """Estimate the seconds until a study is done; None if nothing like it was done yet.

        Args:
            survey: Tasks that are done and not done.
            running: Tasks that are being done, with their seconds until now and the share that is done.
            jobs: Number of tasks that run at a time.
        """
        running_keys = {task.key for task, _, _ in running}
        waiting = [(task.kind, task.method) for task in survey.ready if task.key not in running_keys] + survey.later
        guesses = [self._guess_now(kind, method, running) for kind, method in waiting]
        ends = []
        for task, seconds, share in running:
            guess = self._guess_now(task.kind, task.method, running)
            ends.append(
                None if guess is None else max(guess * (1 - share), 0.0) if share else max(guess - seconds, 0.0)
            )
        if any(value is None for value in [*guesses, *ends]):
            return None
        known = [value for value in guesses if value is not None]
        last = [value for value in ends if value is not None]
        return max([(sum(known) + sum(last)) / max(1, jobs), *last])

    def _guess_now(self, kind: str, method: str, running: Sequence[tuple[Task, float, float]]) -> float | None:
        known = self.guess(kind, method)
        if known is not None:
            return known
        going = [
            seconds / share for task, seconds, share in running if share and (task.kind == TRAIN) == (kind == TRAIN)
        ]
        return sum(going) / len(going) if going else None


class Progress:
    """Shows the user the progress of a study."""

    def __init__(self, plan: Plan, console: Console) -> None:
        """Args:
        plan: The study.
        console: Console to print on; bars are shown only on a terminal.
        """
        self._plan, self._console = plan, console
        self._durations = Durations()
        self._durations.read(plan)
        self._count, self._total = 0, 0
        self._eta: float | None = None
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._bars = Bars(*columns, TextColumn("{task.fields[rest]}"), console=console, disable=not console.is_terminal)
        self._whole = self._bars.add_task("study", total=None, rest="")
        self._lines: dict[str, TaskID] = {}

    def __enter__(self) -> "Progress":
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def show(self, survey: Survey, running: Sequence[tuple[Task, float]], taken: int) -> None:
        """Show the current state.

        Args:
            survey: Tasks that are done and not done.
            running: Tasks of this runner, and when they began, in seconds since 1970.
            taken: Number of bases and cells that other runners are working on.
        """
        now = [(task, time.time() - since, self._share(task)) for task, since in running]
        self._count, self._total = survey.done, survey.total
        self._eta = self._durations.left(survey, now, self._plan.config.jobs + taken)
        rest = f"about {clock(self._eta)} left" if self._eta is not None else ""
        rest += f"; {taken} taken by others" if taken else ""
        self._bars.update(self._whole, completed=survey.done, total=survey.total, rest=rest)
        for task, _, share in now:
            if task.key not in self._lines:
                steps = task.cell.config.total_steps if task.kind == TRAIN and task.cell and task.cell.config else None
                self._lines[task.key] = self._bars.add_task(f"  {task.label}", total=steps, rest="")
            total = self._bars.tasks[self._bars.task_ids.index(self._lines[task.key])].total
            self._bars.update(self._lines[task.key], completed=round(share * (total or 0)))
        for key in self._lines.keys() - {task.key for task, _ in running}:
            self._bars.remove_task(self._lines.pop(key))

    def began(self, task: Task) -> None:
        """Report that a process was started."""
        if not self._console.is_terminal:
            self._console.print(f"{task.label}: begins", highlight=False, markup=False, soft_wrap=True)

    def ended(self, task: Task, seconds: float, how: str) -> None:
        """Report that a process has ended.

        Args:
            task: The task of the process.
            seconds: Seconds that the process took.
            how: DONE, or a description of another outcome.
        """
        if how == DONE:
            self._durations.add(task.kind, task.method, seconds)
        eta = f"; about {clock(self._eta)} left" if self._eta is not None else ""
        text = f"[{self._count}/{self._total}] {task.label}: {how} ({clock(seconds)}){eta}"
        self._console.print(
            text, style=None if how == DONE else "yellow", highlight=False, markup=False, soft_wrap=True
        )

    def _share(self, task: Task) -> float:
        if task.kind != TRAIN or task.cell is None or task.cell.config is None:
            return 0.0
        return last_step(self._plan.run_folder(task.cell) / METRICS) / task.cell.config.total_steps


def last_step(path: Path) -> int:
    """Return the last step that a run has recorded; 0 for none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            lines = file.read().splitlines()
        return next((int(json.loads(line)["step"]) for line in reversed(lines) if line.endswith(b"}")), 0)
    except (OSError, ValueError, KeyError):
        return 0


def clock(seconds: float) -> str:
    """Format a duration, e.g. "75 s", "12 min", "3 h 5 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
