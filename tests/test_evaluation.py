"""Perplexity against its definition, reports, and the command as users type it."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from seft_dist.config import DataConfig, EvaluateConfig
from seft_dist.data.load import load_sequences
from seft_dist.data.sequences import IGNORE
from seft_dist.evaluation.evaluation import Evaluation, evaluate
from seft_dist.evaluation.perplexity import (
    SlidingWindows,
    limit_tokens,
    perplexity,
    plan_passes,
)
from seft_dist.io.tables import sparsity_table
from seft_dist.modules.targets import find_targets
from seft_dist.results.run_files import read_evaluations
from seft_dist.session.distributed import Ranks
from seft_dist.sparsity.zeros import ZeroCount, count_zeros, total_sparsity
from tests.models import prune_, tiny_llama
from tests.ranks import run_ranks
from tests.scripts import run_script
from tests.texts import VOCAB, dense_folder, fast_tokenizer, sentencepiece_tokenizer, text_jsonl, texts, write_jsonl

ROOT = Path(__file__).resolve().parents[1]


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A dense model, the same pruned, and a text."""
    top = tmp_path_factory.mktemp("models")
    dense_folder(top / "dense")
    model = tiny_llama(vocab_size=VOCAB, max_position_embeddings=128)
    prune_(model, 0.5)
    model.save_pretrained(top / "pruned")
    fast_tokenizer(top / "pruned")
    text_jsonl(top / "text.jsonl")
    return {name: str(top / name) for name in ("dense", "pruned", "text.jsonl")}


def ragged(count: int = 7) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Sequences of several lengths, some labels masked."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for number in range(count):
        ids = torch.randint(128, (5 + 3 * number,), generator=generator)
        samples.append((ids, ids.masked_fill(torch.rand(len(ids), generator=generator) < 0.4, IGNORE)))
    return samples


def reference(model: Any, samples: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, int]:
    """Mean negative log-likelihood by its definition, one sequence and one token at a time, in float64."""
    losses = []
    with torch.no_grad():
        for ids, labels in samples:
            scores = model(ids[None]).logits[0].double().log_softmax(dim=-1)
            losses += [-float(scores[i - 1, t]) for i, t in enumerate(labels.tolist()) if i > 0 and t != IGNORE]
    return math.fsum(losses) / len(losses), len(losses)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_perplexity_weighs_every_token_the_same(batch_size: int) -> None:
    model, samples = tiny_llama().eval(), ragged()
    loss, count = reference(model, samples)
    result = perplexity(model, samples, batch_size)
    assert result.num_tokens == count
    assert result.loss == pytest.approx(loss, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-6)


def sliding(model: Any, stream: list[int], window: int, stride: int) -> tuple[float, int]:
    """The usual loop over windows, one token's logarithm at a time, in float64."""
    losses, scored_up_to = [], 1
    for begin in range(0, len(stream), stride):
        end = min(begin + window, len(stream))
        with torch.no_grad():
            scores = model(torch.tensor([stream[begin:end]])).logits[0].double().log_softmax(dim=-1)
        losses += [-float(scores[i - 1 - begin, stream[i]]) for i in range(scored_up_to, end)]
        scored_up_to = end
        if end == len(stream):
            break
    return math.fsum(losses) / len(losses), len(losses)


SHAPES = [(2, 16, 8), (10, 16, 8), (16, 16, 8), (17, 16, 15), (40, 16, 4), (41, 16, 15), (60, 16, 7), (23, 8, 1)]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(("tokens", "window", "stride"), SHAPES)
def test_sliding_windows_are_the_usual_loop(tokens: int, window: int, stride: int, batch_size: int) -> None:
    model = tiny_llama().eval()
    stream = torch.randint(128, (tokens,), generator=torch.Generator().manual_seed(tokens))
    windows = SlidingWindows(stream, window, stride)
    masks: list[Any] = []
    hook = lambda _, __, given: masks.append(given["attention_mask"])  # noqa: E731
    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    result = perplexity(model, windows, batch_size)
    handle.remove()
    assert all(bool(mask.all()) for mask in masks), "padded"
    assert sum(len(mask) for mask in masks) == len(windows)
    loss, count = sliding(model, stream.tolist(), window, stride)
    assert result.num_tokens == count == tokens - 1
    assert result.loss == pytest.approx(loss, rel=1e-6)


def test_sliding_windows_score_each_token_once_with_the_context_promised() -> None:
    for tokens, window, stride in SHAPES:
        seen = [0] * tokens
        windows = SlidingWindows(torch.arange(tokens), window, stride)
        for number, (ids, labels) in enumerate(windows):
            assert len(ids) == window or number == len(windows) - 1
            for place, label in enumerate(labels.tolist()[1:], start=1):
                if label != IGNORE:
                    assert label == ids[place] and place >= min(label, window - stride)
                    seen[label] += 1
        assert seen == [0] + [1] * (tokens - 1)


