"""Files that results depend on beside the texts: another content under the same name is noticed.

A study knows its cells by the contents of bases and texts, and by the paths of everything else: teachers, parents,
tokenizers, question files, masks. If such a file changes, a new run and those of before would stand in one table.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from seft_dist.config import StudyConfig
from seft_dist.data.data_files import hash_files
from seft_dist.data.records import local_files
from seft_dist.files.reading import read_json
from seft_dist.files.writing import write_json
from seft_dist.io.readers import TOKENIZER_FILES
from seft_dist.study.methods import StudyMethod
from seft_dist.study.options import flatten
from seft_dist.study.parts import stamp_of
from seft_dist.study.plan import Base

MADE = "made.json"
_MODEL = ("*.safetensors", "*.json", *TOKENIZER_FILES)


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
    stamp = [entry for path in paths for entry in stamp_of(str(path))]
    if known and known["stamp"] == stamp:
        return known
    return Content(stamp=stamp, digest=hash_files([Path(name) for name, _, _ in stamp]))


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
                yield f"{option}={path}", _files_of_model(path)
        if run.model.tokenizer:
            yield f"model.tokenizer={run.model.tokenizer}", _files_of_model(run.model.tokenizer)
        if run.eval.data is not None:
            yield f"eval.data.path={run.eval.data.path}", local_files(run.eval.data)
    for base in bases.values():
        source = base.model if base.prune is None else Path(base.prune.model.path)
        yield f"tokenizer of bases.{base.name}", [path for path in _files_of_model(str(source)) if _is_tokenizer(path)]
        for option in ("mask", "layer_ratios"):
            value = getattr(base.prune, option, None)
            if value:
                yield f"bases.{base.name}.{option}={value}", [Path(value).expanduser()]
    for option, value in flatten(config.evaluate, "evaluate").items():
        if option == "tasks_path" or option.startswith("task_files."):
            yield f"evaluate.{option}={value}", [Path(str(value)).expanduser()]


def _files_of_model(path: str) -> list[Path]:
    folder = Path(path).expanduser()
    return sorted({file for pattern in _MODEL for file in folder.glob(pattern)})


def _is_tokenizer(path: Path) -> bool:
    return path.name in TOKENIZER_FILES


def is_as_made(model: Path) -> bool:
    """Tell whether a base that the study has pruned has the weights that it had first; remembers them then.

    Args:
        model: Its folder; what is remembered lies beside it.
    """
    file = model.parent / MADE
    known = read_json(file, Content) if file.exists() else None
    now = content_of(_files_of_model(str(model)), known)
    if known is None or known["stamp"] != now["stamp"]:
        if known is not None and known["digest"] != now["digest"]:
            return False
        write_json(file, now)
    return True
