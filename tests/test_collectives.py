"""Docstrings tag the functions that every rank must enter, so that callers who read only them hang no cluster."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "seft_dist"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
# Of torch.distributed; what only sends to or receives from one rank is not among them
OPERATIONS = re.compile(r"all_\w+|broadcast\w*|barrier|monitored_barrier|reduce\w*|gather\w*|scatter\w*")
# Of ``seft_dist.backends.group.Group``, by the names that its objects have everywhere
GROUPS = re.compile(
    r"(?:^|[._])(?:owners|replicas|group)\.(?:sum|max|stack|gather|(?:start_)?sum_to_owners|gather_objects)$"
)
TAG = re.compile(r"\bCollective\b")
# "Collective if sharded", "Collective for replicated weights": a caller may know that it is not so
ALWAYS = re.compile(r"\bCollective[.:;,]")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def calls(function: ast.FunctionDef) -> Iterator[tuple[str, ast.Call]]:
    """Names that a function calls, e.g. "dist.all_reduce", without the calls of functions defined inside it."""
    inner = {node for f in functions(function) if f is not function for node in ast.walk(f)}
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and node not in inner and isinstance(node.func, (ast.Name, ast.Attribute)):
            yield ast.unparse(node.func), node


def imported(tree: ast.Module) -> dict[str, str]:
    """Names that a file uses for others' functions and modules, with their full names."""
    return {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def documented(function: ast.FunctionDef, tag: re.Pattern[str], tree: ast.Module | None = None) -> bool:
    """Return whether the docstring of a function, or of the class in ``tree`` whose method it is, has the tag."""
    classes = [node for node in ast.walk(tree or function) if isinstance(node, ast.ClassDef)]
    nodes: list[ast.FunctionDef | ast.ClassDef] = [function, *(c for c in classes if function in c.body)]
    return any(tag.search(ast.get_docstring(node) or "") for node in nodes)


COLLECTIVES = {
    f"{module_of(path)}.{node.name}"
    for path, tree in TREES.items()
    for node in tree.body
    if isinstance(node, ast.FunctionDef) and documented(node, ALWAYS)
}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_who_calls_a_collective_of_torch_says_so(path: Path) -> None:
    for function in functions(TREES[path]):
        for name, _ in calls(function):
            if name.startswith("dist.") and OPERATIONS.fullmatch(name.removeprefix("dist.")):
                assert documented(function, TAG, TREES[path]), (
                    f"{module_of(path)}.{function.name} calls {name}: say Collective"
                )


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_who_calls_a_method_of_a_group_says_so(path: Path) -> None:
    for function in functions(TREES[path]):
        for name, _ in calls(function):
            assert not GROUPS.search(name) or documented(function, TAG, TREES[path]), (
                f"{module_of(path)}.{function.name} calls {name}: say Collective"
            )


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_public_functions_that_call_a_collective_of_ours_say_so(path: Path) -> None:
    names = imported(TREES[path])
    for function in functions(TREES[path]):
        for name, _ in calls(function):
            first, *rest = name.split(".")
            full = ".".join([names.get(first, f"{module_of(path)}.{first}"), *rest])
            if full in COLLECTIVES and not function.name.startswith("_"):
                assert documented(function, TAG, TREES[path]), (
                    f"{module_of(path)}.{function.name} calls {full}: say Collective"
                )


def test_there_are_collectives_and_one_form_of_the_tag() -> None:
    assert len(COLLECTIVES) > 20
    assert (
        sum(bool(GROUPS.search(name)) for tree in TREES.values() for f in functions(tree) for name, _ in calls(f)) > 50
    )
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\*\*(Collective|Local)", text), f"{module_of(path)}: the tag is the word alone"