def test_passes_take_each_sequence_once_and_the_longest_first() -> None:
    lengths = [3, 9, 3, 9, 4, 9]
    assert plan_passes(lengths, 2, pad=True) == [[1, 3], [5, 4], [0, 2]]
    assert plan_passes(lengths, 2, pad=False) == [[1, 3], [5], [4], [0, 2]]


def test_perplexity_leaves_the_model_as_it_was() -> None:
    model = tiny_llama(attention_dropout=0.5).train()
    first = perplexity(model, ragged(), 3)
    assert model.training
    assert first == perplexity(model, ragged(), 3)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_perplexity_of_bfloat16_is_summed_in_fp32() -> None:
    model = tiny_llama(dtype=torch.bfloat16).eval()
    assert perplexity(model, ragged()).loss == pytest.approx(reference(model, ragged())[0], rel=2e-3)


def test_perplexity_errors() -> None:
    model = tiny_llama()
    ids = torch.tensor([1, 2, 3])
    with pytest.raises(ValueError, match="none of 1 sequences has a token to score"):
        perplexity(model, [(ids, torch.tensor([1, IGNORE, IGNORE]))])
    with pytest.raises(ValueError, match="token number 500, but the model has 128 embeddings"):
        perplexity(model, [(ids + 497, ids)])
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    broken = perplexity(model, [(ids, ids)])
    assert broken.perplexity == broken.loss == math.inf
    assert model.training


def test_limit_tokens() -> None:
    samples = ragged()  # 5, 8, 11, ... tokens
    assert limit_tokens(samples, None) is samples
    assert [len(limit_tokens(samples, limit)) for limit in (5, 12, 13, 24, 10**6)] == [1, 1, 2, 3, 7]
    with pytest.raises(ValueError, match="the first sequence has 5 tokens, more than max_tokens"):
        limit_tokens(samples, 4)


def test_zero_counts_and_their_table() -> None:
    targets = find_targets(prune_(tiny_llama(num_hidden_layers=12), 0.5, "q_proj|down_proj"))
    counts = count_zeros((name, target.weight) for name, target in targets.items())
    assert len(counts) == 12 * 7
    assert {count.sparsity for count in counts if "q_proj" in count.name} == {0.5}
    assert total_sparsity(counts) == pytest.approx((0.5 * 1024 + 0.5 * 1536) / (2 * 1024 + 2 * 512 + 3 * 1536))
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(sparsity_table({"ours": counts, "theirs": [ZeroCount("model.layers.3.mlp.up_proj", 10, 4)]}, "title"))
    lines = console.export_text().splitlines()
    row = next(line for line in lines if "q_proj" in line)
    assert "self_attn.q_proj (12 x)" in row and "12,288" in row and "50.00 %" in row and " - " in row
    assert len(lines) < 16
    assert "16.67 % (0.00 to 50.00)" in next(line for line in lines if " all " in line)


