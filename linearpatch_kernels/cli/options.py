"""The options of a command, made from the settings of its recipe; and the arguments that no recipe has."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from linearpatch_kernels.cli.flags import in_flags
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.settings import Field, fields_of, given_path

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Directory, hub id, .gguf file, or 'demo'.", show_default=False)
]
JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Also write the figures as JSON ('-': standard output).",
        show_default=False,
        parser=given_path,
    ),
]
# Options from this one on say how models are loaded, and stand last.
_LOADING = "dtype"


def command(function: Callable[..., None]) -> Callable[..., None]:
    """What typer makes a command of: in the place of the parameter ``settings``, an option for each of its fields.

    Errors name flags in the place of the settings that they name in backticks (`cli.flags`).
    """
    own = inspect.signature(function).parameters
    hints = typing.get_type_hints(function, include_extras=True)
    fields = fields_of(hints["settings"])
    parameters = {name: one.replace(annotation=hints[name], kind=_KIND) for name, one in own.items()}
    options = {field.name: _parameter(field) for field in fields}
    before = [one for name, one in parameters.items() if name not in ("settings", "json_file")]
    last = list(options).index(_LOADING) if _LOADING in options else len(options)
    listed = list(options.values())
    made = [*before, *listed[:last], parameters["json_file"], *listed[last:]]

    @functools.wraps(function)
    def run(**given: Any) -> None:
        try:
            settings = hints["settings"](**{field.name: given.pop(field.name) for field in fields})
            _quieten_libraries()
            function(settings=settings, **given)
        except InputError as error:
            error.args = (in_flags(str(error)),)
            raise

    run.__signature__ = inspect.Signature(made)  # type: ignore[attr-defined]  # how typer and inspect see it
    run.__annotations__ = {one.name: one.annotation for one in made}
    return run


_KIND = inspect.Parameter.KEYWORD_ONLY


def _parameter(field: Field) -> inspect.Parameter:
    required = field.default is dataclasses.MISSING
    option = typer.Option(
        *field.flags,
        metavar=field.option.metavar,
        help=in_flags(field.option.help) or None,
        min=field.option.least,
        show_default=not (required or field.default is None),
        parser=given_path if field.kind is Path else None,
    )
    kind: Any = list[field.kind] if field.option.many else field.kind  # type: ignore[name-defined]  # made as the program runs
    if field.optional:
        kind = kind | None
    default = inspect.Parameter.empty if required else field.default
    return inspect.Parameter(field.name, _KIND, default=default, annotation=Annotated[kind, option])


def _quieten_libraries() -> None:
    """No progress bars and warnings of Transformers and the hub: the command reports progress and problems itself."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
