"""The model card (README.md) of an exported folder, written from its weights and from the records of its run.

Nothing is guessed: the card omits what no file records, or states that it was not recorded.
"""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from seft_dist.config import paths_of
from seft_dist.config.baselines import FIELDS, VARIANTS
from seft_dist.export.semi_structured import target_rows
from seft_dist.files.kinds import check_kind
from seft_dist.files.reading import read_json, read_yaml
from seft_dist.files.writing import write_text
from seft_dist.io.source import Source
from seft_dist.io.tables import kind_of
from seft_dist.modules.targets import ALL_LINEAR
from seft_dist.sparsity.zeros import ZeroCount, count_zeros, total_sparsity

FILE = "README.md"
_CONFIG, _RESULT, _EVAL = "config.yaml", "result.json", "eval.json"
_MANIFEST, _PRUNING = "manifest.json", "pruning.json"
_PAPER = "[arXiv 2505.24037](https://arxiv.org/abs/2505.24037)"


def write_card(folder: Path, source: Source, run: Path | None = None, base_model: str | None = None) -> None:
    """Write README.md into a folder; one that exists is replaced.

    Args:
        folder: Folder that gets the file. Its name, without a ".part" at the end, is the name of the model.
        source: The exported weights, for the table of zeros.
        run: Folder of the run of seft train that made the weights; None if no run is known.
        base_model: Name of the base model on the Hugging Face hub; None: as recorded in the files.

    Raises:
        ValueError: The run's folder has no config.yaml, or one of its files cannot be read.
    """
    records = _Records(source, run)
    base = base_model or records.base
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base:
        front["base_model"] = base
    front["tags"] = ["sparse", "pruned", *(["seft", "arxiv:2505.24037"] if records.is_seft else [])]
    title = folder.name.removesuffix(".part")
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {title}",
        _method(records, base),
        _sparsity(source, records.setting("targets") or ALL_LINEAR),
        _recipe(records),
        _results(records),
        _use(folder, title),
        "## License\n\nThat of the base model; see its card.",
    ]
    write_text(folder / FILE, "\n\n".join(part for part in parts if part) + "\n")


class _Records:
    """The records about a model: the files of its run, and pruning.json of the model that the run began with."""

    def __init__(self, source: Source, run: Path | None) -> None:
        self.config = _read(run / _CONFIG) if run else {}
        if run and not self.config:
            raise ValueError(f"{run} has no {_CONFIG}: needs the folder of a run of seft train")
        self.result = _read(run / _RESULT) if run else {}
        self.evaluation = _read(run / _EVAL) if run else {}
        self.manifest = _read(run / _MANIFEST) if run else {}
        pruned = source.folder
        self.base = ""
        if self.config:
            path = str(self.config.get("model", {}).get("path", ""))
            self.base = _public(path)
            pruned = Path(path).expanduser()  # if this folder is gone, or on the hub, its pruning is not recorded
        self.pruning = _read(pruned / _PRUNING)
        if self.pruning and not self.base:
            self.base = _public(str(self.pruning.get("model", {}).get("path", "")))

    @property
    def is_seft(self) -> bool:
        """The model was made by SEFT, with any settings; False without a record of the run."""
        return bool(self.config) and self.config.get("method", "seft") in VARIANTS

    def setting(self, field: str) -> str | None:
        """Setting of the training method or, without one, of the pruning."""
        return self.config.get("seft", {}).get(field) or self.pruning.get(field)


def _read(file: Path) -> dict[str, Any]:
    """Read a JSON or YAML file; empty if there is no such file."""
    if not file.is_file():
        return {}
    try:
        if file.suffix == ".yaml":
            return check_kind(read_yaml(file), dict[str, Any], str(file))
        return read_json(file, dict[str, Any])
    except (OSError, ValueError) as error:
        raise ValueError(f"{error}; repair or remove it") from error


def _public(path: str) -> str:
    """Return a hub name unchanged, and only the last part of a local path, whose rest means nothing to others."""
    if not path:
        return ""
    local = Path(path).expanduser()
    return local.name if local.is_dir() or path.startswith((".", "/", "~")) or path.count("/") > 1 else path


