"""Rules that can be read off the source: who imports whom, how long things get, that every option is read."""

import ast
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import seft_dist
from seft_dist import config

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "seft_dist").rglob("*.py"))
SCRIPTS = sorted((ROOT / "launch").glob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))
CONFIG = sorted((ROOT / "seft_dist" / "config").glob("*.py"))
FLOORS = {
    "config": 0,
    "files": 1,
    "sparsity": 1,
    "session": 2,
    "kernels": 2,
    "backends": 3,
    "modules": 4,
    "optim": 5,
    "io": 6,
    "data": 7,
    "integrations": 7,
    "export": 8,
    "planning": 8,
    "pruning": 9,
    "baselines": 10,
    "results": 9,
    "evaluation": 10,
    "training": 11,
    "reproduce": 12,
    "study": 13,
    "commands": 14,
}

# Who may import a framework: packages, and files with a reason of their own. All others go through these.
CONFINED = {
    "torch.distributed": {
        "session",
        "backends",
        "planning/rates.py",  # measures how fast two processes exchange data
    },
    "transformers": {
        "io",
        "data",
        "planning",
        "integrations",
        "backends/shards.py",  # makes modules whose weights come later
        "evaluation/tasks.py",  # seeds as lm_eval does
        "export/convert.py",
        "export/demo.py",
    },
    "safetensors": {"io"},
    "deepspeed": {"backends", "session", "training"},
    "accelerate": {"io", "export", "training"},
    "peft": {"baselines"},
    "lm_eval": {"evaluation"},
    "datasets": {"data"},
    "mpi4py": {"session"},
}

NO_SENTENCE = {"What", "Of", "Whether", "By", "As", "Who", "How", "Where", "Which"}
"""First words of docstrings that are fragments."""
MAX_FILE = 400
MAX_FUNCTION = 60


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def package_of(path: Path) -> str:
    """Folder below seft_dist, or the file's own name for config.py and __init__.py."""
    return path.relative_to(ROOT / "seft_dist").with_suffix("").parts[0]


