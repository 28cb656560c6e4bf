"""All bases, runs and measurements of a study, each identified by its full settings.

A cell is one run and its measurements. Its name ends with a hash of everything that its result depends on, so that a
study whose YAML was changed reuses the cells that it still needs, and no others.
"""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seft_dist.config import DataConfig, EvalConfig, EvaluateConfig, PruneConfig, StudyConfig, TrainConfig
from seft_dist.config.pattern import AUTO
from seft_dist.config.teacher import TeacherConfig
from seft_dist.config.training import OPTIONS_WITHOUT_EFFECT
from seft_dist.session.cli import option_reader, to_dict
from seft_dist.study.methods import Setting, StudyMethod, with_seed
from seft_dist.study.options import arguments, changed_options, flatten, without_unused_options
from seft_dist.study.parts import WHICH_RECORDS

BASES, CELLS, RUN, MODEL = "bases", "cells", "run", "model"
VALIDATION, TEST, FORGETTING = "validation", "test", "forgetting"
_WITHOUT_EFFECT = (*OPTIONS_WITHOUT_EFFECT, "threads")
"""Options of a run that leave its result as it is."""
_NEW_RUN_OPTIONS: dict[str, Any] = {
    "eval": to_dict(EvalConfig()),
    "epochs": None,
    "export": True,
    "teacher": to_dict(TeacherConfig()),
    "seft.reactivate": "commit",
    "seft.train_norms": False,
    "seft.swap_fraction": 0.0,
    "parent": None,
    "group_by_length": False,
}
"""Options that earlier versions did not have, with the values that change nothing."""
_PATTERNS = {AUTO: None, None: "null"}
"""Values of ``seft.pattern`` to those that stand for them in a cell's identity: None was the default once."""
_LONGEST_NAME = 120


@dataclass(frozen=True)
class Base:
    """A model that methods start from."""

    name: str
    model: Path
    """Its folder, maybe not made yet."""
    prune: PruneConfig | None
    """Options of seft prune that make it; None if it was there before."""


@dataclass(frozen=True)
class Measure:
    """One evaluation, the same for all models."""

    part: str
    options: tuple[str, ...]
    """Options of seft evaluate, without models and output."""
    id: str


@dataclass(frozen=True)
class Cell:
    """One run and its measurements, or the measurements of a base."""

    name: str
    """Name of its folder."""
    method: str
    base: str
    setting: str
    seed: int | None
    """Seed of the run; None: nothing is trained."""
    config: TrainConfig | None
    """The run; None: nothing is trained."""

    @property
    def label(self) -> str:
        """The name that tables and messages show."""
        parts = [self.method, "" if self.setting == "-" else self.setting]
        parts.append("" if self.seed is None else f"seed {self.seed}")
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Plan:
    """A study with all its bases, methods and measurements."""

    config: StudyConfig
    folder: Path
    bases: dict[str, Base]
    methods: list[StudyMethod]
    measures: dict[str, Measure]
    digests: dict[str, str]
    """Hashes of the contents of bases and parts, by "base NAME" and "part NAME"."""
    cells: dict[tuple[str, str, int | None], Cell] = field(default_factory=dict)
    """Cells that were made already, by method, setting and seed."""
    names: dict[str, str] = field(default_factory=dict)
    """Names of cells by the hashes in them."""

    def search_cells(self, method: StudyMethod) -> list[Cell]:
        """Return the runs to choose a setting from, in the order of ``method.settings``; none without a choice."""
        seed = self.config.first_seed
        return [self.cell(method, setting, seed) for setting in method.settings] if method.is_searched else []

    def final_cells(self, method: StudyMethod, setting: Setting | None) -> list[Cell]:
        """Return the runs that are measured on the test part.

        Args:
            method: One of the study's.
            setting: The chosen one; None: nothing is trained.
        """
        if setting is None:
            return [self.cell(method, None, None)]
        return [self.cell(method, setting, seed) for seed in self.config.seeds]

    def cell(self, method: StudyMethod, setting: Setting | None, seed: int | None) -> Cell:
        """Return the cell of a setting with a seed, its run's configuration complete except the folder."""
        key = (method.name, setting.text if setting else "-", seed)
        if key not in self.cells:
            self.cells[key] = self._make(method, setting, seed)
        return self.cells[key]

    def _make(self, method: StudyMethod, setting: Setting | None, seed: int | None) -> Cell:
        base = self.bases[method.base]
        if setting is None or seed is None:
            name = self._named(f"none-{base.name}", {"base": self.digests[f"base {base.name}"]})
            return Cell(name, method.name, base.name, "-", None, None)
        config = with_seed(setting.config, seed)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(base.model)))
        values = [f"{key.rpartition('.')[2]}{value}" for key, value in setting.options.items()]
        name = self._named("-".join([method.name, *values, f"seed{seed}"]), self._identity(config, base))
        return Cell(name, method.name, base.name, setting.text, seed, config)

    def _identity(self, config: TrainConfig, base: Base) -> dict[str, Any]:
        content = {key: value for key, value in to_dict(config).items() if key not in _WITHOUT_EFFECT}
        content["steps"] = config.total_steps
        # As long as they change nothing, later options leave the names of earlier studies' cells as they are.
        for name, unused in _NEW_RUN_OPTIONS.items():
            *outer, key = name.split(".")
            inside = content[outer[0]] if outer else content
            if inside[key] == unused:
                del inside[key]
        # Cells without it had another price of weights, in swaps and in adapt "curvature"
        if config.seft.swap_fraction == 0 and (config.seft.adapt != "curvature" or config.seft.reactivation == 0):
            del content["seft"]["swap_end"]
        if config.method != "seft" and content["seft"]["reactivation"] == 0:
            content["seft"]["reactivation"] = 1.0  # the default once; other methods fix it or do not read it
        if config.method == "spiel":
            content["seft"]["on_drop"] = "revert"  # which its earlier cells did not have
        if config.method == "norms_and_biases":
            content["optim"]["weight_decay"] = 0.0  # which it does not read; its earlier cells did
        if content["seft"]["pattern"] in _PATTERNS:
            content["seft"]["pattern"] = _PATTERNS[content["seft"]["pattern"]]
        content["model"] |= {"path": self.digests[f"base {base.name}"]}
        content["data"] = without_unused_options(content["data"]) | {"path": self.digests["part train"]}
        if content.get("eval", {}).get("data"):
            content["eval"]["data"] = without_unused_options(content["eval"]["data"])
        return content

    def _named(self, label: str, identity: dict[str, Any]) -> str:
        digest = digest_of(identity)
        if digest not in self.names:  # otherwise two methods share a run
            known = next((self.folder / CELLS).glob(f"*-{digest}"), None)
            label = re.sub(r"[^A-Za-z0-9._-]+", "_", label)[:_LONGEST_NAME]
            self.names[digest] = known.name if known else f"{label}-{digest}"
        return self.names[digest]

    def cell_folder(self, cell: Cell) -> Path:
        """Return the folder with everything about a cell."""
        return self.folder / CELLS / cell.name

    def run_folder(self, cell: Cell) -> Path:
        """Return the folder of a cell's run."""
        return self.cell_folder(cell) / RUN

    def model_folder(self, cell: Cell) -> Path:
        """Return the folder of the model that is measured."""
        return self.bases[cell.base].model if cell.config is None else self.run_folder(cell) / MODEL

    def measured_file(self, cell: Cell, part: str) -> Path:
        """Return the file in which seft evaluate writes a cell's measurement on a part."""
        return self.cell_folder(cell) / f"{part}-{self.measures[part].id}.json"


