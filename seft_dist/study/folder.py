"""A study's folder: a new one, one that is resumed, or one that is refused because it holds another study.

STUDY/study.yaml              the newest configuration of the study; study-1.yaml, ... as it was before
     /study.json              hashes of parts, bases and other files; every start: command, machine, versions, code
     /code-*.diff             uncommitted changes of the code that started it
     /data/PART.jsonl         parts that data.split made
     /bases/NAME/model        models that the study has pruned, with prune.log and hashes (made.json) beside them
     /cells/NAME-HASH/        one run and its measurements: cell.json, commands.jsonl, *.log, run/, test-HASH.json, ...
     /results.json, .md, .csv, runs.csv, search.csv, figures/     the results
"""

import dataclasses
import hashlib
import shlex
import socket
import sys
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Any

import torch
from typing_extensions import NotRequired, TypedDict

from seft_dist.config import DataConfig, StudyConfig
from seft_dist.data.data_files import hash_files
from seft_dist.data.records import local_files
from seft_dist.files.hashing import sha256_of
from seft_dist.files.kinds import lenient
from seft_dist.files.reading import read_json
from seft_dist.files.writing import write_bytes, write_json, write_text
from seft_dist.io.source import locate
from seft_dist.session import facts
from seft_dist.session.cli import to_yaml
from seft_dist.study.inputs import Content, is_as_made, read_inputs, validation_files
from seft_dist.study.methods import StudyMethod, read_methods
from seft_dist.study.options import flatten
from seft_dist.study.parts import check_parts, find_parts, stamp_of
from seft_dist.study.plan import Base, Plan, digest_of, identity_of, read_bases, read_measures
from seft_dist.study.results import Start, TextPart
from seft_dist.study.split import FOLDER as DATA
from seft_dist.study.split import Split, source_hash, write_split
from seft_dist.training.writer_lock import LOCK, only_writer

YAML, RECORD, WORKERS = "study.yaml", "study.json", "workers"
FORMAT = "seft_dist study 1"
_PATIENCE = 3600.0  # seconds that another start may take to read and split the text


class _Base(TypedDict):
    stamp: list[list[Any]]
    """Files of the model that was there before."""
    source: str
    """Digest of that model."""
    digest: str
    """Hash of everything that the base depends on."""


@lenient
class _Record(TypedDict):
    """study.json."""

    format: str
    date: str
    """Day that chat templates which write it get to see."""
    split: dict[str, Any] | None
    parts: dict[str, TextPart]
    bases: dict[str, _Base]
    inputs: NotRequired[dict[str, Content]]
    """Other files that results depend on, by option and path; earlier versions did not look at them."""
    starts: list[Start]


def open_study(config: StudyConfig) -> Plan:
    """Check a study, make its folder and its parts, and write down this start.

    Args:
        config: The study.

    Returns:
        All bases, runs and measurements of the study, done or not.

    Raises:
        ValueError: The study cannot be made so, the folder holds something else, or results in it depend on another
            text or base.
    """
    folder = Path(config.output)
    parts, split = find_parts(config)
    known = _read_known(folder)
    day = known["date"] if known else date.today().isoformat()
    parts = {name: dataclasses.replace(part, date=part.date or day) for name, part in parts.items()}
    methods = read_methods(config, parts["train"])
    bases = read_bases(config, parts["train"])
    with only_writer(folder, _PATIENCE):
        known = _read_known(folder)
        rule = _split(config, split, folder, known)
        _check_test_unseen(methods, parts["test"])
        facts_now = check_parts(parts, known["parts"] if known else {})
        if known:
            _check_parts_unchanged(folder, known["parts"], facts_now)
        digests = {f"part {name}": part["digest"] for name, part in facts_now.items()}
        models = {name: _base(base, parts["train"], facts_now, known) for name, base in bases.items()}
        digests |= {f"base {name}": base["digest"] for name, base in models.items()}
        if known:
            _check_bases_unchanged(folder, known["bases"], models)
        _check_not_replaced(folder, bases)
        inputs_before = known.get("inputs", {}) if known else {}
        inputs = {**inputs_before, **read_inputs(config, methods, bases, inputs_before)}
        bases = {name: dataclasses.replace(base, model=_made_or_located(base)) for name, base in bases.items()}
        plan = Plan(config, folder, bases, methods, read_measures(config, parts, digests), digests)
        starts = [*(known["starts"] if known else []), _start(folder)]
        parts_now = {**(known["parts"] if known else {}), **facts_now}
        bases_now = {**(known["bases"] if known else {}), **models}
        record = _Record(
            format=FORMAT, date=day, split=rule, parts=parts_now, bases=bases_now, inputs=inputs, starts=starts
        )
        write_json(folder / RECORD, record)
        _write_yaml(folder, config)
    return plan


def _made_or_located(base: Base) -> Path:
    return base.model if base.prune is not None else locate(str(base.model))


def read_record(folder: Path) -> _Record:
    """Read study.json.

    Raises:
        ValueError: There is none, or it is damaged or of another version.
    """
    known = _read_known(folder)
    if known is None:
        raise ValueError(f"{folder} holds no study: needs the folder of seft study (output)")
    return known


