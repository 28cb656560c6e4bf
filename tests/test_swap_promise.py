"""benchmarks/swap_promise.py: what swaps promise, against all pairs of sorted prices; and the table it prints."""

import argparse
import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tests.preload  # noqa: F401
from tests.folders import model_folder, text_file

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "swap_promise.py"


@pytest.fixture(scope="module")
def script() -> Any:
    """benchmarks/swap_promise.py as a module."""
    spec = importlib.util.spec_from_file_location("swap_promise", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("promise")
    return {
        "model": model_folder(root / "pruned"),
        "parent": model_folder(root / "dense", sparsity=0.0),
        "train": text_file(root / "train.jsonl"),
        "validation": text_file(root / "validation.jsonl", records=80),
    }


def test_moments_of_a_layer(script: Any) -> None:
    layer, weights = torch.nn.Linear(3, 2, bias=False), torch.randn(4, 5, 2)
    inputs = [torch.randn(4, 5, 3) for _ in range(2)]
    with script.moments_of({"layer": layer}) as sums:
        for tokens in inputs:
            (layer(tokens) * weights).sum().backward()
    (layer(inputs[0]) * weights).sum().backward()  # after the context nothing is added
    rows, columns = sums["layer"]
    torch.testing.assert_close(rows.float(), 2 * weights.square().sum((0, 1)))
    torch.testing.assert_close(columns.float(), torch.stack(inputs).square().sum((0, 1, 2)))


def test_without_a_limit_all_pairs_that_promise_something_change_places(script: Any, folders: dict[str, Path]) -> None:
    tokens = torch.randint(0, 60, (6, 32), generator=torch.Generator().manual_seed(0))
    arguments = argparse.Namespace(model=folders["model"], parent=str(folders["parent"]), batch_size=2)
    swapped, number, promise = script.swap_once(arguments, 1.0, tokens)

    pruned = AutoModelForCausalLM.from_pretrained(folders["model"])
    dense = script.weights_of(AutoModelForCausalLM.from_pretrained(folders["parent"]))
    weights = script.weights_of(pruned)
    with script.moments_of({name: pruned.get_submodule(name) for name in weights}) as sums:
        for batch in (tokens[2:4], tokens[4:6]):
            pruned(input_ids=batch, labels=batch).loss.backward()
    prices = {name: torch.outer(*sums[name]) / script.WINDOW**2 / 2 for name in weights}
    active = torch.cat([(prices[name] * weights[name] ** 2)[weights[name] != 0] for name in weights]).sort().values
    absent = torch.cat([(prices[name] * dense[name] ** 2)[weights[name] == 0] for name in weights])
    pairs = min(len(active), len(absent))
    gains = absent.sort(descending=True).values[:pairs] - active[:pairs]
    assert 0 < number < pairs and number == pytest.approx(int((gains > 0).sum()), abs=2)
    assert promise == pytest.approx(float(gains[gains > 0].sum()), rel=1e-4)
    for name, weight in script.weights_of(swapped).items():
        came = (weights[name] == 0) & (weight != 0)
        assert torch.equal(weight[came], dense[name][came])


def test_the_table(folders: dict[str, Path]) -> None:
    options = [f"--{name}={path}" for name, path in folders.items()]
    command = [sys.executable, str(SCRIPT), *options, "--limits", "0.01", "0.05", "1", "--sequences", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^validation: 1,024 tokens, loss [\d.]+, perplexity [\d.]+$", done.stdout, re.MULTILINE)
    before = float(re.findall(r"perplexity ([\d.]+)$", done.stdout, re.MULTILINE)[0])
    row = r"^\| ([\d.]+) \| ([\d,]+) \| ([\d.]+) \| [\d.]+% \| ([-+][\d.]+) \| ([\d.]+) \|$"
    rows = [[float(cell.replace(",", "")) for cell in cells] for cells in re.findall(row, done.stdout, re.MULTILINE)]
    assert [cells[0] for cells in rows] == [0.01, 0.05, 1.0]
    _, numbers, promises, changes, after = zip(*rows, strict=True)
    assert sorted(numbers) == list(numbers) and sorted(promises) == list(promises)
    assert [before * math.exp(change) for change in changes] == pytest.approx(after, rel=0.02)
