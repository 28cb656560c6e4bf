"""Tasks of lm-evaluation-harness (the extra ``eval``), run on a model in this process, whole or sharded over ranks.

lm_eval is imported only here. It runs on every rank as if there were only that one; only the calls of the model are
distributed. So every kind of sharding works, and scores, few-shot examples and bootstrap are lm_eval's own. Templates
of tasks are rendered in jinja2's sandbox. But the description of a task may also name Python functions, which are
executed: use only descriptions that you trust.
"""

import contextlib
import difflib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lm_eval  # type: ignore[import-untyped,import-not-found,unused-ignore]
import lm_eval.utils  # type: ignore[import-untyped,import-not-found,unused-ignore]
import yaml
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.sandbox import SandboxedEnvironment
from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped,import-not-found,unused-ignore]
from lm_eval.tasks import TaskManager  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor
from transformers import set_seed

from seft_dist.backends.group import Group
from seft_dist.config import EvaluateConfig
from seft_dist.data.data_files import BUILDERS
from seft_dist.data.records import cause_of
from seft_dist.files.reading import check_yaml, read_text
from seft_dist.io.library_types import PreTrainedModel, PreTrainedTokenizerBase

Metrics = dict[str, float]

SEED = 1234
"""Seed for drawing few-shot examples, and for sampling if a task needs it; the default of lm_eval."""


