"""manifest.json of a run: everything that is needed to repeat a result and to check that it is the same.

    format       of this file
    model        fingerprint of the model that training started from
    dtype        type in which its weights are held
    dropout      whether the model draws random numbers: each rank its own, so that no other layout gives the same
    teacher      fingerprint of the teacher's weights; null without one
    parent       fingerprint of the model from which pruned weights come back; null without one
    data         fingerprint of the tokenised sequences, their number, sequences of an optimizer step
    attempts     one for each start of the run: when, how and where, with which versions, code and configuration;
                 ``first_step`` is the step it began with, so what it did ends where a later one begins
    evolutions   step and digest of all masks and supports, for each evolution
    damaged      new name of a manifest of this run that could not be read; it has the attempts before
    final        after the last step: its loss, and for each target hashes of support, mask and weights

Written by rank 0 when an attempt starts, after each evolution and at the end; a run that goes on adds to it.
Uncommitted changes of the code are beside it, in ``code-<digest>.diff``.
"""

import dataclasses
import hashlib
import json
import shlex
import sys
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from typing_extensions import TypedDict

from seft_dist.config import TrainConfig
from seft_dist.files.kinds import check_kind
from seft_dist.files.reading import read_json
from seft_dist.files.writing import put_aside, write_bytes, write_text
from seft_dist.kernels.describe import describe
from seft_dist.optim.report import EvolutionReport
from seft_dist.session import facts
from seft_dist.session.agreement import gather_objects
from seft_dist.session.distributed import Ranks, launch_facts
from seft_dist.training.ds_config import DsConfig
from seft_dist.training.metrics import FILE as METRICS
from seft_dist.training.progress import print_line
from seft_dist.training.step_lines import StepLines

FILE = "manifest.json"
FORMAT = "seft_dist manifest 1"


class _Attempt(TypedDict):
    first_step: int


class _Evolution(TypedDict):
    step: int
    digest: str


class _Kind(TypedDict):
    """The entries of a manifest that are read again; it has more."""

    attempts: list[_Attempt]
    evolutions: list[_Evolution]


class Manifest:
    """The manifest of the run that this process takes part in; it does nothing on ranks that do not write."""

    def __init__(self, folder: Path, content: dict[str, Any] | None) -> None:
        """Args:
        folder: Folder of the run.
        content: Content of the file; None on ranks that do not write.
        """
        self._folder, self._content = folder, content
        self._write()

    def evolution(self, report: EvolutionReport | None) -> None:
        """Add the evolution of a step, if there was one."""
        if self._content is not None and report is not None:
            self._content["evolutions"].append({"step": report.step, "digest": report.digest})
            self._write()

    def finish(self, step: int, loss: float | None, layers: dict[str, list[str]]) -> None:
        """Write down the end of the run.

        Args:
            step: The last one.
            loss: Loss of the last record; None: there was no step.
            layers: Hashes that ``topology_hashes`` gives.
        """
        if self._content is None:
            return
        self._content["attempts"][-1]["finished"] = _now()
        digest = hashlib.sha256(json.dumps(layers, sort_keys=True).encode()).hexdigest()[:16]
        self._content["final"] = {"step": step, "loss": loss, "digest": digest, "layers": layers}
        self._write()

    def _write(self) -> None:
        if self._content is None:
            return
        write_text(self._folder / FILE, _to_json(self._content))


def open_manifest(
    config: TrainConfig,
    ranks: Ranks,
    *,
    fingerprints: dict[str, str | None],
    dtype: str,
    dropout: bool,
    data: dict[str, Any],
    backend: str,
    ds: DsConfig | None,
    steps_done: int,
    hosts: list[dict[str, Any]],
) -> Manifest:
    """Write down, on rank 0, the start of a run or of a further attempt.

    Args:
        config: The run, resolved; its folder exists.
        ranks: This process.
        fingerprints: Of "model", "teacher" and "parent"; None for what the run does not have.
        dtype: Type of the weights, e.g. "float32".
        dropout: True: the model draws random numbers.
        data: ``fingerprint``, ``sequences`` and ``global_batch``.
        backend: Backend that holds the weights, e.g. "zero3".
        ds: The ds_config, if there is one.
        steps_done: Optimizer steps done by earlier attempts.
        hosts: What ``list_hosts`` gives.

    Raises:
        OSError: The file cannot be read or written.
    """
    folder = Path(config.output)
    if not ranks.is_main:
        return Manifest(folder, None)
    old = _read_old(folder, steps_done)
    attempt = {
        "first_step": steps_done + 1,
        "started": _now(),
        "finished": None,
        "command": shlex.join(sys.orig_argv),
        "layout": _layout(config, ranks, backend, ds),
        "hosts": hosts,
        "launch": {"launcher": ranks.launcher} | launch_facts(),
        "numerics": facts.numerics(),
        "versions": facts.versions(),
        "code": _code(folder),
        "seeds": {"data order": config.seed, "random criteria and first support": config.seft.seed},
        "optimizer": ds.optimizer if ds else None,
        "config": dataclasses.asdict(config),
    }
    content: dict[str, Any] = {"format": FORMAT, **fingerprints, "data": data}
    content |= {"dtype": dtype, "dropout": dropout}
    content["attempts"] = [*old["attempts"], attempt]
    content["evolutions"] = [entry for entry in old["evolutions"] if entry["step"] <= steps_done]
    if old.get("damaged"):
        content["damaged"] = old["damaged"]
    return Manifest(folder, content | {"final": None})


