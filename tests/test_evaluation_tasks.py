"""Tasks of lm-evaluation-harness against answers chosen by hand-made log-likelihoods, in one process and on shards."""

import functools
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from seft_dist.config import EvaluateConfig
from seft_dist.evaluation.evaluation import Evaluation, evaluate, task_table
from seft_dist.session.distributed import Ranks
from tests.models import prune_, tiny_llama
from tests.ranks import run_ranks
from tests.test_evaluation import run_evaluate
from tests.texts import VOCAB, dense_folder, fast_tokenizer, texts, write_jsonl

pytest.importorskip("lm_eval", reason='needs the extra "eval"')

from seft_dist.evaluation.tasks import load_tasks  # noqa: E402  # imports lm_eval

SCIENCE = {
    "task": "science",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "{{choices.label.index(answerKey)}}",
    "doc_to_choice": "{{choices.text}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
SUMS = {
    "task": "sums",
    "dataset_path": "json",
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n\n"], "do_sample": False, "max_gen_toks": 6},
    "metric_list": [{"metric": "exact_match"}],
}


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("datasets")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder))
        patch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
        yield folder


def science(count: int = 13) -> list[dict[str, Any]]:
    """Records as ARC has them: a question, three to five choices of several lengths, the letter of the right one."""
    records = []
    for number in range(count):
        words = " ".join(texts()).split()[100 * number : 100 * number + 100]
        choices = [" ".join(words[10 * c : 10 * c + 1 + (number + 2 * c) % 4]) for c in range(3 + number % 3)]
        labels = "ABCDE"[: len(choices)]
        question = {"question": " ".join(words[60:70]), "choices": {"text": choices, "label": list(labels)}}
        records.append(question | {"id": f"q{number}", "answerKey": labels[number % len(labels)]})
    return records


