"""Run a program of launch/ in a child of a server that has imported torch and transformers: 0.3 s instead of 10 s.

The server is started once for each test process and does nothing but import and fork, so that no thread pool is forked
along. Programs are started as a user starts them in test_launchers.py, test_stopping.py, test_slurm_train.py and
others.
"""

import multiprocessing as mp
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
# Without datasets, which looks at the variable of its cache when it is loaded
LOADED = [
    "torch",
    "transformers.models.llama.modeling_llama",
    "seft_dist.training.trainer",
    "jsonargparse",
    "docstring_parser",
    "torch.utils.cpp_extension",
    "lm_eval.tasks",
    "rich.console",
]
_SERVER = mp.get_context("forkserver")
_SERVER.set_forkserver_preload(LOADED)


def run_script(
    script: str, *arguments: object, timeout: float = 100, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program and wait for it.

    Args:
        script: Below the repository, e.g. "launch/prune.py".
        arguments: Arguments of its command line.
        timeout: Seconds after which it is killed.
        env: Variables beside those of the test process; what torch reads when it is loaded has no effect.

    Returns:
        Exit status and what it printed.

    Raises:
        AssertionError: It did not end in time.
    """
    command = [script, *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        child = _SERVER.Process(
            target=_be, args=(command, out, err, dict(os.environ) | {"COLUMNS": "100"} | (env or {}))
        )
        child.start()
        child.join(timeout)
        code = child.exitcode
        if code is None:
            child.kill()
            child.join()
            raise AssertionError(f"{command} did not end in {timeout} s:\n{out.read_text()}\n{err.read_text()}")
        return subprocess.CompletedProcess(command, code, out.read_text(), err.read_text())


def _be(command: list[str], out: Path, err: Path, env: dict[str, str]) -> NoReturn:
    code: Any = 1
    for number, path in enumerate((os.devnull, str(out), str(err))):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), number)
    try:
        os.environ.clear()
        os.environ.update(env)
        os.chdir(ROOT)
        sys.argv = command
        runpy.run_path(str(ROOT / command[0]), run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)  # the server's own threads and files are not this program's to end
