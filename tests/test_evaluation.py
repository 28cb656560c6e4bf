"""Perplexity against its definition, reports, and the door called for real."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from rich.console import Console

from seft_dist.config import DataConfig, EvaluateConfig
from seft_dist.io.data import IGNORE
from seft_dist.io.tables import sparsity_table
from seft_dist.optim.targets import find_targets
from seft_dist.sparsity.zeros import ZeroCount, count_zeros, total_sparsity
from seft_dist.training.evaluation import Evaluation, PerplexityResult, evaluate, limit_tokens, perplexity, result_table
from tests.models import prune_, tiny_llama
from tests.texts import VOCAB, dense_folder, fast_tokenizer, sentencepiece_tokenizer, text_jsonl

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("datasets")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder))
        yield folder


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


def test_perplexity_leaves_the_model_as_it_was() -> None:
    model = tiny_llama(attention_dropout=0.5).train()
    passes: list[None] = []
    first = perplexity(model, ragged(), 3, progress=lambda: passes.append(None))
    assert model.training and len(passes) == 3
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
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        perplexity(model, [(ids, ids)])
    assert model.training


def test_limit_tokens() -> None:
    samples = ragged()  # 5, 8, 11, ... tokens
    assert limit_tokens(samples, None) is samples
    assert [len(limit_tokens(samples, limit)) for limit in (5, 12, 13, 24, 10**6)] == [1, 1, 2, 3, 7]
    with pytest.raises(ValueError, match="the first sequence has 5 tokens, more than max_tokens"):
        limit_tokens(samples, 4)


def test_zero_counts_and_their_table() -> None:
    counts = count_zeros(find_targets(prune_(tiny_llama(num_hidden_layers=12), 0.5, "q_proj|down_proj")))
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
    assert [entry.result.num_tokens for entry in results] == [15 * 63, 15 * 63]
    assert [total_sparsity(entry.zeros) for entry in results] == [0.0, 0.5]
    written = json.loads((tmp_path / "deep" / "result.json").read_text())
    assert list(written["models"]) == ["dense", "pruned"] and written["data"]["seq_len"] == 64
    pruned = written["models"]["pruned"]
    assert pruned["perplexity"] == results[1].result.perplexity and pruned["sparsity"] == 0.5
    assert pruned["layers"]["model.layers.1.mlp.down_proj"] == {"weights": 1536, "zeros": 768, "share": 0.5}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["result.json"]


def test_evaluate_with_a_sentencepiece_tokenizer(folders: dict[str, str], tmp_path: Path) -> None:
    tiny_llama(vocab_size=VOCAB, max_position_embeddings=128, dtype=torch.bfloat16).save_pretrained(tmp_path)
    sentencepiece_tokenizer(tmp_path)
    config = EvaluateConfig(models={"sp": str(tmp_path)}, data=DataConfig(path=folders["text.jsonl"], seq_len=64))
    (entry,) = evaluate(config, show=False)
    assert entry.result.num_tokens % 63 == 0 and 1 < entry.result.perplexity < 10 * VOCAB


def test_tables_warn_of_different_tokenizers() -> None:
    zeros = [ZeroCount("a", 2, 1)]
    entries = [Evaluation(str(n), "path", PerplexityResult(2.0, 0.69, n), zeros) for n in (5, 6)]
    assert result_table(entries[:1]).caption is None
    assert "cannot be compared" in str(result_table(entries).caption)


def door(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch" / "evaluate.py"), *arguments]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(cache), "COLUMNS": "100"}
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=100,
        env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def test_door_prints_tables(folders: dict[str, str], tmp_path: Path, cache: Path) -> None:
    models = [f"--models.{name}={folders[name]}" for name in ("dense", "pruned")]
    data = ["--data.path", folders["text.jsonl"], "--data.seq_len=64", "--max_tokens=640"]
    done = door(*models, *data, f"--output={tmp_path / 'out.json'}", cache=cache)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())["models"]["pruned"]
    assert "Perplexity" in done.stdout and f"{result['perplexity']:.3f}" in done.stdout and "50.00 %" in done.stdout
    assert "Evaluating dense" in done.stderr