def _layout(config: TrainConfig, ranks: Ranks, backend: str, ds: DsConfig | None) -> dict[str, Any]:
    """Describe how the work is divided over ranks."""
    return {
        "backend": backend,
        "world_size": ranks.world_size,
        "threads": torch.get_num_threads(),
        "device": ranks.device.type,
        "batch_size": config.batch_size,
        "replicas": config.replicas,
        "offload": config.offload,
        "packing": config.packing,
        "activation_checkpointing": config.model.activation_checkpointing,
        "deepspeed": ds.content if ds else None,
    }


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest.

    Args:
        path: The file, or the folder of a run.

    Raises:
        ValueError: There is none, or it is of another format.
    """
    file = path / FILE if path.is_dir() else path
    try:
        content = read_json(file, dict[str, Any])
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: no manifest can be read ({error}); needs the folder of a run of seft train, or its {FILE}"
        ) from error
    if content.get("format") != FORMAT:
        raise ValueError(f"{file} has format {content.get('format')!r}, this program reads {FORMAT!r}")
    check_kind(content, _Kind, str(file))
    return content


def lasting_attempts(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the attempts with steps that are part of the run: those that a later one has not started over."""
    lasting: list[dict[str, Any]] = []
    for attempt in manifest["attempts"]:
        lasting = [earlier for earlier in lasting if earlier["first_step"] < attempt["first_step"]]
        lasting.append(attempt)
    return lasting


def _read_old(folder: Path, steps_done: int) -> dict[str, Any]:
    """Read the manifest of earlier attempts; a damaged one is put aside, and evolutions are taken from the metrics."""
    if not (folder / FILE).exists():
        return {"attempts": [], "evolutions": []}
    try:
        return read_manifest(folder)
    except ValueError as error:
        aside = put_aside(folder / FILE)
        print_line(f"{error}\nit is now {aside.name}: {FILE} goes on without the attempts before this one")
    steps = StepLines.read(folder / METRICS)
    evolutions = [
        {"step": step, "digest": line["evolution"]["digest"]}
        for step, line in steps.items()
        if step <= steps_done and isinstance(line.get("evolution"), dict) and "digest" in line["evolution"]
    ]
    return {"attempts": [], "evolutions": evolutions, "damaged": [aside.name]}


def _code(folder: Path) -> dict[str, Any]:
    """Describe the code that runs; changes that git does not have are written beside the manifest."""
    about, diff = facts.code()
    if diff:
        about["diff"] = f"code-{hashlib.sha256(diff).hexdigest()[:8]}.diff"
        write_bytes(folder / about["diff"], diff)
    return about


def list_hosts(ranks: Ranks) -> list[dict[str, Any]]:
    """List the machines, each with its number of ranks. Collective."""
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu"
    mine = {"host": launch_facts()["host"], "device": device, "cpu": facts.cpu(), "threads": torch.get_num_threads()}
    mine["kernels"] = describe(ranks.device)
    counts = Counter(json.dumps(host) for host in gather_objects(ranks, mine))
    return [json.loads(text) | {"ranks": count} for text, count in counts.items()]


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _to_json(content: dict[str, Any]) -> str:
    """Write JSON with indentation, but each layer's hashes on one line."""
    final = content["final"]
    if final is None:
        return json.dumps(content, indent=1) + "\n"
    text = json.dumps(content | {"final": final | {"layers": None}}, indent=1)
    rows = ",\n".join(f"   {json.dumps(name)}: {json.dumps(row)}" for name, row in final["layers"].items())
    head, _, tail = text.rpartition("null")
    return f"{head}{{\n{rows}\n  }}{tail}\n"