def digest_of(content: Any) -> str:
    """Return a short hash of JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


def read_bases(config: StudyConfig, train: DataConfig) -> dict[str, Base]:
    """Find the folder of each base, or the options by which it is to be pruned.

    Args:
        config: The study.
        train: The training part: calibration text of bases that name none.

    Raises:
        ValueError: Options are unknown or wrong.
    """
    read = option_reader(PruneConfig)
    bases = {}
    for name, entry in config.bases.items():
        what = f"bases.{name}"
        if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
            raise ValueError(f"{what}: needs a name of letters, digits, '.', '_' and '-', since a folder is called so")
        options = flatten(entry, what)
        if options.keys() == {"path"}:
            bases[name] = Base(name, Path(str(options["path"])).expanduser(), None)
            continue
        if "output" in options or options.get("method") == "none" or "path" in options:
            raise ValueError(f"{what} is {entry}: needs only {{path: FOLDER}}, or options of seft prune without output")
        chosen = read(arguments(options | {"output": "-", "data.path": "-"}), what)
        if chosen.needs_text and "data.path" not in options:
            options = changed_options(train, "data.") | options
        model = Path(config.output) / BASES / name / MODEL
        bases[name] = Base(name, model, read(arguments(options | {"output": str(model)}), what))
    return bases


def read_measures(config: StudyConfig, parts: dict[str, DataConfig], digests: dict[str, str]) -> dict[str, Measure]:
    """Make the options of the evaluations.

    Args:
        config: The study.
        parts: The parts of the text.
        digests: Hashes of the parts' contents, by "part NAME".

    Raises:
        ValueError: Options are unknown or wrong.
    """
    read = option_reader(EvaluateConfig)
    given = flatten(config.evaluate, "evaluate")
    for key in given:
        if key in ("models", "output", "threads", "config", "print_config", "help") or key.startswith("models."):
            raise ValueError(f"evaluate has {key}: needs it left out, the study says it")
        if key.removeprefix("data.").partition(".")[0] in WHICH_RECORDS and key.startswith("data."):
            raise ValueError(f"evaluate has {key}: needs it under data.PART, since it decides which records a part has")
    tasks = {key: value for key, value in given.items() if key.split(".")[0] in _TASKS}
    measures = {}
    for part in (VALIDATION, TEST, FORGETTING):
        if part not in parts:
            continue
        own = changed_options(parts[part], "data.")
        options = own | {key: value for key, value in given.items() if key not in tasks or part == TEST}
        if part == FORGETTING:  # it has its own kind and columns
            kept = {
                key: value for key, value in options.items() if not key.startswith("data.") or key == "data.seq_len"
            }
            options = own | kept
        words = arguments(options)
        checked = to_dict(read(["--models.model=m", *words], "evaluate"))
        for name in ("models", "output", "threads"):
            del checked[name]
        checked["data"] = without_unused_options(checked["data"]) | {"path": digests[f"part {part}"]}
        measures[part] = Measure(part, tuple(words), digest_of(checked))
    return measures


_TASKS = ("tasks", "task_files", "tasks_path", "fewshot", "limit", "chat_template")


def identity_of(base: Base, dense: str, text: str) -> dict[str, Any]:
    """Return everything that a pruned base depends on.

    Args:
        base: A base that the study prunes.
        dense: Digest of the model that is pruned.
        text: Digest of the calibration text.
    """
    assert base.prune is not None
    content = to_dict(base.prune)
    for name in ("output", "threads"):
        del content[name]
    if not content["compensate"]:  # which studies of earlier versions do not mention
        del content["compensate"]
    if not base.prune.chooses_in_rounds:
        del content["compensate_rounds"]
    content["model"]["path"] = dense
    if content["data"] is not None:
        content["data"] = without_unused_options(content["data"]) | {"path": text}
    return content