class RankedLM(HFLM):  # type: ignore[misc]  # lm_eval has no types
    """lm_eval's adapter for transformers models, with its requests distributed over the ranks of a group.

    Each rank submits the same requests and gets all answers, so lm_eval can run as in one process. Every method is
    **collective**.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, group: Group
    ) -> None:
        """Args:
        model: A causal LM, whole or sharded over the group. Of a sharded one, a rank never holds more than its shard
            and a layer.
        tokenizer: The model's tokenizer.
        batch_size: Number of requests of a rank in one forward pass.
        group: Ranks that share the work.
        """
        self._group = group
        noisy = logging.getLogger("lm_eval.models.huggingface")
        level = noisy.level
        noisy.setLevel(logging.ERROR)  # hides the warning that accelerate cannot distribute a model that is loaded
        try:
            # With the cache of logits, ranks could need different numbers of forward passes for equally many requests.
            # Ranks that gather shards together must run the same number.
            super().__init__(
                model,
                backend="causal",
                tokenizer=tokenizer,
                batch_size=batch_size,
                softmax_dtype="float32",
                logits_cache=group.size == 1,
            )
        finally:
            noisy.setLevel(level)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Any]:
        """Score continuations, each rank its share of the requests. Collective."""
        quiet = disable_tqdm or self._group.rank > 0
        ask = super()._loglikelihood_tokens
        return self._distribute(requests, lambda own: ask(own, disable_tqdm=quiet, override_bs=override_bs))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate a continuation for each request; requests with equal settings are run together. Collective."""
        quiet = disable_tqdm or self._group.rank > 0
        ask = super().generate_until
        kinds: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            kinds.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        answers = [""] * len(requests)
        # lm_eval runs a separate pass for each combination of settings, and all ranks need the same number of passes
        for numbers in kinds.values():
            own_kind = [requests[number] for number in numbers]
            generated = self._distribute(own_kind, lambda own: ask(own, disable_tqdm=quiet))
            for number, answer in zip(numbers, generated, strict=True):
                answers[number] = answer
        return answers

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        if self._group.size > 1:
            settings["synced_gpus"] = True  # a rank whose texts are finished continues until those of all ranks are
        generated: Tensor = super()._model_generate(context, max_length, stop, **settings)
        return generated

    def _distribute(self, requests: list[Any], ask: Callable[[list[Any]], list[Any]]) -> list[Any]:
        """Answer each request on one rank, equally many on every rank, and gather the answers. Collective."""
        size = self._group.size
        if size == 1 or not requests:
            return ask(requests)
        filled = requests + [requests[-1]] * (-len(requests) % size)
        answers = self._group.gather_objects(ask(filled[self._group.rank :: size]))
        return [answers[number % size][number // size] for number in range(len(requests))]


def load_tasks(config: EvaluateConfig, *, show: bool = True) -> Any:
    """Load the tasks and their records.

    Args:
        config: The evaluation, with its tasks, task_files and tasks_path.
        show: Let lm_eval write to stderr.

    Returns:
        lm_eval's dictionary of tasks and groups, for ``run_tasks``; it can be used for any number of models.

    Raises:
        ValueError: There is no such task or file, or the records cannot be loaded.
    """
    names = [name.strip() for name in (config.tasks or "").split(",")]
    with tempfile.TemporaryDirectory() as folder, _quiet(not show), _sandbox():
        manager = _task_manager(config, names)
        chosen: list[Any] = []
        for name in names:
            if name not in manager.task_index:
                near = difflib.get_close_matches(name, manager.all_tasks, 3)
                hint = f"; near it: {', '.join(near)}" if near else ""
                raise ValueError(f"tasks: lm_eval knows no {name}{hint}. Needs a name of its list, or of tasks_path")
            file = config.task_files.get(name)
            spec = name if file is None else _describe_file_task(manager, name, file, Path(folder))
            try:
                loaded = manager.load([spec])
            except SecurityError as error:
                raise ValueError(_unsafe(error)) from error
            except Exception as error:  # from the datasets library, the hub's client, or the task's own code
                raise ValueError(_no_records(name, file, cause_of(error))) from error
            groups = loaded["groups"]  # a group contains its member tasks
            chosen += [groups[name]] if name in groups else list(loaded["tasks"].values())
        return manager.load(chosen)


def _no_records(name: str, file: str | None, why: str) -> str:
    if file is not None:
        return f"task {name} cannot use the records of {file} ({why}): needs the columns of the task's data set"
    return (
        f"task {name}: its records cannot be had ({why}): give a file of them with --task_files.{name} FILE, or fill "
        "the cache of the hub where there is a network"
    )


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Any,
    config: EvaluateConfig,
    *,
    group: Group | None = None,
    show: bool = True,
) -> dict[str, Metrics]:
    """Run tasks on a model. Collective over ``group``.

    Args:
        model: A causal LM, whole or sharded over ``group``.
        tokenizer: The model's tokenizer.
        tasks: The tasks, from ``load_tasks``.
        config: The evaluation, with its batch_size, fewshot, limit and chat_template.
        group: Ranks that share the work. None: this process alone.
        show: Show lm_eval's progress bars (on the group's first rank).

    Returns:
        Metrics of each task or group under lm_eval's names ("acc", "acc_stderr", with filters behind a comma), and
        "samples", the number of questions. The same on every rank.

    Raises:
        ValueError: A template of a task cannot be rendered safely.
    """
    group = group or Group(None)
    training = model.training
    for task in tasks["tasks"].values():
        own = task.get_config("num_fewshot")
        # As in lm_eval, a 0 in the description of a task overrides the number that the user asks for
        if own is None or (config.fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=config.fewshot or 0)
        task.set_fewshot_seed(seed=SEED)
    set_seed(SEED)
    try:
        with _quiet(not show or group.rank > 0), _sandbox():
            outcome = lm_eval.evaluate(
                lm=RankedLM(model, tokenizer, config.batch_size, group),
                task_dict=tasks,
                limit=config.limit,
                apply_chat_template=config.chat_template,
                fewshot_as_multiturn=config.chat_template,
                log_samples=False,
            )
    except SecurityError as error:
        raise ValueError(_unsafe(error)) from error
    except TemplateError as error:
        raise ValueError(f"a template of the tasks {config.tasks} cannot be rendered: {error}") from error
    model.train(training)
    return _metrics(outcome)


@contextlib.contextmanager
def _sandbox() -> Iterator[None]:
    """Render the templates of tasks in jinja2's sandbox. In lm_eval's own environment they could call any function."""
    own = lm_eval.utils.env
    safe = SandboxedEnvironment(
        loader=own.loader, undefined=own.undefined, keep_trailing_newline=own.keep_trailing_newline
    )
    safe.filters.update(own.filters)
    lm_eval.utils.env = safe
    try:
        yield
    finally:
        lm_eval.utils.env = own


def _unsafe(error: SecurityError) -> str:
    return (
        f"a template of a task reaches for more than its record ({error}): needs one that only reads the record's "
        "columns"
    )


@contextlib.contextmanager
def _quiet(on: bool) -> Iterator[None]:
    """Discard stderr if ``on``. lm_eval does not know of other ranks, so every rank would draw the same bars."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere if on else sys.stderr):
        yield


def _metrics(outcome: Any) -> dict[str, Metrics]:
    """Extract the numbers from lm_eval's result, with the number of questions."""
    metrics: dict[str, Metrics] = {}
    for name, values in outcome["results"].items():
        numbers = {
            key.removesuffix(",none"): float(value)
            for key, value in values.items()
            if isinstance(value, (int, float)) and key != "sample_len"
        }
        counts = outcome.get("n-samples", {}).get(name)
        metrics[name] = numbers | ({"samples": counts["effective"]} if counts else {})
    return metrics


def _task_manager(config: EvaluateConfig, names: list[str]) -> Any:
    """Build lm_eval's index of tasks. Its own tasks are indexed only if they are needed, which takes seconds."""
    if config.tasks_path is not None:
        folder = Path(config.tasks_path).expanduser()
        if not folder.is_dir():
            raise ValueError(f"tasks_path={config.tasks_path} is no folder: needs one with .yaml files of tasks")
        for file in (*folder.rglob("*.yaml"), *folder.rglob("*.yml")):
            text = read_text(file) if file.is_file() else ""
            if "*" in text:
                _check_aliases(text, str(file))
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=config.tasks_path)


def _check_aliases(text: str, name: str) -> None:
    try:
        check_yaml(text, name)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is no YAML: {' '.join(str(error).split())}") from error


def _describe_file_task(manager: Any, name: str, file: str, folder: Path) -> str:
    """Write the description of a task of lm_eval with records from a local file.

    Args:
        manager: lm_eval's index of tasks.
        name: Name of the task.
        file: File with the records.
        folder: Folder for the description.

    Returns:
        Path of the description, which lm_eval accepts in place of a name.
    """
    path, entry = Path(file).expanduser().resolve(), manager.task_index[name]
    if name not in manager.all_subtasks or entry.yaml_path is None:
        raise ValueError(f"task_files.{name}: {name} is a group of tasks: give each of its tasks a file")
    if not path.is_file() or BUILDERS.get(path.suffix) not in ("json", "parquet"):
        raise ValueError(f"task_files.{name}={file} is no file that can be read: needs a .json, .jsonl or .parquet")
    text = {
        "include": str(entry.yaml_path),
        "dataset_path": BUILDERS[path.suffix],
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "validation_split": None,
        "training_split": None,
        "fewshot_split": "test",
    }
    description = folder / f"{name}.yaml"
    description.write_text(json.dumps(text), encoding="utf-8")  # JSON is YAML
    return str(description)
