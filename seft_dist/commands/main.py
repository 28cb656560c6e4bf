"""The command `seft`: it starts the command that its first argument names.

Nothing is imported before it is known which command that is, so that `seft --help` is quick and a command can catch
signals before it loads anything.
"""

import ast
import sys
from importlib import import_module
from pathlib import Path

from seft_dist.session.launchers import without_local_rank
from seft_dist.session.suggest import did_you_mean

COMMANDS = (
    "quickstart",
    "plan",
    "prune",
    "train",
    "evaluate",
    "export",
    "report",
    "sweep",
    "study",
    "compare",
    "reproduce",
    "files",
)
"""Modules beside this one, in the order in which they are used."""


def main() -> None:
    """Start a command as the command line says; exit status 2 if there is no such command."""
    arguments = without_local_rank(sys.argv[1:])
    first = arguments[0] if arguments else "--help"
    if first in ("-h", "--help"):
        print(_help(), end="")
    elif first == "--version":
        print(f"seft {import_module('seft_dist').__version__}")
    elif first in COMMANDS:
        sys.argv = [f"seft {first}", *arguments[1:]]
        import_module(f"seft_dist.commands.{first}").main()
    else:
        print(
            f"seft: error: no command {first}{did_you_mean(first, COMMANDS)}\nAll commands: seft --help",
            file=sys.stderr,
        )
        sys.exit(2)


def _help() -> str:
    lines = [f"  {name:<11} {_summary(name)}" for name in COMMANDS]
    return (
        "usage: seft COMMAND [options]\n\nRepair pruned language models on sharded weights.\n\ncommands:\n"
        + "\n".join(lines)
        + "\n\nseft COMMAND --help shows a command's options, seft --version the version.\n"
        "On several ranks: torchrun --nproc-per-node 8 -m seft_dist train ...\n"
    )


def _summary(name: str) -> str:
    """Read the first sentence of a command's docstring, without the time that its imports take."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
