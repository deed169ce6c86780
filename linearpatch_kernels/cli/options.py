"""The arguments and flags that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import expanded
from linearpatch_kernels.pruning.scores import SCORES, scores_of_statistics

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Directory, hub id, .gguf file, or 'demo'.", show_default=False)
]


def given_path(text: str | Path) -> Path:
    """A path as it was given, with its ``~`` resolved: a shell leaves that of --output=~/there as it is."""
    if not str(text).strip():
        # To pathlib an empty name is the working directory.
        raise InputError("a path that was given is empty: give one, or leave the option out")
    return expanded(text)


Output = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="DIR", help="Where the result goes.", show_default=False, parser=given_path),
]
Drop = Annotated[
    int | None, typer.Option("--drop", metavar="N", min=1, help="How many layers to remove.", show_default=False)
]
Text = Annotated[
    Path | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="UTF-8 text to calibrate on (default: the demo text).",
        show_default=False,
        parser=given_path,
    ),
]
HeldoutText = Annotated[
    Path | None,
    typer.Option(
        "--heldout-text",
        metavar="FILE",
        help="Text for the report's figures (default: unused windows of --text).",
        show_default=False,
        parser=given_path,
    ),
]
Samples = Annotated[int, typer.Option("--samples", metavar="N", min=1, help="Calibration windows.")]
Length = Annotated[int, typer.Option("--length", metavar="N", min=2, help="Tokens per window.")]
ScoreOfStatistics = Annotated[
    str, typer.Option("--score", metavar="NAME", help=f"{SCORES.described(scores_of_statistics())}.")
]
Score = Annotated[str, typer.Option("--score", metavar="NAME", help=f"{SCORES.described()}.")]
Rank = Annotated[
    int | None,
    typer.Option(
        "--rank",
        metavar="R",
        min=1,
        help="Rank of the low-rank fits (default: 64, or the model's width where that is less).",
        show_default=False,
    ),
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
Dtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16, or auto (the checkpoint's own).")]
Device = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one).", show_default=False),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")
]
BatchSize = Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="Windows per forward pass.")]