def imports_of(path: Path) -> Iterator[str]:
    """Full names of everything a file imports, wherever in it, e.g. "torch.distributed.tensor.DTensor"."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def attributes_of(path: Path) -> Iterator[ast.Attribute]:
    return (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute))


def own_packages(path: Path) -> set[str]:
    parts = [name.split(".") for name in imports_of(path)]
    return {part[1] if len(part) > 1 and part[1] in FLOORS else "" for part in parts if part[0] == "seft_dist"}


@pytest.mark.parametrize("path", [p for p in PACKAGE if p.parent.name != "seft_dist"], ids=name_of)
def test_imports_only_lower_floors_or_the_own_folder(path: Path) -> None:
    package = package_of(path)
    for other in own_packages(path):
        assert other, f"{name_of(path)} imports from seft_dist itself: name the package"
        assert other == package or FLOORS[other] < FLOORS[package], f"{name_of(path)} ({package}) imports {other}"


def test_every_package_has_a_floor_and_says_what_it_is() -> None:
    assert {package_of(path) for path in PACKAGE} == {*FLOORS, "__init__", "__main__"}
    silent = [name_of(path) for path in [*PACKAGE, *SCRIPTS, *TESTS] if not ast.get_docstring(tree_of(path))]
    assert not silent, f"no docstring at the top: {silent}"


@pytest.mark.parametrize("path", [*PACKAGE, *SCRIPTS], ids=name_of)
def test_docstrings_are_sentences(path: Path) -> None:
    # a string that stands alone is the docstring of a module, class, function or attribute
    statements = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Expr)]
    for node in statements:
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            first = node.value.value.split(maxsplit=1)[0].rstrip(",:")
            assert first not in NO_SENTENCE, f"{name_of(path)}:{node.lineno}: docstring begins with {first}"


def test_the_pure_floor_knows_numbers_only() -> None:
    for path in (ROOT / "seft_dist" / "sparsity").glob("*.py"):
        for name in imports_of(path):
            assert name.split(".")[0] not in {"os", "pathlib", "io", "sys"}, f"{name_of(path)} imports {name}"


@pytest.mark.parametrize("framework", CONFINED)
def test_frameworks_stay_in_their_rooms(framework: str) -> None:
    allowed = {ROOT / "seft_dist" / name for name in CONFINED[framework]}
    for path in PACKAGE:
        if not allowed & {path, *path.parents}:
            found = [name for name in imports_of(path) if f"{name}.".startswith(f"{framework}.")]
            assert not found, f"{name_of(path)} imports {found}: only {sorted(CONFINED[framework])} may"


@pytest.mark.parametrize("path", [p for p in PACKAGE if FLOORS.get(package_of(p), 9) < 5], ids=name_of)
def test_one_file_knows_each_framework(path: Path) -> None:
    package, name = package_of(path), path.name
    known = [
        item for item in imports_of(path) if item.startswith(("torch.distributed.tensor", "torch.distributed.fsdp"))
    ]
    if package != "backends" or name not in {"fsdp.py", "shards.py"}:
        assert not known, f"{name_of(path)} knows FSDP2: {known}"
    known = [item for item in imports_of(path) if item.split(".")[0] == "deepspeed"]
    known += [node.attr for node in attributes_of(path) if node.attr.startswith("ds_")]
    # session/distributed.py starts its process group, as DeepSpeed's users do
    if (package, name) not in {("backends", "deepspeed.py"), ("backends", "shards.py"), ("session", "distributed.py")}:
        assert not known, f"{name_of(path)} knows DeepSpeed: {known}"


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_no_unpickling_no_foreign_code_and_one_reader_of_the_environment(path: Path) -> None:
    pickles = [name for name in imports_of(path) if name.split(".")[0] in {"pickle", "dill", "joblib", "cloudpickle"}]
    assert not pickles, f"{name_of(path)} imports {pickles}"
    for node in ast.walk(tree_of(path)):
        text = ast.unparse(node) if isinstance(node, (ast.Attribute, ast.keyword)) else ""
        assert text != "torch.load", f"{name_of(path)}:{node.lineno} unpickles"  # type: ignore[attr-defined]
        assert text != "trust_remote_code=True", f"{name_of(path)}: runs a model's own code"
        if text in {"os.environ", "os.getenv"}:
            assert path.name == "distributed.py", f"{name_of(path)} reads the environment"


def test_no_random_state_is_kept_of_devices() -> None:
    # fork_rng() without devices initialises CUDA where there is a card, and ranks that are forked later cannot use it
    for path in [*PACKAGE, *SCRIPTS, *TESTS]:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("fork_rng"):
                assert "devices" in {keyword.arg for keyword in node.keywords}, f"{name_of(path)}:{node.lineno}"


def test_the_package_imports_without_heavy_frameworks() -> None:
    heavy = ("deepspeed", "mpi4py", "datasets", "accelerate", "transformers")
    script = (
        f"from seft_dist import SeftOptimizer; import sys; print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", [*PACKAGE, *SCRIPTS, *TESTS], ids=name_of)
def test_files_and_functions_stay_short(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_FILE, f"{name_of(path)} has {len(lines)} lines: needs at most {MAX_FILE}"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno:
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION, (
                f"{name_of(path)}: {node.name} has {length} lines: needs at most {MAX_FUNCTION}"
            )


CONFIG_CLASSES = [item for item in vars(config).values() if dataclasses.is_dataclass(item) and isinstance(item, type)]


@pytest.mark.parametrize("config_class", CONFIG_CLASSES, ids=lambda c: c.__name__)
def test_every_field_is_read_and_documented(config_class: type) -> None:
    readers = [tree_of(path) for path in [*PACKAGE, *SCRIPTS] if path not in CONFIG]
    # a property of the configuration reads for others, its check of itself does not
    own = next(
        node
        for path in CONFIG
        for node in tree_of(path).body
        if isinstance(node, ast.ClassDef) and node.name == config_class.__name__
    )
    properties = [node for node in own.body if isinstance(node, ast.FunctionDef) and node.name != "__post_init__"]
    nodes = [node for tree in [*readers, *properties] for node in ast.walk(tree)]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    # optim's fields are also handed on by their names
    read |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    dead = [field.name for field in dataclasses.fields(config_class) if field.name not in read]
    assert not dead, f"{config_class.__name__}: nobody reads {dead}"

    nested = {item.__name__ for item in CONFIG_CLASSES}
    for field, after in zip(own.body, own.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and not any(name in ast.unparse(field.annotation) for name in nested):
            said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            assert said, f"{config_class.__name__}.{ast.unparse(field.target)} has no docstring under it"


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_public_functions_and_classes_are_documented(path: Path) -> None:
    for node in tree_of(path).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name_of(path)}: {node.name} has no docstring"


def test_every_exported_name_says_how_it_is_used() -> None:
    for name in seft_dist.__all__:
        item = getattr(seft_dist, name)
        assert (item.__doc__ or "").strip(), f"seft_dist.{name} has no docstring"
        methods = (
            {k: v for k, v in vars(item).items() if callable(v) and not k.startswith("_")}
            if isinstance(item, type)
            else {}
        )
        inherited = {key for base in getattr(item, "__mro__", ())[1:] for key in vars(base)}
        silent = [key for key, method in methods.items() if not method.__doc__ and key not in inherited]
        assert not silent, f"seft_dist.{name}: no docstring on {silent}"
