"""The frame of every command: options from a dataclass, `--json`, lazily loaded work, errors caught once.

A command is a row of `planner.cli.commands`: its options are the fields of a dataclass, its work is a function named by
its import path, loaded when the command runs, which takes the options and returns an `Answer`. Exit status 2 says that
the user asked for something that cannot be, 1 that we failed.
"""

from __future__ import annotations

import dataclasses
import errno
import gc
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any, NamedTuple, get_type_hints

import typer

from planner.cli.commands import COMMANDS, Command
from planner.errors import MeshwrightError

WIDTH = 120
"""Columns of tables that do not go to a terminal."""

GARBAGE_THRESHOLD = 100_000
"""New objects between two searches for cycles: a command builds millions that stay; searching them takes a tenth."""

USER_ERROR, INTERNAL_ERROR, INTERRUPTED = 2, 1, 130


class Answer(NamedTuple):
    """What a command found: how to make the document that `--json` prints, and what people see."""

    document: Callable[[], Any]
    render: Callable[[], Any]
    status: int = 0


def say(message: str) -> None:
    """Talk to the user, on stderr."""
    print(message, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    gc.set_threshold(GARBAGE_THRESHOLD)
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run the command line; return its exit status."""
    try:
        status = application()(arguments or ["--help"], prog_name="planner", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except MeshwrightError as error:
        say(f"planner: {error}")
        return USER_ERROR
    except (KeyboardInterrupt, typer.Abort):
        say("planner: interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe went away; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERNAL_ERROR
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own usage errors
            return _usage_error(error)
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # even to ask whether it is a file
            say(f"planner: {str(error.filename)[:WIDTH]}...: {error.strerror}; give a shorter name")
            return USER_ERROR
        traceback.print_exc()
        say(f"planner: internal error: {error}; please report it with the lines above")
        return INTERNAL_ERROR


def _usage_error(error: Any) -> int:
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else "planner"
    say(f"{where}: {error.format_message().rstrip('.')}; '{where} --help' lists what it takes")
    return USER_ERROR


def application() -> typer.Typer:
    """Return the typer application with every command."""
    app = typer.Typer(
        name="planner",
        help="Plan how to train a transformer on many workers, predict what the plan costs, run it, compare.",
        add_completion=False,
        rich_markup_mode=None,  # plain help needs no rich, and starts in a third of the time
        pretty_exceptions_enable=False,
    )

    app.callback()(_root)
    for command in COMMANDS:
        epilog = "\b\nExample:\n" + "\n".join(f"  {line}" for line in command.example.splitlines())
        app.command(command.name, help=command.summary, epilog=epilog)(_callback(command))
    return app


def _show_version(value: bool) -> None:
    if value:
        print(f"planner {version('meshwright')}")
        raise typer.Exit


def _root(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Take the options that stand before a command."""


def _callback(command: Command) -> Callable[..., int]:
    """The function that typer calls: its signature is the command's options and --json."""
    parameters = _parameters(command.options)
    as_json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
    parameters.append(inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=as_json))

    def callback(**values: Any) -> int:
        as_json = values.pop("as_json")
        module, _, name = command.work.partition(":")
        work: Callable[[Any], Answer] = getattr(import_module(module), name)
        answer = work(command.options(**values))
        _print(answer, as_json=as_json)
        return answer.status

    callback.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    callback.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return callback


def _parameters(options: type) -> list[inspect.Parameter]:
    """The fields of a dataclass as parameters that typer reads; the class's own come before inherited ones."""
    hints = get_type_hints(options)
    own = vars(options).get("__annotations__", {})
    fields = sorted(dataclasses.fields(options), key=lambda field: field.name not in own)
    return [_parameter(field, hints[field.name]) for field in fields]


def _parameter(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    metadata = field.metadata
    required = field.default is dataclasses.MISSING
    name = field.name.replace("_", "-")
    flags = metadata.get("flags") or (f"--{name}/--no-{name}" if hint == bool | None else f"--{name}",)
    info: Any
    if metadata.get("argument"):
        info = typer.Argument(help=metadata["help"], metavar=metadata["metavar"])
    else:
        info = typer.Option(*flags, help=metadata["help"], show_default=field.default not in (None, False))
    default = inspect.Parameter.empty if required else field.default
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, info]
    )


def _print(answer: Answer, *, as_json: bool) -> None:
    """Print the answer on stdout."""
    if as_json:
        json = import_module("msgspec").json
        sys.stdout.write(json.format(json.encode(answer.document()), indent=2).decode() + "\n")
    else:
        if (rendered := answer.render()) == "":
            return
        rich_console = import_module("rich.console")
        width = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else WIDTH
        console = rich_console.Console(width=width, highlight=False, soft_wrap=False)
        console.print(rendered)
    sys.stdout.flush()