def _public_data(data: dict[str, Any]) -> str:
    return ", ".join(_public(path) for path in paths_of(data))


def _method(records: _Records, base: str) -> str:
    """Write the card's section about pruning and the method."""
    lines = ["## Method", ""]
    if records.pruning:
        dense = _public(str(records.pruning.get("model", {}).get("path", ""))) or "a dense model"
        text = f"{dense}, pruned by {records.pruning.get('method', 'an unnamed method')}"
        if records.pruning.get("sparsity") is not None:
            text += f" to {100 * records.pruning['sparsity']:g} % zeros in the targets"
        if records.pruning.get("pattern"):
            text += f", pattern {records.pruning['pattern']}"
        lines.append(text + ".")
    elif not records.config:
        return ""
    else:
        lines.append(f"The pruned model {base}; how it was pruned is not recorded beside it.")
    if records.config and not records.is_seft:
        lines += ["", _comparison(records)]
    elif records.config:
        method = records.config.get("seft", {})
        moves = "its positions do not move" if method.get("static") else "their positions evolve during training"
        across = method.get("scope") == "global" and (method.get("swap_fraction") or method.get("reactivation"))
        lines += [
            "",
            f"Fine-tuned with SEFT, Sparsity Evolution Fine-Tuning ({_PAPER}), by seft_dist {_own_version()}: "
            f"at most {_percent(method.get('density'))} of each target's weights carry a trainable delta, {moves}, and "
            f"{'the model' if across else 'every layer'} keeps its number of zeros. The deltas are part of the "
            "weights: this is a plain model, zeros stored.",
        ]
    return "\n".join(lines)


def _comparison(records: _Records) -> str:
    """Describe the method of a model that was made by a comparison method instead of SEFT."""
    name, settings = records.config["method"], records.config.get("baseline") or {}
    read = {key: settings.get(key) for key in FIELDS.get(name, ())}
    text = ", ".join(f"{key} {value}" for key, value in read.items())
    trained = f" {records.result['trainable']:,} values were trained." if "trainable" in records.result else ""
    return (
        f"Not SEFT but a method to compare it with: {name}{f' ({text})' if text else ''}, by seft_dist "
        f"{_own_version()} (docs/baselines.md).{trained} This is a plain model, zeros stored."
    )


def _sparsity(source: Source, targets: str) -> str:
    """Count the zeros of the exported weights, and tabulate them by kind of linear."""
    kinds: dict[str, list[ZeroCount]] = {}
    counts = count_zeros(target_rows(source, targets))
    for count in counts:
        kinds.setdefault(kind_of(count.name), []).append(count)
    rows = [[f"{kind} ({len(m)})", f"{sum(c.numel for c in m):,}", _zeros(m)] for kind, m in kinds.items()]
    rows.append([f"all targets ({len(counts)})", f"{sum(c.numel for c in counts):,}", _zeros(counts)])
    numel = sum(info.numel for info in source.weights.tensors.values())
    rows.append(["the whole model", f"{numel:,}", f"{100 * sum(c.zeros for c in counts) / numel:.2f} % in targets"])
    return "## Sparsity\n\n" + _table(["linear", "weights", "zeros"], rows)


def _zeros(counts: list[ZeroCount]) -> str:
    lowest, highest = min(c.sparsity for c in counts), max(c.sparsity for c in counts)
    return f"{100 * total_sparsity(counts):.2f} % ({100 * lowest:.2f} to {100 * highest:.2f} % in a layer)"


