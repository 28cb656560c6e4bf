"""The command seft: from a wheel in an environment of its own, its list of commands, and what comes with it."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import seft_dist
from seft_dist.backends.deepspeed import load_ds_config
from seft_dist.commands import main
from seft_dist.files.shipped import DS_CONFIGS, RECIPES, SCRIPTS, copy_shipped, find_file, shipped_names
from seft_dist.session.extras import EXTRAS, require

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT / "setup.cfg")


def names_of(requirements: str) -> set[str]:
    return {re.split(r"[\[<>=]", line)[0].replace("-", "_") for line in requirements.split()}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with nothing but the wheel, and this environment's libraries beside it."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("environment")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("seft_dist", "launch", "ds_configs", "slurm"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    built = start([*pip, *build], folder)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("seft_dist-*.whl")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    install = ["--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    installed = start([*pip, *install], folder)
    assert installed.returncode == 0, installed.stderr
    (own,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (own / "beside.pth").write_text(sysconfig.get_paths()["purelib"])
    return folder / "venv" / "bin"


def start(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command as from a shell that knows no checkout."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=200)


def test_the_wheel_has_the_command_and_its_files(environment: Path, tmp_path: Path) -> None:
    seft, python = str(environment / "seft"), str(environment / "python")
    shown = start([python, "-c", "import seft_dist; print(seft_dist.__file__)"], tmp_path)
    assert shown.stdout.startswith(str(environment.parent)), shown
    for command in ([seft], [python, "-m", "seft_dist"]):
        assert start([*command, "--version"], tmp_path).stdout == f"seft {seft_dist.__version__}\n"
    # a recipe and a ds_config by name, from a folder that has neither
    given = ["train", "--config", "llama_zero3.yaml", "--model.path=m", "--data.path=d", "--output=o", "--print_config"]
    printed = start([seft, *given], tmp_path)
    assert printed.returncode == 0 and "deepspeed: ds_configs/zero3_bf16.json" in printed.stdout, printed.stderr
    found = "from seft_dist.backends.deepspeed import load_ds_config; print(load_ds_config('zero3_bf16')['bf16'])"
    assert start([python, "-c", found], tmp_path).stdout == "{'enabled': True}\n"
    # the scripts that launchers start, and a copy of everything
    copied = start([seft, "files", "--copy", "work"], tmp_path)
    assert copied.returncode == 0, copied.stderr
    script = [python, "launch/prune.py", "--model.path=m", "--sparsity=0.7", "--method=magnitude", "--output=o"]
    printed = start([*script, "--print_config"], tmp_path / "work")
    assert printed.returncode == 0 and "sparsity: 0.7" in printed.stdout, printed.stderr
    for folder in ("launch/recipes", "ds_configs", "slurm"):
        there = {path.name for path in (tmp_path / "work" / folder).iterdir()}
        assert there == {path.name for path in (ROOT / folder).iterdir() if path.is_file()}, folder


def test_every_command_is_a_script_and_the_other_way_round(capsys: pytest.CaptureFixture[str]) -> None:
    scripts = {path.stem for path in (ROOT / "launch").glob("*.py")} - {"wheels"}
    assert scripts == set(main.COMMANDS) - {"files"}
    sys.argv, before = ["seft"], sys.argv
    try:
        main.main()
    finally:
        sys.argv = before
    printed = capsys.readouterr().out
    for name in main.COMMANDS:
        assert re.search(rf"^  {name} +[A-Z]\w+.*[.?]$", printed, re.M), name
        assert (ROOT / "seft_dist" / "commands" / f"{name}.py").is_file()


def test_a_command_that_does_not_exist(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["seft", "--local_rank=0", "trian"])  # DeepSpeed's launcher puts its option first
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 2 and "no command trian; did you mean train?" in capsys.readouterr().err


def test_the_list_of_commands_loads_nothing() -> None:
    script = "import sys; sys.argv = ['seft', '--help']\nfrom seft_dist.commands.main import main\nmain()\n"
    script += "print([name for name in ('torch', 'jsonargparse', 'transformers', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done


def test_files_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = str(ROOT / "launch" / "recipes" / "quickstart.yaml")
    for name in ("quickstart", "quickstart.yaml", "launch/recipes/quickstart.yaml"):
        assert find_file(name, RECIPES) == recipe
    for name in ("quick", "elsewhere/quickstart.yaml", "/quickstart.yaml", "zero3.json", ""):
        assert find_file(name, RECIPES) == name
    Path("quickstart").mkdir()  # a folder is no recipe
    assert find_file("quickstart", RECIPES) == recipe
    Path("quickstart.yaml").touch()  # the user's own file wins
    assert find_file("quickstart.yaml", RECIPES) == "quickstart.yaml"
    assert load_ds_config("zero3") == load_ds_config(str(ROOT / "ds_configs" / "zero3.json"))
    with pytest.raises(ValueError, match=r"zreo3.json: .*; did you mean zero3\?"):
        load_ds_config("zreo3.json")
    assert shipped_names(DS_CONFIGS) == sorted(path.name for path in (ROOT / "ds_configs").iterdir())
    assert ROOT / "launch" == SCRIPTS


def test_copies_replace_nothing(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    with pytest.raises(ValueError, match="slurm is there already"):
        copy_shipped(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["slurm"]


def test_extras_are_those_of_the_package() -> None:
    extras = SETTINGS["options.extras_require"]
    for library, extra in EXTRAS.items():
        assert library in names_of(extras[extra]), f"{library} is not in [{extra}]"
    core = names_of(SETTINGS["options"]["install_requires"])
    assert not core & set(EXTRAS), "asked for as an extra, but always installed"
    (everything,) = extras["all"].split()
    assert set(everything.removeprefix("seft_dist[").removesuffix("]").split(",")) == {*EXTRAS.values(), "trackers"}


def test_a_missing_library_is_asked_for_by_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    require("datasets", "this")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"^this needs datasets, .*: pip install 'seft_dist\[train\]', or that$"):
        require("datasets", "this", ", or that")
