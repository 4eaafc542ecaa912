"""The command `peftc`. Commands are in `commands`; this file puts them together and decides what a failure means."""

import io
import logging
import os
import platform
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from peftc.compiler.commands.bench import bench
from peftc.compiler.commands.check import check
from peftc.compiler.commands.compile import compile_
from peftc.compiler.commands.decompile import decompile
from peftc.compiler.commands.doctor import doctor
from peftc.compiler.commands.drift import drift
from peftc.compiler.commands.explain import explain
from peftc.compiler.commands.export import export
from peftc.compiler.commands.fmt import fmt
from peftc.compiler.commands.graph import graph
from peftc.compiler.commands.inspect import inspect
from peftc.compiler.commands.methods import methods
from peftc.compiler.commands.run import run
from peftc.compiler.report import console
from peftc.compiler.versions import UntestedVersionWarning, installed
from peftc.grammar.diagnostics import AdapterError, Diagnostic

WRONG, USAGE, UNREADABLE, BUG, INTERRUPTED, BROKEN_PIPE = 1, 2, 3, 70, 130, 141

# What is not there, cannot be read or written, or cannot be reached; everything else is wrong in itself.
_UNREADABLE = frozenset(
    ("E101", "E301", "E302", "E308", "E350", "E450", "E455", "E460", "E550", "E551", "E552", "E600", "E607")
)

HELP = """
A compiler for adapters: puts the adapters of a spec into a model's graph.

MODEL is a directory with a config.json and weights, a directory with only a config.json (random weights, from a seed),
a repository on the Hub, or package.module:factory, a function that returns a module or (module, example_inputs).
"""

EPILOG = """
Exit codes: 0 done. 1 the spec, the checkpoint or the model is wrong, fmt --check found a file to format, or a
check of doctor fails. 2 wrong
usage. 3 something is missing, or cannot be read, written or reached. 70 a bug in peftc. 130 interrupted,
143 terminated. 141 the reader of the output went away.
"""


class ReaderGoneError(Exception):
    """Nobody reads our output any more. No OSError: typer would answer that one itself."""


class Commands(TyperGroup):
    """The group of all commands, with one place where every failure becomes a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command, and write out what it printed while a failure to do so can still be told."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError as error:
            raise ReaderGoneError from error
        return result

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line; leaves by SystemExit with one of the documented codes."""
        given = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in given
        given = [each for each in given if each != "--debug"]
        as_json = "--json" in given
        try:
            with warnings.catch_warnings(), _logs(debug):
                if not debug:
                    warnings.simplefilter("ignore")
                    warnings.simplefilter("always", UntestedVersionWarning)
                    warnings.showwarning = _show_warning
                code = super().main(given, "peftc", complete_var, not as_json, windows_expand_args, **extra)
            sys.exit(code or 0)
        except AdapterError as error:
            _report(error.diagnostics, as_json)
            if debug:
                traceback.print_exc()
            sys.exit(exit_code(error.diagnostics))
        except typer.TyperException as error:  # only with --json; without it typer prints its own
            console.write_json({"errors": [_plain("usage", error.format_message())]})
            sys.exit(USAGE)
        except ReaderGoneError:
            _forget_stdout()
            sys.exit(BROKEN_PIPE)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
        except Exception as error:  # whatever it is, it is our mistake
            _report_bug(error, as_json, debug)
            sys.exit(BUG)


def exit_code(diagnostics: Sequence[Diagnostic]) -> int:
    """What a failed command returns."""
    return UNREADABLE if all(each.code in _UNREADABLE for each in diagnostics) else WRONG


def main() -> None:
    """The entry point `peftc`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, _terminate)
    app()


@contextmanager
def _logs(shown: bool) -> Iterator[None]:
    """Without what libraries log of their own affairs, as torchao does when transformers imports it."""
    before = logging.root.manager.disable
    if not shown:
        logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)


def _terminate(number: int, frame: object) -> None:
    """Leave as on an interrupt, so that half-written files are removed."""
    raise SystemExit(128 + number)


def _report(diagnostics: Sequence[Diagnostic], as_json: bool) -> None:
    if as_json:
        console.write_json({"errors": [console.as_json(each) for each in diagnostics]})
    else:
        console.complain(diagnostics)


def _report_bug(error: Exception, as_json: bool, debug: bool) -> None:
    lines = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    if debug:
        traceback.print_exc()
    message = f"a bug in peftc: {what}; please report it with what the same command prints with --debug"
    if as_json:
        console.write_json({"errors": [_plain("bug", message)]})
    else:
        console.say(message, label="peftc", style="bold red")


def _show_warning(message: Warning | str, *place: Any, **more: Any) -> None:
    """One line, without the place in our code that a user of the command line has no use for."""
    console.warn(str(message))


def _plain(code: str, message: str) -> dict[str, Any]:
    return console.as_json(Diagnostic(code, message))


def _forget_stdout() -> None:
    """Nobody reads any more; without this the interpreter would complain when it flushes at exit."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process


def _show_version(wanted: bool) -> None:
    if wanted:
        packages = ", ".join(f"{name} {_version(name)}" for name in ("torch", "transformers", "peft"))
        console.write(f"peftc {_version('peftc')} (python {platform.python_version()}, {packages})\n")
        raise typer.Exit


def _version(package: str) -> str:
    return installed(package) or "not installed"


app = typer.Typer(
    cls=Commands,
    help=HELP,
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the versions and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Print the traceback of a failure; may stand anywhere.")
    ] = False,
) -> None:
    """Options before the command."""


app.command("compile")(compile_)
for _command in (check, explain, fmt, graph, drift, export, run, bench, inspect, decompile, methods, doctor):
    app.command()(_command)
