"""eval.json says what each perplexity was measured on; tables warn of numbers that cannot be compared."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from seft_dist.config import DataConfig, EvaluateConfig
from seft_dist.evaluation.evaluation import Evaluation, evaluate, result_table
from seft_dist.evaluation.perplexity import PerplexityResult
from seft_dist.evaluation.policy import Policy
from seft_dist.sparsity.zeros import ZeroCount
from tests.texts import dense_folder, texts, write_jsonl

pytestmark = pytest.mark.usefixtures("cache")

POLICY = Policy(
    data="text.jsonl",
    name=None,
    split="train",
    kind="text",
    holdout="all",
    records=3,
    text="5eed",
    join="documents",
    bos="none",
    date=None,
    tokenizer="abcd",
    tokens=64,
    tokens_hash="beef",
    seq_len=16,
    stride=None,
    max_tokens=None,
    dtype="float32",
)


def table_of(*policies: Policy) -> str:
    zeros = [ZeroCount("a", 2, 1)]
    entries = [
        Evaluation(str(n), "path", zeros, PerplexityResult(2.0, 0.69, 5), policy) for n, policy in enumerate(policies)
    ]
    return str(result_table(entries).caption)


def test_tables_say_what_was_measured_and_warn_of_other_tokenizers() -> None:
    said = table_of(POLICY, POLICY)
    assert said == (
        "text 5eed: 3 records (all), each a document with an eos behind it; bos: none; 64 tokens in windows of 16, "
        "side by side"
    )
    other = dataclasses.replace(POLICY, tokenizer="dcba", tokens_hash="f00d")
    said = table_of(POLICY, other)
    assert "cannot be compared: tokenizer is " in said and "tokens_hash is " in said and "f00d (1)" in said
    assert "held in different types" in table_of(POLICY, dataclasses.replace(POLICY, dtype="bfloat16"))


def test_every_entry_but_the_path_of_the_data_keeps_numbers_apart() -> None:
    assert "cannot be compared" not in table_of(POLICY, dataclasses.replace(POLICY, data="elsewhere.jsonl"))
    for key in dataclasses.asdict(POLICY).keys() - {"data", "dtype"}:
        other: dict[str, Any] = {key: "another"}
        assert f"cannot be compared: {key} is " in table_of(POLICY, dataclasses.replace(POLICY, **other)), key


def test_eval_json_holds_the_policy(tmp_path: Path) -> None:
    model = str(dense_folder(tmp_path / "model"))
    lines = [{"text": line} for line in texts()[0].splitlines()]
    path = str(write_jsonl(tmp_path / "lines.jsonl", lines))
    write_jsonl(tmp_path / "same.jsonl", lines)

    def policy(data: str, stride: int | None = None, **over: Any) -> dict[str, Any]:
        config = EvaluateConfig(
            models={"m": model},
            data=DataConfig(path=data, seq_len=16, **over),
            stride=stride,
            max_tokens=64,
            output=str(tmp_path / "eval.json"),
        )
        evaluate(config, show=False)
        return json.loads((tmp_path / "eval.json").read_text())["models"]["m"]["policy"]

    first = policy(path)
    assert first.keys() == dataclasses.asdict(POLICY).keys()
    assert (first["seq_len"], first["max_tokens"], first["dtype"], first["bos"]) == (16, 64, "float32", "none")
    assert first["records"] == len(lines) and first["holdout"] == "all"
    assert first | {"data": ""} == policy(str(tmp_path / "same.jsonl")) | {"data": ""}
    joined = policy(path, join="newline")
    assert joined["text"] == first["text"] and joined["join"] == "newline"
    assert joined["tokens_hash"] != first["tokens_hash"]
    held = policy(path, holdout_every=2, holdout=True)
    assert held["text"] != first["text"] and held["holdout"] == "1 in 2"
