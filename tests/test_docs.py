"""The site builds without a warning; quoted messages, options and commands of the pages exist."""

import ast
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from seft_dist import config
from seft_dist.commands.main import COMMANDS
from seft_dist.files.shipped import DS_CONFIGS, RECIPES, find_file
from tests.scripts import run_script

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
VALUE = "\0"
"""Stands for what a message fills in."""


def texts_of(node: ast.AST) -> Iterator[str]:
    """All string expressions below a node, with VALUE for each value of an f-string."""
    for child in ast.walk(node):
        if isinstance(child, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else VALUE for part in child.values)
        elif isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield child.value


@pytest.fixture(scope="module")
def messages() -> list[str]:
    files = [path for path in (ROOT / "seft_dist").rglob("*.py") if "shipped" not in path.parts]
    return [text for path in files for text in texts_of(ast.parse(path.read_text(encoding="utf-8")))]


def quoted_messages() -> list[str]:
    return re.findall(r"\*\*`([^`]+)`\*\*", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"))


def test_troubleshooting_quotes_many_messages() -> None:
    quoted = quoted_messages()
    assert len(quoted) > 40 and len(quoted) == len(set(quoted))


@pytest.mark.parametrize("quoted", quoted_messages())
def test_a_quoted_message_exists(quoted: str, messages: list[str]) -> None:
    wanted = quoted.replace("…", VALUE).strip(VALUE)
    assert any(wanted in text for text in messages), quoted


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_of_a_page_exist(page: Path) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    for line in lines:
        for name in re.findall(r"(?:^|; |&& |-m |--module )(?:seft|seft_dist) (\w+)", line):
            assert name in COMMANDS, line
        for script in re.findall(r"(?:launch|slurm|benchmarks)/[\w/.]+", line):
            assert (ROOT / script).exists(), line
        for option, folder in (("--config", RECIPES), ("--deepspeed", DS_CONFIGS)):
            for name in re.findall(rf"{option} ([\w/.]+)", line):
                placeholder = name[0].isupper()  # R.yaml
                assert placeholder or Path(find_file(name, folder)).is_file() or (ROOT / name).is_file(), line


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    for page in DOCS.glob("*.md"):
        assert (tmp_path / f"{page.stem}.html").is_file(), page
    assert 'id="seft_dist.SeftOptimizer.step"' in (tmp_path / "api.html").read_text(encoding="utf-8")
    assert "Share of each target weight" in (tmp_path / "options.html").read_text(encoding="utf-8")


def test_every_group_of_options_is_in_the_reference() -> None:
    page = (DOCS / "options.md").read_text(encoding="utf-8")
    for name in config.__all__:
        if dataclasses.is_dataclass(getattr(config, name)):
            assert f".. autoclass:: {name}\n   :members:\n" in page, name
    for field in dataclasses.fields(config.TrainConfig):
        if dataclasses.is_dataclass(field.type):
            assert f"### The group {field.name}\n" in page, field.name


@pytest.mark.slow
def test_the_minute_on_a_cpu_runs_as_printed(tmp_path: Path) -> None:
    page = (DOCS / "getting_started.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"## A CPU.*?```bash\n(.*?)```", page, re.S)
    lines = block.strip().splitlines()
    assert [line.split()[1] for line in lines] == ["quickstart", "prune", "train", "evaluate"]
    for line in lines:
        _, name, *arguments = line.replace(" tiny/", f" {tmp_path}/tiny/").split()
        if name == "quickstart":
            arguments[-1] = str(tmp_path / "tiny")
        done = run_script(f"launch/{name}.py", *arguments)
        assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "tiny" / "run" / "eval.json").read_text())["models"]
    assert measured["repaired"]["perplexity"] < measured["pruned"]["perplexity"]
    assert measured["repaired"]["sparsity"] == measured["pruned"]["sparsity"] > 0.5
