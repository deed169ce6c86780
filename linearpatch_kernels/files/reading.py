"""Reading what somebody else may have written, edited or cut short."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from linearpatch_kernels.errors import InputError

# The longest JSON that is read whole: configs, plans and indexes of the largest models are a few MB.
_MOST_JSON = 256 << 20


@contextlib.contextmanager
def reading(path: str | os.PathLike[str], cure: str) -> Iterator[None]:
    """What is raised inside becomes an `InputError` that names the file and says what to do (an `InputError` stays).

    Parsers fail in as many ways as there are formats, and a damaged file finds them all: no list of exceptions is
    complete.

    Args:
        path: the file, as it is named to the person.
        cure: what to do, without a full stop: ``"copy the model again"``.
    """
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{error.filename or path} is missing: {cure}") from error
    except Exception as error:
        raise InputError(f"{path} cannot be read ({said(error)}): {cure}") from error


def said(error: BaseException) -> str:
    """The first line of what an exception says (the first two, where one announces the other), or its name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):
        return f"it has no {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # A line that ends so announces the one that says it.
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:300]


def read_json(path: str | os.PathLike[str], cure: str) -> dict[str, Any]:
    """The JSON object in a UTF-8 file; `InputError` for anything else, as `reading` says it."""
    file = Path(path)
    with reading(file, cure):
        with open(file, "rb") as stream:
            raw = stream.read(_MOST_JSON + 1)
        if len(raw) > _MOST_JSON:
            raise InputError(f"{file} is larger than any such file: {cure}")
        content = json.loads(raw)
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no JSON object: {cure}")
    return content


def refuse_mixture(directory: Path, what: str) -> NoReturn:
    """Raise the InputError of a directory whose files come from different outputs."""
    raise InputError(f"the files in {directory} do not belong together ({what}): make the directory again")


def finite(content: Any) -> Any:
    """JSON values in which what is not finite is null: JSON has no word for it."""
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def json_text(content: Mapping[str, Any]) -> str:
    """Indented JSON, in which what is not finite is null: JSON has no word for it."""
    return json.dumps(finite(content), indent=2, allow_nan=False) + "\n"
