"""Command lines: options from a dataclass or a function, and errors of users without a traceback.

A command needs these lines::

    def main() -> None:
        run(_prune)

    def _prune() -> None:
        config = parse(PruneConfig, description=__doc__)
        ...

This file imports no torch, so that ``--help`` is quick.
"""

import dataclasses
import functools
import re
import sys
import traceback
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import (
    ActionConfigFile,
    ArgumentParser,
    Namespace,
    auto_cli,
    get_loader,
    set_loader,
    set_parsing_settings,
)

from seft_dist.files.reading import check_yaml
from seft_dist.files.shipped import RECIPES, find_file, short_names
from seft_dist.session.extras import EXTRAS, install_line
from seft_dist.session.help_format import HelpFormatter
from seft_dist.session.launchers import without_local_rank
from seft_dist.session.suggest import did_you_mean, suggest_for_message

T = TypeVar("T")

_PACKAGE = Path(__file__).resolve().parents[1]
_LONGEST_MESSAGE = 1000
_load_any_yaml = get_loader("yaml")
_format_any_warning = warnings.formatwarning
_errors_raise = ContextVar("_errors_raise", default=False)
"""True while options are read that are not this process's command line: an error is a ValueError then, and does not end
the process. Not an attribute of the parser, since jsonargparse makes further ones for what is nested in dicts."""


def parse(config_class: type[T], argv: Sequence[str] | None = None, description: str | None = None) -> T:
    """Make a configuration from the command line and ``--config`` files.

    Later options win over earlier ones, options over defaults. Nested dataclasses take dotted names (``--data.path``).
    ``--print_config`` prints the checked result as YAML and exits. ``--local_rank``, which DeepSpeed's launcher adds,
    is accepted and ignored (the environment says the rank).

    Args:
        config_class: A dataclass of ``seft_dist.config``.
        argv: The arguments; None: those of the process.
        description: First lines of ``--help``.

    Returns:
        A checked ``config_class``.

    Raises:
        ValueError: The values contradict each other (from the dataclass's own check).
        SystemExit: An option is unknown, missing or of the wrong type (code 2), or ``--help`` or ``--print_config``.
    """
    values = _parser(config_class, description).parse_args(without_local_rank(sys.argv[1:] if argv is None else argv))
    config = _build(config_class, values)
    if values.print_config:
        print(to_yaml(config), end="")
        sys.exit(0)
    return config


def option_reader(config_class: type[T]) -> Callable[[Sequence[str], str], T]:
    """Make a function that reads lists of options other than the command line of this process.

    Args:
        config_class: A dataclass of ``seft_dist.config``.

    Returns:
        A function of options and of what they are called in messages, e.g. "methods.lora". It makes a checked
        ``config_class``, or raises ValueError for whatever is wrong with them.
    """
    parser = _parser_without_description(typing.cast(Any, config_class))

    def read(argv: Sequence[str], name: str) -> T:
        before = _errors_raise.set(True)
        try:
            return _build(config_class, parser.parse_args(list(argv)))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        finally:
            _errors_raise.reset(before)

    return read


def call(components: Any, description: str | None, argv: Sequence[str] | None = None, **options: Any) -> None:
    """Call the function that the command line names, with its arguments from the command line.

    Args:
        components: A function, or functions by the name of their subcommand.
        description: First lines of ``--help``.
        argv: The arguments; None: those of the process.
        options: Further arguments of ``jsonargparse.auto_cli``.
    """
    auto_cli(components, None if argv is None else list(argv), parser_class=Parser, description=description, **options)


@functools.cache
def _parser_without_description(config_class: type) -> "Parser":
    """Make the parser of a configuration once: that takes longer than all it reads."""
    return _parser(config_class, None)


def _parser(config_class: type, description: str | None) -> "Parser":
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader("yaml", _load_yaml, (yaml.YAMLError,))
    usage = "%(prog)s [--config FILE] [options]"
    parser = Parser(description=description, usage=usage, print_config=None, allow_abbrev=False)
    parser.add_argument(
        "--config",
        action=_ConfigFile,
        help="YAML file with any of the options below, or the name of a recipe (`seft files`); may be repeated.",
    )
    parser.add_argument("--print_config", action="store_true", help="Print the checked configuration as YAML and exit.")
    parser.add_class_arguments(config_class)
    parser.options = list(_option_names(config_class))
    hints = typing.get_type_hints(config_class)
    parser.sections = [name for name, hint in hints.items() if dataclasses.is_dataclass(hint)]
    for field, inner in _optional_dataclasses(config_class):
        parser.add_optional_group(field, inner)
    return parser


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a configuration dataclass to plain dicts and lists, for JSON or YAML."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(config))
    return plain


