"""The command line. There is one file per verb; this one only wires them, and prints errors in one or two lines."""

from __future__ import annotations

import importlib
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import typer

from ..errors import UnicpError, UnicpWarning, first_line
from .screen import messages

VERBS = ("generate", "compare", "batch", "calibrate", "tune", "rehearse", "inspect", "studio", "models")
"""Modules of this package whose function of the same name is a verb, in the order of the help."""

REFUSED, FAILED, INTERRUPTED = 2, 1, 130
"""Exit codes: the request cannot be met; something broke on the way; Ctrl-C."""

app = typer.Typer(
    name="unicp",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from unicp import __version__

        print(f"unicp {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def unicp(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Makes video diffusion transformers faster at a quality you choose."""
    if context.invoked_subcommand is None:
        print(context.get_help())


for _verb in VERBS:
    app.command(_verb)(getattr(importlib.import_module(f".{_verb}", __name__), _verb))


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    messages().print(f"warning: {message}", style="yellow", markup=False, soft_wrap=True)


def _complain(text: str) -> None:
    messages().print(f"error: {text}", style="red", markup=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``unicp`` with these arguments (by default those of the process) and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments
    with warnings.catch_warnings():
        if not debug:
            # Other libraries' warnings are for programmers; ours are for the person at the screen.
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UnicpWarning)
            warnings.showwarning = _show_warning
        caught: BaseException
        try:
            # Some versions of typer turn Ctrl-C into this exit code, others into an exception.
            code = app(arguments, prog_name="unicp", standalone_mode=False) or 0
            if code != INTERRUPTED:
                return code
            raise KeyboardInterrupt
        except (KeyboardInterrupt, typer.Abort) as error:
            caught, code, text = error, INTERRUPTED, "interrupted; no half file left"
        except UnicpError as error:
            caught, code, text = error, REFUSED, str(error)
        except Exception as error:
            caught, code, text = error, FAILED, first_line(error)
            # The command-line parser's own errors: their class is not the same in all versions of typer.
            usage = getattr(error, "format_message", None)
            if usage is not None:
                code, text = REFUSED, f"{usage().rstrip('.')}. See: unicp {_verb_of(arguments)}--help"
            elif "out of memory" in text.lower():
                text += "\n       give a smaller --size, fewer --frames, or --dtype bfloat16"
            elif not debug:
                text += "\n       run it again with --debug for the traceback"
        if debug:
            traceback.print_exception(caught)
        _complain(text)
        return code


def _verb_of(arguments: Sequence[str]) -> str:
    return f"{arguments[0]} " if arguments and arguments[0] in VERBS else ""