def write_task(folder: Path, description: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """A task's description and its records; JSON is YAML."""
    file = write_jsonl(folder / f"{description['task']}.jsonl", records)
    kwargs = {"data_files": {"test": str(file)}}
    (folder / f"{description['task']}.yaml").write_text(json.dumps(description | {"dataset_kwargs": kwargs}))


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense and a pruned model, and a folder with two tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    dense_folder(folder / "dense", max_position_embeddings=512)
    prune_(model := tiny_llama(seed=3, vocab_size=VOCAB, max_position_embeddings=512), 0.5)
    model.save_pretrained(folder / "pruned")
    fast_tokenizer(folder / "pruned")
    (folder / "descriptions").mkdir()
    write_task(folder / "descriptions", SCIENCE, science())
    model = AutoModelForCausalLM.from_pretrained(folder / "dense")
    sums = [{"question": text[:30], "answer": continued(model, folder / "dense", text[:30])} for text in texts()[:7]]
    write_task(folder / "descriptions", SUMS, [s | {"answer": "?"} if i % 3 == 0 else s for i, s in enumerate(sums)])
    return folder


def continued(model: Any, folder: Path, text: str) -> str:
    """Six tokens, the likeliest each time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text)["input_ids"]
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[-6:], skip_special_tokens=True)


@functools.cache
def loaded(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder).double(), AutoTokenizer.from_pretrained(folder)


def chosen(folder: Path, context: str, choices: list[str]) -> tuple[int, int]:
    """Numbers of the likeliest choice: as a whole, and for each of its characters; one token at a time, in float64."""
    model, tokenizer = loaded(folder)
    totals = []
    for choice in choices:
        before, ids = len(tokenizer(context)["input_ids"]), tokenizer(f"{context} {choice}")["input_ids"]
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        totals.append(sum(float(scores[place - 1, ids[place]]) for place in range(before, len(ids))))
    each = [total / len(choice) for total, choice in zip(totals, choices, strict=True)]
    return totals.index(max(totals)), each.index(max(each))


def accuracy(folder: Path, records: list[dict[str, Any]]) -> tuple[float, float]:
    """Shares of the records answered rightly in the two ways."""
    right = [0, 0]
    for record in records:
        numbers = chosen(folder, f"Question: {record['question']}\nAnswer:", record["choices"]["text"])
        for way, number in enumerate(numbers):
            right[way] += record["choices"]["label"][number] == record["answerKey"]
    return right[0] / len(records), right[1] / len(records)


def settings(top: Path, **over: Any) -> EvaluateConfig:
    models = {name: str(top / name) for name in ("dense", "pruned")}
    values: dict[str, Any] = {
        "models": models,
        "tasks": "science",
        "tasks_path": str(top / "descriptions"),
        "batch_size": 3,
    }
    return EvaluateConfig(**(values | over))


def test_multiple_choice_is_what_the_likelihoods_say(top: Path, tmp_path: Path) -> None:
    results = evaluate(settings(top, output=str(tmp_path / "out.json")), show=False)
    found = [entry.tasks["science"] for entry in results]
    for name, metrics in zip(("dense", "pruned"), found, strict=True):
        expected = accuracy(top / name, science())
        assert (metrics["acc"], metrics["acc_norm"]) == pytest.approx(expected)
        error = (expected[0] * (1 - expected[0]) / 12) ** 0.5  # of a mean of 13, its variance estimated
        assert metrics["acc_stderr"] == pytest.approx(error) and metrics["samples"] == 13
    assert len({metrics[key] for metrics in found for key in ("acc", "acc_norm")}) > 1  # else nothing was compared
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["data"] is None and written["versions"]["lm_eval"]
    assert written["models"]["pruned"]["tasks"]["science"]["acc"] == found[1]["acc"]
    assert "perplexity" not in written["models"]["pruned"]
    cell = next(iter(task_table(results).columns[3].cells))
    assert cell == f"{found[0]['acc']:.4f} ± {found[0]['acc_stderr']:.4f}"


def test_generation_is_greedy_decoding(top: Path) -> None:
    (entry,) = evaluate(settings(top, models={"a": str(top / "dense")}, tasks="sums"), show=False)
    assert entry.tasks["sums"]["exact_match"] == pytest.approx(4 / 7)


def test_limit_and_fewshot(top: Path) -> None:
    (entry,) = evaluate(settings(top, models={"a": str(top / "dense")}, limit=5), show=False)
    assert entry.tasks["science"]["samples"] == 5
    assert entry.tasks["science"]["acc"] == pytest.approx(accuracy(top / "dense", science()[:5])[0])
    file = str(write_jsonl(top / "descriptions" / "two.jsonl", science(2)))
    config = settings(top, models={"a": str(top / "dense")}, task_files={"science": file}, fewshot=1)
    (entry,) = evaluate(config, show=False)
    assert entry.tasks["science"]["samples"] == 2
    right = 0
    for record, other in (science(2), science(2)[::-1]):  # of two questions the example is always the other one
        solved = other["choices"]["text"][other["choices"]["label"].index(other["answerKey"])]
        context = f"Question: {other['question']}\nAnswer: {solved}\n\nQuestion: {record['question']}\nAnswer:"
        number = chosen(top / "dense", context, record["choices"]["text"])[0]
        right += record["choices"]["label"][number] == record["answerKey"]
    assert entry.tasks["science"]["acc"] == right / 2


@pytest.mark.parametrize("world_size", [2, 3])
def test_sharded_over_ranks_it_is_the_result_of_one_process(top: Path, world_size: int) -> None:
    config = settings(top, tasks="science,sums")

    def work(rank: int, size: int) -> list[Evaluation]:
        return evaluate(config, ranks=Ranks(rank=rank, local_rank=rank, world_size=size), show=False)

    (alone,) = run_ranks(work, 1)
    for entries in run_ranks(work, world_size):
        assert [entry.tasks for entry in entries] == [entry.tasks for entry in alone]
        assert entries[0].tasks.keys() == {"science", "sums"} and len(entries) == 2


def test_tasks_that_cannot_be_had(top: Path, tmp_path: Path) -> None:
    for over, words in (
        ({"tasks": "sciense"}, "lm_eval knows no sciense; near it: science"),
        ({"tasks_path": str(tmp_path / "none")}, "tasks_path=.*none is no folder"),
        ({"task_files": {"science": str(tmp_path / "none.json")}}, "task_files.science=.* is no file that can be read"),
    ):
        with pytest.raises(ValueError, match=words):
            load_tasks(settings(top, **over))
    (tmp_path / "far.yaml").write_text(json.dumps(SCIENCE | {"task": "far", "dataset_path": "somebody/something"}))
    with pytest.raises(ValueError, match="task far: its records cannot be had .* --task_files.far FILE"):
        load_tasks(settings(top, tasks="far", tasks_path=str(tmp_path)))
    (tmp_path / "odd.jsonl").write_text('{"text": "no question"}\n')
    with pytest.raises(ValueError, match="task science cannot use the records of .*odd.jsonl .*: needs the columns"):
        load_tasks(settings(top, tasks="science", task_files={"science": str(tmp_path / "odd.jsonl")}))


@pytest.mark.slow
@pytest.mark.long
def test_the_command_gives_a_task_of_lm_eval_records_from_a_file(top: Path, tmp_path: Path, cache: Path) -> None:
    records = write_jsonl(tmp_path / "arc.jsonl", science())
    yes = [{"passage": t[:40], "question": t[40:70], "label": i % 2, "idx": i} for i, t in enumerate(texts()[:5])]
    files = [f"--task_files.arc_easy={records}", f"--task_files.boolq={write_jsonl(tmp_path / 'b.jsonl', yes)}"]
    model = f"--models.dense={top / 'dense'}"
    output = tmp_path / "out.json"
    done = run_evaluate(model, "--tasks=arc_easy,boolq", *files, f"--output={output}", cache=cache, ranks=2)
    assert done.returncode == 0, done.stderr
    tasks = json.loads(output.read_text())["models"]["dense"]["tasks"]
    assert (tasks["arc_easy"]["acc"], tasks["arc_easy"]["acc_norm"]) == pytest.approx(
        accuracy(top / "dense", science())
    )
    right = 0
    for record in yes:
        number = chosen(top / "dense", f"{record['passage']}\nQuestion: {record['question']}?\nAnswer:", ["no", "yes"])[
            0
        ]
        right += number == record["label"]
    assert tasks["boolq"]["acc"] == right / 5
    assert f"{tasks['boolq']['acc']:.4f}" in done.stdout and "boolq" in done.stdout


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ question.__class__.__mro__ }}", "reaches for more than its record"),
        ("{{ cycler.__init__.__globals__.os.getcwd() }}", "reaches for more than its record"),
        ("{{ nothing_like_this }}", "cannot be"),
    ],
)
def test_templates_reach_their_record_only(template: str, message: str, top: Path, tmp_path: Path) -> None:
    write_task(tmp_path, {**SCIENCE, "doc_to_text": template}, science(3))
    config = EvaluateConfig(models={"dense": str(top / "dense")}, tasks="science", tasks_path=str(tmp_path), limit=1)
    with pytest.raises(ValueError, match=message):
        evaluate(config, show=False)


def test_a_description_whose_aliases_multiply(top: Path, tmp_path: Path) -> None:
    lines = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    lines += [f"{n}: &{n} [{','.join([f'*{m}'] * 9)}]" for m, n in zip("abcdefgh", "bcdefghi", strict=True)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    config = EvaluateConfig(models={"dense": str(top / "dense")}, tasks="science", tasks_path=str(tmp_path))
    with pytest.raises(ValueError, match="bomb.yaml stands for"):
        load_tasks(config, show=False)
