"""Experiment trackers of a run (TensorBoard, W&B, MLflow, Trackio), through accelerate's. Rank 0 only.

``trackers.json`` in the run's folder says which of a tracker's runs is this one, by the tracker's name:

    {"wandb": "3f9c01ab", "mlflow": "6f0c...", "trackio": "r1"}

A run that goes on continues them. Steps that an attempt did after its last checkpoint are recorded again; TensorBoard
and MLflow then show the later record, W&B keeps the one that it has.
"""

import dataclasses
import importlib.util
import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from seft_dist.config import TrainConfig
from seft_dist.files.reading import read_json
from seft_dist.files.writing import put_aside, write_json
from seft_dist.session.extras import install_line

FILE = "trackers.json"


def check_trackers(config: TrainConfig) -> None:
    """Refuse trackers that are not installed.

    Raises:
        ValueError: Names them, and the command that installs them.
    """
    names = [name for name in config.tracker_names if importlib.util.find_spec(name) is None]
    if names:
        raise ValueError(
            f"trackers={','.join(names)} not installed: `pip install {' '.join(names)}`, or all trackers by "
            f"`{install_line(names[0])}`, or leave it out"
        )


class Trackers:
    """The trackers of a run, open for its further steps."""

    def __init__(self, config: TrainConfig, done: int, warn: Callable[[str], None]) -> None:
        """Args:
        config: The run; its folder exists.
        done: Steps done.
        warn: Gets a line about a tracker that has failed; the run goes on without it.

        Raises:
            ValueError: A tracker cannot be started.
        """
        self._warn = warn
        self._open: dict[str, Any] = {}
        if not config.tracker_names:
            return
        from accelerate import PartialState

        PartialState()  # the trackers log through it; it joins the process group that is there and talks to no rank
        folder = Path(config.output).resolve()
        known = _read_ids(folder / FILE, warn)
        for name in config.tracker_names:
            try:
                tracker = _OPEN[name](config, folder, known.get(name), done)
                tracker.start()
                identity = _IDENTITY[name](tracker)
                if known.get(name) != identity or (identity is None and not done):
                    tracker.store_init_configuration(flat(dataclasses.asdict(config), numbers_only=False))
            except Exception as error:  # trackers raise whatever their servers and files lead to
                reason = " ".join(str(error).split())[:400]
                raise ValueError(
                    f"trackers has {name}, which cannot be started: {type(error).__name__}: {reason}; repair it, or "
                    "leave it out"
                ) from error
            self._open[name] = tracker
            if identity and known.get(name) != identity:
                known[name] = identity
                write_json(folder / FILE, known)

    def log(self, record: dict[str, Any], step: int) -> None:
        """Record the numbers of a step; a tracker that fails gets no further ones."""
        for name, tracker in list(self._open.items()):
            self._attempt(name, partial(tracker.log, flat(record, numbers_only=True), step=step))

    def close(self) -> None:
        """End the trackers."""
        for name, tracker in list(self._open.items()):
            self._attempt(name, tracker.finish)

    def _attempt(self, name: str, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as error:  # training must not end with a tracker's server
            del self._open[name]
            self._warn(f"warning: the tracker {name} has failed and gets no further records: {error!r}")


def _read_ids(path: Path, warn: Callable[[str], None]) -> dict[str, str]:
    if not path.exists():
        return {}
    try:
        return read_json(path, dict[str, str])
    except ValueError as error:
        warn(f"warning: {error}; it is now {put_aside(path).name}, and trackers begin new runs")
        return {}


def _tensorboard(config: TrainConfig, folder: Path, identity: str | None, done: int) -> Any:
    from accelerate.tracking import TensorBoardTracker

    # Records of steps that an earlier attempt did after its checkpoint disappear
    return TensorBoardTracker("tensorboard", logging_dir=str(folder), purge_step=done + 1 if done else None)


def _wandb(config: TrainConfig, folder: Path, identity: str | None, done: int) -> Any:
    from accelerate.tracking import WandBTracker

    name, identity = config.run_name or folder.name, identity or secrets.token_hex(4)
    return WandBTracker(config.project, name=name, dir=str(folder), id=identity, resume="allow")


def _mlflow(config: TrainConfig, folder: Path, identity: str | None, done: int) -> Any:
    from accelerate.tracking import MLflowTracker

    return MLflowTracker(config.project, run_id=identity, run_name=config.run_name or folder.name)


def _trackio(config: TrainConfig, folder: Path, identity: str | None, done: int) -> Any:
    from accelerate.tracking import TrackioTracker

    # Trackio knows a run by its name, and gives a new run another one if the name is taken
    name = identity or config.run_name or folder.name
    return TrackioTracker(config.project, name=name, resume="allow" if identity else "never")


_OPEN: dict[str, Callable[[TrainConfig, Path, str | None, int], Any]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
_IDENTITY: dict[str, Callable[[Any], str | None]] = {
    "tensorboard": lambda tracker: None,  # its files are in the run's folder
    "wandb": lambda tracker: str(tracker.run.id),
    "mlflow": lambda tracker: str(tracker.active_run.info.run_id),
    "trackio": lambda tracker: str(tracker.run.name),
}


def flat(tree: dict[str, Any], numbers_only: bool, prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts to one with dotted names; values that are no numbers become text or are left out."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            values |= flat(value, numbers_only, f"{prefix}{key}.")
        elif isinstance(value, (bool, int, float)) and not (
            numbers_only and (isinstance(value, bool) or key == "step")
        ):
            values[f"{prefix}{key}"] = value
        elif not numbers_only:
            values[f"{prefix}{key}"] = str(value)
    return values
