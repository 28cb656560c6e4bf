"""Files that results depend on beside the texts: another content under the same name is noticed.

A study knows its cells by the contents of bases and texts, and by the paths of everything else: teachers, parents,
tokenizers, question files, masks. If such a file changes, a new run and those of before would stand in one table.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from seft_dist.config import DataConfig, StudyConfig
from seft_dist.data.data_files import hash_files
from seft_dist.data.records import local_files
from seft_dist.files.reading import read_json
from seft_dist.files.writing import write_json
from seft_dist.io.readers import TOKENIZER_FILES
from seft_dist.io.settings import CONFIG
from seft_dist.study.methods import StudyMethod
from seft_dist.study.options import flatten
from seft_dist.study.parts import stamp_of
from seft_dist.study.plan import Base

MADE = "made.json"
_WEIGHTS = ("*.safetensors",)
_CACHE = "__pycache__"  # importing a task's code writes it


class Content(TypedDict):
    """Files, known again by their contents."""

    stamp: list[list[Any]]
    """Path, size and time of each: while they stay the same, nothing is read."""
    digest: str
    """Hash of their bytes."""


def content_of(paths: list[Path], known: Content | None) -> Content:
    """Hash files and everything in folders, unless they are as they were.

    Args:
        paths: Files and folders on this machine.
        known: Result of an earlier call.
    """
    stamp = _stamps_of(paths)
    if known and known["stamp"] == stamp:
        return known
    return Content(stamp=stamp, digest=hash_files([Path(name) for name, _, _ in stamp]))


def _stamps_of(paths: list[Path]) -> list[list[Any]]:
    return [entry for path in paths for entry in stamp_of(str(path)) if _CACHE not in Path(entry[0]).parts]


def read_inputs(
    config: StudyConfig, methods: list[StudyMethod], bases: dict[str, Base], known: dict[str, Content]
) -> dict[str, Content]:
    """Hash the files that a study depends on and knows by their paths only.

    Args:
        config: The study.
        methods: Its methods.
        bases: Its bases.
        known: Result of an earlier start.

    Returns:
        Contents by option and path, e.g. "teacher.path=models/dense". What is not on this machine (a hub name) is
        left out.

    Raises:
        ValueError: A file had other contents when the study was begun.
    """
    named = {name: paths for name, paths in _named(config, methods, bases) if paths and all(p.exists() for p in paths)}
    now = {name: content_of(paths, known.get(name)) for name, paths in named.items()}
    changed = [name for name in now if name in known and known[name]["digest"] != now[name]["digest"]]
    if changed:
        raise ValueError(
            f"{config.output} has results that depend on {', '.join(changed)} with other contents than today: put them "
            "back, give the new ones another path, or choose another output"
        )
    return now


def _named(config: StudyConfig, methods: list[StudyMethod], bases: dict[str, Base]) -> Iterator[tuple[str, list[Path]]]:
    for setting in (setting for method in methods for setting in method.settings):
        run = setting.config
        for option, path in (("teacher.path", run.teacher.path), ("parent", run.parent)):
            if path:
                yield f"{option}={path}", _files_in(path, (*_WEIGHTS, CONFIG, *TOKENIZER_FILES))
        if run.model.tokenizer:
            yield f"model.tokenizer={run.model.tokenizer}", _files_in(run.model.tokenizer, TOKENIZER_FILES)
        if run.eval.data is not None:
            yield f"eval.data={run.eval.data.label}", validation_files(run.eval.data)
    for base in bases.values():
        source = str(base.model) if base.prune is None else base.prune.model.tokenizer or base.prune.model.path
        yield f"tokenizer of bases.{base.name}", _files_in(source, TOKENIZER_FILES)
        for option in ("mask", "layer_ratios"):
            value = getattr(base.prune, option, None)
            if value:
                yield f"bases.{base.name}.{option}={value}", [Path(value).expanduser()]
    for option, value in flatten(config.evaluate, "evaluate").items():
        if option == "tasks_path" or option.startswith("task_files."):
            yield f"evaluate.{option}={value}", [Path(str(value)).expanduser()]


def _files_in(folder: str, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({file for pattern in patterns for file in Path(folder).expanduser().glob(pattern)})


def validation_files(data: DataConfig) -> list[Path]:
    """List the local files of text that a run measures while it trains, those of a mix too.

    Raises:
        ValueError: There is no such file.
    """
    return [file for source in data.sources.values() or [data] for file in local_files(source)]


def is_made(model: Path) -> bool:
    """Tell whether a base that the study prunes is there, and was found to be what it was first.

    Args:
        model: Its folder; what is remembered lies beside it.
    """
    known = _remembered(model)
    return (model / CONFIG).is_file() and known is not None and known["stamp"] == _stamps_of(_files_of_base(model))


def is_as_made(model: Path) -> bool:
    """Tell whether a base that was pruned has the weights and the tokenizer that it had first; remembers them then.

    Args:
        model: Its folder; what is remembered lies beside it.
    """
    known = _remembered(model)
    now = content_of(_files_of_base(model), known)
    if known is None or known["stamp"] != now["stamp"]:
        if known is not None and known["digest"] != now["digest"]:
            return False
        write_json(model.parent / MADE, now)
    return True


def _remembered(model: Path) -> Content | None:
    file = model.parent / MADE
    return read_json(file, Content) if file.exists() else None


def _files_of_base(model: Path) -> list[Path]:
    # Not config.json and pruning.json: they name paths, and versions may add to them
    return _files_in(str(model), (*_WEIGHTS, *TOKENIZER_FILES))