def _read_known(folder: Path) -> _Record | None:
    if not (folder / RECORD).exists():
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"output={folder} is a file: needs a folder")
        # These may be left by a start that was killed, or by a batch script.
        left = (LOCK, DATA, WORKERS, "code-")
        others = [path.name for path in folder.iterdir() if not path.name.startswith(left)] if folder.is_dir() else []
        if others:
            raise ValueError(f"output={folder} is not empty and holds no study (found {others[0]}): choose another")
        return None
    known = read_json(folder / RECORD, _Record)
    if known["format"] != FORMAT:
        raise ValueError(f"{folder / RECORD} has format {known['format']!r}, this program reads {FORMAT!r}")
    return known


def _split(config: StudyConfig, split: Split | None, folder: Path, known: _Record | None) -> dict[str, Any] | None:
    """Write the parts of the split, unless they are there."""
    if split is None:
        return known["split"] if known else None
    text_field = flatten(config.train, "train").get("data.text_field", "text")
    rule: dict[str, Any] = {**split, "source": source_hash(split), "text_field": text_field}
    before = known["split"] if known else None
    if before is not None:
        if {**before, "path": ""} != {**rule, "path": ""}:
            changed = sorted(key for key in before.keys() | rule.keys() if before.get(key) != rule.get(key))
            raise ValueError(
                f"{folder} has split its text by another rule ({', '.join(changed)} differ): every result in it "
                "depends on that; go back to it, or choose another output"
            )
        rule = before
    if before is None or not all((folder / DATA / f"{name}.jsonl").is_file() for name in split["shares"]):
        (folder / DATA).mkdir(exist_ok=True)
        write_split(split, folder / DATA, text_field)
    return rule


def _check_parts_unchanged(folder: Path, before: dict[str, TextPart], now: dict[str, TextPart]) -> None:
    changed = [
        name
        for name in ("train", "validation", "test")
        if name in before and before[name]["digest"] != now[name]["digest"]
    ]
    if changed:
        raise ValueError(
            f"{folder} was begun with another text: {', '.join(changed)} has other records now. Every result in it "
            "depends on them; go back to that text, or choose another output"
        )


def _base(base: Base, train: DataConfig, parts: dict[str, TextPart], known: _Record | None) -> _Base:
    """Hash a base: its files, or everything that its pruning depends on."""
    path = str(base.model) if base.prune is None else base.prune.model.path
    source = locate(path)
    if not (source / "config.json").is_file():
        raise ValueError(f"bases.{base.name}: {source} has no config.json: needs the folder of a Hugging Face model")
    stamp = stamp_of(str(source), "*.safetensors") + stamp_of(str(source / "config.json"))
    before = known["bases"].get(base.name) if known else None
    digest = before["source"] if before and before["stamp"] == stamp else _hash_of_files(stamp)
    if base.prune is None:
        return _Base(stamp=stamp, source=digest, digest=digest)
    text = ""
    if base.prune.data is not None:
        text = parts["train"]["digest"] if base.prune.data.path == train.path else _hash_of_text(base.prune.data)
    return _Base(stamp=stamp, source=digest, digest=digest_of(identity_of(base, digest, text)))


def _hash_of_files(stamp: list[list[Any]]) -> str:
    if not stamp:
        return ""  # loading the model will report what is wrong
    digest = hashlib.sha256()
    for name, _, _ in stamp:
        with open(name, "rb") as file:
            digest.update(sha256_of(file).digest())
    return digest.hexdigest()[:16]


def _hash_of_text(data: DataConfig) -> str:
    files = local_files(data)
    return hash_files(files) if files else data.label


def _check_bases_unchanged(folder: Path, before: dict[str, _Base], now: dict[str, _Base]) -> None:
    changed = [name for name in now if name in before and before[name]["digest"] != now[name]["digest"]]
    if changed:
        raise ValueError(
            f"{folder} has results of another base {', '.join(changed)}: its files, or what it was pruned by, were "
            "different. Give the new one another name, or choose another output"
        )


def _check_test_unseen(methods: list[StudyMethod], test: DataConfig) -> None:
    for method in methods:
        for data in (setting.config.eval.data for setting in method.settings):
            if data is None:
                continue
            files = {hash_files([file]) for file in validation_files(data)} & {
                hash_files([f]) for f in local_files(test)
            }
            names = {(each.path, each.name, each.split) for each in data.sources.values() or [data]}
            if files or (test.path, test.name, test.split) in names:
                raise ValueError(
                    f"methods.{method.name} measures the test part while it trains (eval.data {data.label}): needs "
                    "other text, since what is seen of the test part may choose what is reported"
                )


def _check_not_replaced(folder: Path, bases: dict[str, Base]) -> None:
    for base in bases.values():
        if base.prune is not None and (base.model / "config.json").is_file() and not is_as_made(base.model):
            raise ValueError(
                f"{folder} has results of another base {base.name} than {base.model} is now: put the first one back, "
                "or move the new one to another folder and add it to bases as NAME: {path: FOLDER}"
            )


def _start(folder: Path) -> Start:
    code, diff = facts.code()
    if diff:
        code["diff"] = f"code-{hashlib.sha256(diff).hexdigest()[:8]}.diff"
        write_bytes(folder / code["diff"], diff)
    return Start(
        when=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=shlex.join(sys.orig_argv),
        host=socket.gethostname(),
        cpu=facts.cpu(),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        versions=facts.versions(),
        code=code,
    )


def _write_yaml(folder: Path, config: StudyConfig) -> None:
    """Write study.yaml, and keep the one before under another name if it differs."""
    path, text = folder / YAML, to_yaml(config)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        number = 1
        while (folder / f"study-{number}.yaml").exists():
            number += 1
        path.rename(folder / f"study-{number}.yaml")
    write_text(path, text)
