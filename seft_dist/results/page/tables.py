"""Tables of a page: the runs side by side, settings that differ, scores of tasks, and where and with what a run ran."""

from collections.abc import Sequence
from typing import Any

import yaml

from seft_dist.results.page.record import VALIDATION, RunRecord, number, whole
from seft_dist.results.page.story import perplexities, state_of
from seft_dist.results.page.svg import Table
from seft_dist.results.page.words import decimal, duration, percent, size
from seft_dist.results.run_files import flatten_options


def overview(runs: Sequence[RunRecord]) -> Table:
    """Put the results of several runs side by side, one row for each number."""
    columns = [_results(run) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [[name, *(column.get(name, "-") for column in columns)] for name in names]
    return Table(["", *(run.label for run in runs)], rows)


def _results(run: RunRecord) -> dict[str, str]:
    values = {"state": state_of(run), "method": run.method}
    values |= {f"perplexity, {name}": decimal(value) for name, value in perplexities(run).items()}
    _, losses = run.series("loss")
    _, validation = run.series(VALIDATION)
    values |= {"training loss, last": decimal(losses[-1], 4)} if losses else {}
    values |= {"validation loss, best": decimal(min(validation), 4)} if validation else {}
    sparsity: Any = run.result.get("sparsity")
    if isinstance(sparsity, dict):
        values["zeros"] = percent(number(sparsity, "final"), 3)
        values["targets with another number of zeros"] = str(sparsity.get("layers_off_target"))
    if run.evolutions:
        values["reactivated positions"] = f"{sum(whole(e, 'reactivated') or 0 for e in run.evolutions):,}"
    seconds = number(run.result, "seconds") or (number(run.lines[-1], "seconds") if run.lines else None)
    values["time"] = duration(seconds)
    values["peak memory"] = size(whole(run.result, "peak_memory_bytes"))
    return values


def differences(runs: Sequence[RunRecord]) -> Table:
    """Tabulate the settings in which runs differ, one column for each run.

    A group that a run lacks, as ``eval.data`` of a run without validation, is one row with its path: each of its
    options would be one more row, most of them defaults. They have rows only where runs that have them differ.
    """
    settings = [flatten_options(run.config) for run in runs]
    names = list(dict.fromkeys(name for options in settings for name in options))
    rows = []
    for name in names:
        inside = f"{name}."
        if any(other.startswith(inside) for other in names):
            values = [
                options.get(f"{name}.path", "given") if any(key.startswith(inside) for key in options) else "-"
                for options in settings
            ]
        else:
            is_grouped = any(name.startswith(f"{other}.") for other in names)
            given = [options.get(name) for options in settings]
            values = ["-" if value is None else value for value in given]
            if is_grouped and len({value for value in given if value is not None}) == 1:
                continue
        if len(set(values)) > 1:
            rows.append([name, *values])
    return Table(["setting", *(run.label for run in runs)], rows)


def tasks(runs: Sequence[RunRecord]) -> Table:
    """Tabulate the scores of benchmark tasks in eval.json."""
    rows = []
    for run in runs:
        models = run.evaluations["models"] if run.evaluations else {}
        for model, entry in models.items():
            for task, scores in entry.get("tasks", {}).items():
                rows += [[run.label, model, task, score, decimal(float(value), 4)] for score, value in scores.items()]
    return Table(["run", "model", "task", "score", "value"], rows)


def attempts(run: RunRecord) -> Table:
    """Tabulate the attempts of a run's manifest."""
    rows = []
    for attempt in run.attempts:
        layout, code = (found if isinstance(found, dict) else {} for found in map(attempt.get, ("layout", "code")))
        hosts = [host for host in attempt.get("hosts") or [] if isinstance(host, dict)]
        where = ", ".join(f"{host.get('host')}: {host.get('ranks')} x {host.get('device')}" for host in hosts[:8])
        commit = str(code.get("commit") or "-")[:12] + (" with changes" if code.get("dirty") else "")
        ranks = f"{layout.get('world_size')} x {layout.get('backend')}"
        rows.append(
            [str(attempt.get("first_step")), str(attempt.get("started")), str(attempt.get("finished") or "-"), ranks]
            + [where, commit]
        )
    return Table(["first step", "started", "finished", "layout", "hosts", "code"], rows)


def versions(run: RunRecord) -> Table:
    """Tabulate the versions that the last attempt ran with, and the fingerprints of what it used."""
    found: Any = run.attempts[-1].get("versions") if run.attempts else None
    rows = [[str(name), str(value)] for name, value in found.items() if value] if isinstance(found, dict) else []
    data: Any = run.manifest.get("data")
    prints = {"pruned model": run.manifest.get("model")}
    prints |= {kind: run.manifest.get(kind) for kind in ("teacher", "parent")}
    prints["training data"] = data.get("fingerprint") if isinstance(data, dict) else None
    rows += [[f"fingerprint of the {name}", str(value)] for name, value in prints.items() if value]
    return Table(["", ""], rows)


def command_of(run: RunRecord) -> str:
    """Return the command line of the last attempt, or nothing."""
    return str(run.attempts[-1].get("command") or "") if run.attempts else ""


def configuration(run: RunRecord) -> str:
    """Return the configuration as YAML."""
    return yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, width=100) if run.config else ""