def to_yaml(config: Any) -> str:
    """Write a configuration dataclass as YAML that ``--config`` reads back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120)


def run(main: Callable[[], None]) -> None:
    """Run a command: errors of users print one message, on one rank, and no traceback.

    Exit codes: 2 for ``ValueError`` and ``FloatingPointError``, as for options that do not exist: the same command
    would fail again, and so does a library that is not installed. 1 for everything else: ``OSError`` (disk full, file
    gone) is one message too, other exceptions are bugs or ranks that were lost, and keep their traceback.
    """
    set_loader("yaml", _load_yaml, (yaml.YAMLError,))
    warnings.formatwarning = _format_warning
    try:
        main()
    except (ValueError, FloatingPointError, OSError) as error:
        if getattr(error, "from_any_rank", False) or _is_first_to_report():
            _print_error(f"{error}{_raised_in(error)}")
        sys.exit(1 if isinstance(error, OSError) else 2)
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in EXTRAS:
            raise
        if _is_first_to_report():
            _print_error(f"this needs {library}, which is not installed: {install_line(library)}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _print_error(message: str) -> None:
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)


class _ConfigFile(ActionConfigFile):
    """The option --config, which also takes the name of a recipe that comes with the package."""

    @staticmethod
    def apply_config(parser: Any, cfg: Namespace, dest: str, value: str) -> None:
        found = find_file(value, RECIPES)
        if not Path(found).is_file() and "\n" not in value and "{" not in value:
            raise TypeError(
                f"--config {value}: there is no such file, and no such recipe in `seft files`"
                f"{did_you_mean(Path(value).stem, short_names(RECIPES))}"
            )
        for name in _empty_sections(parser, found):
            raise TypeError(f"--config {value}: {name} has nothing below it: needs options there, or remove the line")
        ActionConfigFile.apply_config(parser, cfg, dest, found)


def _empty_sections(parser: Any, path: str) -> list[str]:
    """List the groups of options that a file names and leaves empty; jsonargparse fails at them later, unclearly."""
    if not Path(path).is_file():
        return []
    try:
        values = _load_yaml(Path(path).read_text())
    except (yaml.YAMLError, OSError, UnicodeDecodeError):
        return []  # reading it for its values says what is wrong
    given = values if isinstance(values, dict) else {}
    return [name for name, value in given.items() if value is None and name in parser.sections]


class Parser(ArgumentParser):
    """A parser that prints one line on an error, and the fields of optional groups in the help."""

    sections: Sequence[str] = ()
    """Names of the groups of options that a file may not set to null."""
    options: Sequence[str] = ()
    """Names of the options, dotted; empty: those that were added."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **({"formatter_class": HelpFormatter} | kwargs))

    def add_optional_group(self, name: str, config_class: type) -> None:
        """Show the options of a dataclass that may be left out as a whole: jsonargparse hides them."""
        shown = ArgumentParser(add_help=False, usage="")
        shown.add_class_arguments(config_class, name)
        text = shown.format_help().partition(f"  --{name} CONFIG")[2].partition("\n")[2]
        optional = "\n".join(
            line.replace("(required, type", "(needed in this group, type") for line in text.splitlines()
        )
        self._optional = (
            getattr(self, "_optional", "") + f"\nOptions inside --{name}, which may be left out:\n{optional}\n"
        )

    def format_help(self, *args: Any) -> str:  # a formatter, from jsonargparse 4.53 on
        return super().format_help(*args) + getattr(self, "_optional", "")

    def parse_path(self, cfg_path: Any, *args: Any, **kwargs: Any) -> Namespace:
        self._file = str(cfg_path)
        try:
            values: Namespace = super().parse_path(cfg_path, *args, **kwargs)
            return values
        except UnicodeDecodeError as error:
            self.error(f"not UTF-8 text ({error.reason} at byte {error.start})", error)
        finally:
            self._file = ""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if len(message) > _LONGEST_MESSAGE:  # the message may repeat a whole file
            message = message[:_LONGEST_MESSAGE] + " ..."
        if getattr(self, "_file", ""):
            message = f"{self._file}: {message}"
        named = re.search(r'Parser key "([\w.]+)":\s+Expected a <class \'dict\'>', message)
        if named:
            message += f"\nEach entry has a name: --{named[1]}.NAME VALUE"
        entries = re.search(r'Parser key "([\w.]+)".*NestedArg\(', message, re.DOTALL)
        if entries:
            message += (
                f"\nGive all entries at once, or in a --config file: --{entries[1]} '{{NAME: {{OPTION: VALUE}}}}'"
            )
        parser = getattr(ex, "subcommand_parser", None) or self
        added = [option.removeprefix("--") for option in parser._option_string_actions]
        suggestion = suggest_for_message(message, self.options or added)
        message += f"\n{suggestion}" if suggestion else ""
        if _errors_raise.get():
            raise ValueError(" ".join(message.split()))
        if _is_first_to_report():
            prog = parser.prog.replace(" [options]", "")
            print(f"{prog}: error: {message}\nAll options: {prog} --help", file=sys.stderr, flush=True)
        sys.exit(2)


