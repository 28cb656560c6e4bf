"""The methods of a study: their options, their grids, and the configurations of their runs."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from seft_dist.config import DataConfig, StudyConfig, TrainConfig
from seft_dist.session.cli import option_reader
from seft_dist.study.options import arguments, as_text, changed_options, flatten

NONE = "none"
"""Value of ``method`` for a base that is measured as it is."""
CELL = "CELL"
"""Placeholder for a run's folder until that is known."""
_OF_THE_STUDY = {
    "output": "the study has a folder for each run",
    "steps": "it follows from tokens",
    "seed": "give seeds",
    "model.path": "give base",
    "export": "the study measures the exported models",
    "threads": "give threads",
    **dict.fromkeys(("data.path", "data.name", "data.split", "data.date"), "give data.train"),
    **dict.fromkeys(
        ("data.holdout", "data.holdout_every", "data.holdout_share", "data.max_records", "data.mix"), "give data.train"
    ),
    **dict.fromkeys(("config", "print_config", "help"), "only options of the run itself"),
}
_SAVES = 10
"""Checkpoints of a run, unless train.save_every says otherwise."""


@dataclass(frozen=True)
class Setting:
    """One point of a method's grid."""

    options: dict[str, Any]
    """Options of the grid with the values of this point; empty without a grid."""
    config: TrainConfig
    """The whole run, but for its folder and seeds."""

    @property
    def text(self) -> str:
        """The setting as tables show it, e.g. "optim.lr=0.001"; "-" without a grid."""
        return ", ".join(f"{key}={as_text(value)}" for key, value in self.options.items()) or "-"


@dataclass(frozen=True)
class StudyMethod:
    """One row of the tables."""

    name: str
    base: str
    options: dict[str, Any]
    """The method's own options, without its grid."""
    grid: dict[str, list[Any]]
    settings: list[Setting]
    """Every combination of the grid's values; empty if nothing is trained."""

    @property
    def is_searched(self) -> bool:
        """True if there is more than one setting to choose from."""
        return len(self.settings) > 1

    def at_the_edge(self, setting: Setting) -> list[str]:
        """Name the numbers of a setting that are the smallest or largest that were tried.

        Returns:
            E.g. "optim.lr=0.004 is the largest tried".
        """
        texts = []
        for name, values in self.grid.items():
            if len(values) < 2 or any(
                isinstance(value, bool) or not isinstance(value, int | float) for value in values
            ):
                continue
            value = setting.options[name]
            for word, edge in (("smallest", min(values)), ("largest", max(values))):
                if value == edge:
                    texts.append(f"{name}={as_text(value)} is the {word} tried")
        return texts


def read_methods(config: StudyConfig, train: DataConfig) -> list[StudyMethod]:
    """Make every run's configuration, except folders and seeds.

    Args:
        config: The study.
        train: The training part.

    Raises:
        ValueError: An option is unknown, wrong, or the study's own business; or the grids differ in size.
    """
    read = option_reader(TrainConfig)
    shared = flatten(config.train, "train")
    _check_not_of_the_study(shared, "train")
    # Options of data are part of ``train`` already.
    shared = {key: value for key, value in shared.items() if not key.startswith("data.")}
    methods = []
    for name, entry in config.methods.items():
        what = f"methods.{name}"
        own = flatten(entry, what)
        _check_not_of_the_study(own, what)
        base = own.pop("base", config.default_base)
        if base not in config.bases:
            raise ValueError(f"{what}.base={base}: needs one of {', '.join(config.bases)}")
        if own.get("method") == NONE:
            if len(own) > 1:
                raise ValueError(
                    f"{what} trains nothing, but has {', '.join(own.keys() - {'method'})}: needs only base"
                )
            methods.append(StudyMethod(name, base, {}, {}, []))
            continue
        grid = {key: list(value) for key, value in own.items() if isinstance(value, list)}
        options = {key: value for key, value in own.items() if key not in grid}
        empty = [key for key, values in grid.items() if not values or _repeated(values)]
        if empty:
            raise ValueError(f"{what}.{empty[0]} is {grid[empty[0]]}: needs a list of different values")
        settings = []
        for values in itertools.product(*grid.values()):
            point = dict(zip(grid, values, strict=True))
            settings.append(Setting(point, _config_of(config, shared | options | point, train, read, what)))
        methods.append(StudyMethod(name, base, options, grid, settings))
    _check_grids_equal(config, methods)
    return methods


def _check_not_of_the_study(options: dict[str, Any], name: str) -> None:
    for key in options:
        if key in _OF_THE_STUDY or key.endswith(".seed"):
            raise ValueError(f"{name} has {key}: needs it left out; {_OF_THE_STUDY.get(key, 'give seeds')}")
        if key == "save_every" and name != "train":
            raise ValueError(f"{name} has save_every: needs it in train, for all methods")


def _repeated(values: list[Any]) -> bool:
    texts = [as_text(value) for value in values]
    return len(set(texts)) < len(texts)


def _config_of(
    config: StudyConfig,
    options: dict[str, Any],
    train: DataConfig,
    read: Callable[[Sequence[str], str], TrainConfig],
    name: str,
) -> TrainConfig:
    """Make the configuration of a run with as many steps as the budget allows."""
    data = {"data.seq_len": train.seq_len} | changed_options(train, "data.")
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    given = data | {"batch_size": defaults["batch_size"]} | options
    batch = given.get("global_batch") or given["batch_size"]
    sizes = {"global_batch or batch_size": batch, "data.seq_len": given["data.seq_len"]}
    for key, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: {key} is {value!r}: needs a whole number of at least 1")
    per_step = batch * given["data.seq_len"]
    if config.tokens < per_step:
        raise ValueError(f"tokens={config.tokens} is less than one step of {name}: needs at least {per_step}")
    steps = config.tokens // per_step
    own: dict[str, Any] = {"model.path": config.default_base, "output": CELL, "steps": steps, "global_batch": batch}
    saves = {"save_every": max(1, steps // _SAVES)}
    return read(arguments(saves | given | own), name)


def _check_grids_equal(config: StudyConfig, methods: list[StudyMethod]) -> None:
    sizes = {method.name: len(method.settings) for method in methods if method.settings}
    if len(set(sizes.values())) > 1 and not config.unequal_grids:
        sizes_text = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(
            f"different numbers of settings would be tried: {sizes_text}. Needs the same number for each method, since "
            "whoever may choose among more looks better; or unequal_grids: true"
        )


def with_seed(config: TrainConfig, seed: int) -> TrainConfig:
    """Return the same run with another seed, in every field from which the method reads one.

    Args:
        config: The run.
        seed: Seed of the data order, of random criteria, and of whatever else a method draws.
    """
    config = dataclasses.replace(config, seed=seed)
    for field in dataclasses.fields(config):
        inner: Any = getattr(config, field.name)
        if dataclasses.is_dataclass(inner) and not isinstance(inner, type) and hasattr(inner, "seed"):
            # A configuration refuses a setting that its method does not read.
            with contextlib.suppress(ValueError):
                changes: dict[str, Any] = {field.name: dataclasses.replace(inner, seed=seed)}
                config = dataclasses.replace(config, **changes)
    return config