def test_evaluate_compares_models_and_writes_json(folders: dict[str, str], tmp_path: Path) -> None:
    config = EvaluateConfig(
        models={"dense": folders["dense"], "pruned": folders["pruned"]},
        data=DataConfig(path=folders["text.jsonl"], seq_len=64),
        max_tokens=1000,
        output=str(tmp_path / "deep" / "result.json"),
    )
    results = evaluate(config, show=False)
    assert [entry.result and entry.result.num_tokens for entry in results] == [15 * 63, 15 * 63]
    assert [total_sparsity(entry.zeros) for entry in results] == [0.0, 0.5]
    written = json.loads((tmp_path / "deep" / "result.json").read_text())
    assert list(written["models"]) == ["dense", "pruned"] and written["data"]["seq_len"] == 64
    pruned = written["models"]["pruned"]
    assert results[1].result and pruned["perplexity"] == results[1].result.perplexity
    assert (pruned["window"], pruned["stride"], pruned["tasks"]) == (64, None, {}) and pruned["seconds"] > 0
    assert written["world_size"] == 1 and written["versions"]["torch"] == torch.__version__
    assert written["settings"]["batch_size"] == 4
    assert pruned["perplexity"] > 1 and pruned["sparsity"] == 0.5
    assert pruned["layers"]["model.layers.1.mlp.down_proj"] == {"weights": 1536, "zeros": 768, "share": 0.5}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["result.json"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loss_that_is_not_finite_is_a_result(folders: dict[str, str], tmp_path: Path, world_size: int) -> None:
    model = tiny_llama(vocab_size=VOCAB, max_position_embeddings=128)
    model.get_submodule("model.norm").weight.data.fill_(math.nan)
    model.save_pretrained(tmp_path / "broken")
    fast_tokenizer(tmp_path / "broken")
    config = EvaluateConfig(
        models={"broken": str(tmp_path / "broken"), "dense": folders["dense"]},
        data=DataConfig(path=folders["text.jsonl"], seq_len=64),
        max_tokens=1000,
        output=str(tmp_path / "result.json"),
    )

    def work(rank: int, size: int) -> list[float | None]:
        entries = evaluate(config, ranks=Ranks(rank=rank, local_rank=rank, world_size=size), show=False)
        return [entry.result.perplexity if entry.result else None for entry in entries]

    for broken, dense in run_ranks(work, world_size):
        assert broken == math.inf and dense is not None and math.isfinite(dense)
    written = read_evaluations(tmp_path / "result.json")["models"]
    assert written["broken"]["perplexity"] == math.inf and written["broken"]["num_tokens"] == 15 * 63


def test_evaluate_with_a_sentencepiece_tokenizer(folders: dict[str, str], tmp_path: Path) -> None:
    tiny_llama(vocab_size=VOCAB, max_position_embeddings=128, dtype=torch.bfloat16).save_pretrained(tmp_path)
    sentencepiece_tokenizer(tmp_path)
    config = EvaluateConfig(models={"sp": str(tmp_path)}, data=DataConfig(path=folders["text.jsonl"], seq_len=64))
    (entry,) = evaluate(config, show=False)
    assert entry.result and entry.result.num_tokens % 63 == 0 and 1 < entry.result.perplexity < 10 * VOCAB


def stream_of(folder: str) -> list[int]:
    """Every document's tokens and one eos behind it, end to end."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [token for text in texts() for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]


def test_a_stride_makes_one_stream_of_all_documents_to_the_last_token(folders: dict[str, str]) -> None:
    data = DataConfig(path=folders["text.jsonl"], seq_len=64)
    stream = stream_of(folders["dense"])
    assert len(stream) % 64
    (entry,) = evaluate(EvaluateConfig(models={"a": folders["dense"]}, data=data, stride=48), show=False)
    loss, count = sliding(AutoModelForCausalLM.from_pretrained(folders["dense"]), stream, 64, 48)
    assert entry.result and entry.result.num_tokens == count == len(stream) - 1
    assert entry.result.loss == pytest.approx(loss, rel=1e-6)
    config = EvaluateConfig(models={"a": folders["dense"]}, data=data, stride=48, max_tokens=100)
    (entry,) = evaluate(config, show=False)
    assert entry.result and entry.result.num_tokens == 99


def answers(path: Path) -> DataConfig:
    """Instructions with answers of several lengths."""
    words = texts()[3].split()
    records = [
        {"instruction": " ".join(words[i : i + 6]), "output": " ".join(words[i + 6 : i + 9 + i % 5])} for i in range(11)
    ]
    return DataConfig(path=str(write_jsonl(path / "answers.jsonl", records)), seq_len=128)


def test_of_instructions_only_the_answers_count(folders: dict[str, str], tmp_path: Path) -> None:
    data = answers(tmp_path)
    (entry,) = evaluate(EvaluateConfig(models={"a": folders["dense"]}, data=data), show=False)
    samples = list(iter_samples(load_sequences(data, AutoTokenizer.from_pretrained(folders["dense"]), progress=False)))
    loss, count = reference(AutoModelForCausalLM.from_pretrained(folders["dense"]), samples)
    assert entry.result and entry.result.num_tokens == count < sum(len(ids) - 1 for ids, _ in samples)
    assert entry.result.loss == pytest.approx(loss, rel=1e-6)
    with pytest.raises(ValueError, match="stride=8, but .* holds instructions or chats"):
        evaluate(EvaluateConfig(models={"a": folders["dense"]}, data=data, stride=8), show=False)


def iter_samples(sequences: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return (sequences[index] for index in range(len(sequences)))


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.long), 3])
@pytest.mark.parametrize("kind", ["blocks", "windows", "answers"])
def test_sharded_over_ranks_it_is_the_result_of_one_process(
    folders: dict[str, str], tmp_path: Path, kind: str, world_size: int
) -> None:
    text = DataConfig(path=folders["text.jsonl"], seq_len=64, max_records=7)
    config = EvaluateConfig(
        models={name: folders[name] for name in ("dense", "pruned")},
        data=answers(tmp_path) if kind == "answers" else text,
        stride=40 if kind == "windows" else None,
        batch_size=3,
        output=str(tmp_path / "out.json"),
    )

    def work(rank: int, size: int) -> list[Evaluation]:
        return evaluate(config, ranks=Ranks(rank=rank, local_rank=rank, world_size=size), show=False)

    (alone,) = run_ranks(work, 1)
    every = run_ranks(work, world_size)
    assert json.loads((tmp_path / "out.json").read_text())["world_size"] == world_size
    for entries in every:
        assert [entry.result for entry in entries] == [entry.result for entry in alone]
        assert [entry.zeros for entry in entries] == [entry.zeros for entry in alone]
    assert total_sparsity(alone[1].zeros) == 0.5


def test_a_wrong_token_stops_every_rank(folders: dict[str, str], tmp_path: Path) -> None:
    tiny_llama(vocab_size=50, max_position_embeddings=128).save_pretrained(tmp_path)
    fast_tokenizer(tmp_path)
    config = EvaluateConfig(models={"small": str(tmp_path)}, data=DataConfig(path=folders["text.jsonl"], seq_len=64))

    def work(rank: int, size: int) -> str:
        with pytest.raises(ValueError, match="the model has 50 embeddings") as caught:
            evaluate(config, ranks=Ranks(rank=rank, local_rank=rank, world_size=size), show=False)
        return str(caught.value)

    assert len(set(run_ranks(work, 2))) == 1


def test_the_folder_of_a_run_is_no_model(folders: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    config = EvaluateConfig(models={"mine": str(tmp_path / "run")}, data=DataConfig(path=folders["text.jsonl"]))
    with pytest.raises(ValueError, match=r"models.mine=.* without an exported model: write it with seft export"):
        evaluate(config, show=False)
    dense_folder(tmp_path / "run" / "model")
    with pytest.raises(ValueError, match=r"is the folder of a run: needs its exported model, .*run/model"):
        evaluate(config, show=False)
    into_a_folder = EvaluateConfig(models=config.models, data=config.data, output=str(tmp_path))
    with pytest.raises(
        ValueError, match=r"output=.* is a folder: needs a JSON file"
    ):  # before hours of work, not after
        evaluate(into_a_folder, show=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "neither data nor tasks"),
        ({"stride": 64}, "stride=64 with data.seq_len=64"),
        ({"data": None, "stride": 8, "tasks": "a"}, "stride=8 without data"),
        ({"limit": 5}, "limit without tasks"),
        ({"tasks": "a,,b"}, "tasks='a,,b'"),
        ({"tasks": "a", "task_files": {"b": "x.json"}}, "task_files names b"),
        ({"tasks": "a", "fewshot": -1}, "fewshot=-1"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], words: str) -> None:
    data = {} if words.startswith("neither") else {"data": DataConfig(path="text.jsonl", seq_len=64)}
    with pytest.raises(ValueError, match=words):
        EvaluateConfig(**({"models": {"a": "b"}} | data | options))


def run_evaluate(*arguments: str, cache: Path, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    if ranks == 1:
        return run_script("launch/evaluate.py", *arguments)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *torchrun, str(ROOT / "launch" / "evaluate.py"), *arguments]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(cache), "COLUMNS": "100"}
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=280,
        env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def test_the_command_prints_tables(folders: dict[str, str], tmp_path: Path, cache: Path) -> None:
    models = [f"--models.{name}={folders[name]}" for name in ("dense", "pruned")]
    data = ["--data.path", folders["text.jsonl"], "--data.seq_len=64", "--max_tokens=640"]
    done = run_evaluate(*models, *data, f"--output={tmp_path / 'out.json'}", cache=cache)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())["models"]["pruned"]
    assert "Perplexity" in done.stdout and f"{result['perplexity']:.3f}" in done.stdout and "50.00 %" in done.stdout
    assert "Evaluating dense" in done.stderr


@pytest.mark.slow
def test_two_ranks_print_what_one_prints(folders: dict[str, str], tmp_path: Path, cache: Path) -> None:
    models = [f"--models.{name}={folders[name]}" for name in ("dense", "pruned")]
    data = ["--data.path", folders["text.jsonl"], "--data.seq_len=64", "--stride=32", "--max_tokens=1500"]
    found = []
    for ranks in (1, 2):
        done = run_evaluate(*models, *data, f"--output={tmp_path / 'out.json'}", cache=cache, ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Perplexity") == 1  # one rank speaks
        found.append(json.loads((tmp_path / "out.json").read_text()))
    one, two = found
    assert (one["world_size"], two["world_size"]) == (1, 2)
    for name in ("dense", "pruned"):
        assert one["models"][name]["num_tokens"] == two["models"][name]["num_tokens"] == 1499
        assert one["models"][name]["loss"] == pytest.approx(two["models"][name]["loss"], rel=1e-7)
        assert one["models"][name]["layers"] == two["models"][name]["layers"]