def _load_yaml(text: str) -> Any:
    """Load YAML as jsonargparse does, but refuse aliases that multiply and bottomless nesting."""
    if len(text) > 200 or "*" in text:
        try:
            check_yaml(text, "the YAML")
        except ValueError as error:
            raise yaml.YAMLError(str(error)) from error
    value = _load_any_yaml(text)
    # jsonargparse loads a text inside dict[str, Any], e.g. a study's pattern "2:4", a second time, without its
    # quotation marks. YAML 1.1 would make a number in base 60 of it.
    return text if isinstance(value, int | float) and ":" in text else value


def _optional_dataclasses(config_class: type) -> list[tuple[str, type]]:
    """Find the dataclasses that may be left out, at any depth, by their dotted names."""
    optional: list[tuple[str, type]] = []
    for name, hint in typing.get_type_hints(config_class).items():
        if isinstance(hint, types.UnionType):
            inside = [inner for inner in typing.get_args(hint) if dataclasses.is_dataclass(inner)]
            optional += [(name, typing.cast(type, inner)) for inner in inside]
        elif dataclasses.is_dataclass(hint):
            optional += [(f"{name}.{key}", inner) for key, inner in _optional_dataclasses(typing.cast(type, hint))]
    return optional


def _option_names(config_class: type, prefix: str = "") -> Iterator[str]:
    """Name all options of a dataclass, those of groups that may be left out too."""
    for name, hint in typing.get_type_hints(config_class).items():
        inner = [item for item in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(item)]
        yield f"{prefix}{name}"
        for group in inner:
            yield from _option_names(typing.cast(type, group), f"{prefix}{name}.")


def _build(config_class: type[T], values: Namespace) -> T:
    """Make the dataclass from parsed values, inner ones first, so that each check speaks with its own words."""
    hints = typing.get_type_hints(config_class)
    made: dict[str, Any] = {}
    for field in dataclasses.fields(typing.cast(Any, config_class)):
        value = values[field.name]
        inner = [
            hint for hint in (hints[field.name], *typing.get_args(hints[field.name])) if dataclasses.is_dataclass(hint)
        ]
        if inner and isinstance(value, Namespace):
            value = _build(typing.cast(type, inner[0]), value)
        elif isinstance(value, dict) and any(isinstance(item, Namespace) for item in value.values()):
            named = _dataclass_of_entries(hints[field.name])
            value = {name: _build(named, item) for name, item in value.items()}
        made[field.name] = value
    return config_class(**made)


def _dataclass_of_entries(hint: Any) -> type:
    """Return the dataclass in ``dict[str, DATACLASS] | None``."""
    kinds = [kind for kind in (hint, *typing.get_args(hint)) if typing.get_origin(kind) is dict]
    return typing.cast(type, typing.get_args(kinds[0])[1])


def _plain(value: Any) -> Any:
    """Convert tuples to lists: YAML has no tuples."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Format our own warnings as one line, without the line of code that raised them."""
    if category.__module__.startswith("seft_dist."):
        return f"warning: {message}\n"
    return _format_any_warning(message, category, filename, lineno, line)


def _is_first_to_report() -> bool:
    """Return true on exactly one of the ranks that fail: the first to ask, or rank 0 if there is no process group."""
    dist: Any = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        try:
            return bool(dist.distributed_c10d._get_default_store().add("seft_dist/error", 1) == 1)
        except RuntimeError:  # the store has ended with a rank that failed earlier and has reported it
            return False
    from seft_dist.session.distributed import find_ranks

    try:
        return find_ranks().is_main
    except ValueError:
        return True


def _raised_in(error: BaseException) -> str:
    """Name the line that raised an error outside our own code: its message alone may not show the cause."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    file = Path(frame.filename).resolve()
    ours = file.is_relative_to(_PACKAGE) or file == Path(sys.argv[0]).resolve()  # the program itself
    return "" if ours else f"\n(raised in {frame.filename}:{frame.lineno})"