def _recipe(records: _Records) -> str:
    """Write the card's table of settings; empty if the run is not known."""
    if not records.config:
        return ""
    config, result = records.config, records.result
    data, optim, method = (config.get(key) or {} for key in ("data", "optim", "seft"))
    seed = method.get("seed") if records.is_seft else (config.get("baseline") or {}).get("seed")
    method = method if records.is_seft else {}
    attempts = records.manifest.get("attempts") or [{}]
    versions = attempts[-1].get("versions") or {}
    values = {
        "data": _public_data(data) + (f", {data['name']}" if data.get("name") else ""),
        "sequence length": data.get("seq_len"),
        "sequences of the data": (records.manifest.get("data") or {}).get("sequences"),
        "optimizer steps": result.get("steps", config.get("steps")),
        "sequences of a step": config.get("global_batch"),
        "tokens": f"{result['tokens']:,}" if "tokens" in result else None,
        "peak learning rate": optim.get("lr"),
        "schedule": f"{optim.get('schedule')}, warm-up {optim.get('warmup')} of the steps" if optim else None,
        "weight decay": optim.get("weight_decay"),
        "density of deltas": _percent(method.get("density")),
        "steps between evolutions": "none, static" if method.get("static") else method.get("interval"),
        "drop, grow, adapt": ", ".join(str(method.get(key)) for key in ("drop", "grow", "adapt")) if method else None,
        "seeds (data, method)": f"{config.get('seed')}, {seed}",
        "backend, ranks": f"{result['backend']}, {result['world_size']}" if "backend" in result else None,
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()) or None,
        "fingerprint of the pruned model": records.manifest.get("model"),
    }
    rows = [[name, str(value)] for name, value in values.items() if value not in (None, "")]
    return "## Recipe\n\n" + _table(["", ""], rows) + "\n\nThe whole configuration is `config.yaml` of the run."


def _results(records: _Records) -> str:
    """Write the card's tables of what was measured; empty if the run is not known."""
    if not records.config:
        return ""
    lines = ["## Results", ""]
    if records.result:
        sparsity = records.result.get("sparsity") or {}
        facts = {
            "loss of the last step": records.result.get("loss"),
            "zeros in the targets, final": _percent(sparsity.get("final")),
            "layers off their number of zeros": sparsity.get("layers_off_target"),
            "evolutions": records.result.get("evolutions"),
            "positions reactivated": records.result.get("reactivated"),
            "seconds of training": records.result.get("seconds"),
        }
        lines += [_table(["", ""], [[name, str(value)] for name, value in facts.items() if value is not None]), ""]
    else:
        lines += ["The run is not finished, or its result.json is missing.", ""]
    models = records.evaluation.get("models") or {}
    if not models:
        return "\n".join([*lines, "No evaluation was recorded."])
    measured = {name: _numbers(entry) for name, entry in models.items() if isinstance(entry, dict)}
    names = list({key: None for numbers in measured.values() for key in numbers})
    rows = [[name, *(numbers.get(key, "-") for key in names)] for name, numbers in measured.items()]
    text = _public_data(records.evaluation.get("data") or {})
    where = f"Measured by seft evaluate{f' on {text}' if text else ''}:"
    return "\n".join([*lines, where, "", _table(["model", *names], rows)])


def _numbers(entry: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten the numbers of an evaluation, those of tasks under the task's name, without those of single layers."""
    numbers: dict[str, str] = {}
    for key, value in entry.items():
        if isinstance(value, dict) and key != "layers":
            numbers |= _numbers(value, f"{prefix}{'' if key == 'tasks' else key + ' '}")
        elif isinstance(value, bool) or not isinstance(value, int | float):
            continue
        elif key == "sparsity":
            numbers[f"{prefix}zeros"] = f"{100 * value:.2f} %"
        else:
            numbers[prefix + key.replace("_", " ")] = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return numbers


def _use(folder: Path, title: str) -> str:
    if (folder / "packed.safetensors.index.json").is_file():
        code = f'from seft_dist.export.export import load_packed\n\nmodel = load_packed("{title}")'
    else:
        code = (
            f'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("{title}")'
        )
    return f"## Use\n\n```python\n{code}\n```"


def _table(head: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *(line(row) for row in rows)])


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.4g} %"


def _own_version() -> str:
    try:
        return version("seft_dist")
    except PackageNotFoundError:
        return "(not installed)"
