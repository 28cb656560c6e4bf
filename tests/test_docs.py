"""The site builds without a warning; quoted messages, options and commands of the pages exist."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from seft_dist.commands.main import COMMANDS
from seft_dist.files.shipped import DS_CONFIGS, RECIPES, find_file

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
    for name, words in (("api", "seft_dist.SeftOptimizer"), ("options", "Share of each target weight")):
        assert words in re.sub(r"<[^>]+>", "", (tmp_path / f"{name}.html").read_text(encoding="utf-8")), name
