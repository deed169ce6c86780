"""The docstrings of the package's public names -> ``docs/reference/python.md``.

``python tools/python_reference.py`` writes the page, with a Python that has the package. A test compares the page with
what the command makes now.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import linearpatch_kernels
from linearpatch_kernels.settings import Field, Settings, fields_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "python.md"
MADE_BY = "<!-- made by tools/python_reference.py from the docstrings: change those, not this page -->"
INTRODUCTION = """# Python

The public names of `linearpatch_kernels`, in the order of the alphabet. A tensor's shape stands in brackets. Row
vectors multiply matrices from the left: `x @ H`.

```python
import linearpatch_kernels as lp
```"""
SECTIONS = ("Args", "Attributes", "Returns", "Raises")
_LONGEST = 100


def page() -> str:
    """The whole page in Markdown."""
    names = linearpatch_kernels.__all__
    listed = " · ".join(f"[`{name}`](#{name.lower()})" for name in names)
    entries = "\n\n".join(entry(name, getattr(linearpatch_kernels, name)) for name in names)
    return f"{MADE_BY}\n\n{INTRODUCTION}\n\n{listed}\n\n{entries}\n"


def entry(name: str, thing: Any) -> str:
    """A function, or a class or module with those of its public members that say what they are for."""
    parts = [f"## `{name}`", *signature(name, thing), *markdown(inspect.getdoc(thing))]
    for member, told in public_members(thing):
        called = f"{name}.{member}"
        parts += [f"### `{called}`", *signature(called, getattr(thing, member)), *markdown(inspect.getdoc(told))]
        parts += fields(told)
    return "\n\n".join(parts)


def fields(thing: Any) -> list[str]:
    """What the settings of a recipe are for: a list of their fields."""
    if not inspect.isclass(thing) or not issubclass(thing, Settings):
        return []
    entries = []
    for field in fields_of(thing):
        one = f"Sequence[{field.kind.__name__}]" if field.option.many else field.kind.__name__
        kind = f"{one}{' | None' if field.optional else ''}"
        default = "" if field.default is dataclasses.MISSING else f" = {value_of(field)}"
        entries.append(f"- `{field.name}: {kind}{default}` {inline(field.option.help)}".rstrip())
    return ["\n".join(entries)]


def value_of(field: Field) -> str:
    return repr(str(field.default) if field.kind is Path and field.default is not None else field.default)


def public_members(thing: Any) -> Iterator[tuple[str, Any]]:
    """Name and what has the docstring, in the order of the source; of a module, what has no entry of its own."""
    if inspect.ismodule(thing):
        for name in thing.__all__:
            if name not in linearpatch_kernels.__all__ or getattr(linearpatch_kernels, name) is not vars(thing)[name]:
                yield name, vars(thing)[name]
        return
    for name, member in vars(thing).items() if inspect.isclass(thing) else ():
        told = getattr(member, "__func__", member)
        own = callable(told) or isinstance(told, property)
        if not name.startswith("_") and own and getattr(told, "__doc__", None):
            yield name, told


def signature(name: str, thing: Any) -> list[str]:
    """A block of code with the parameters as the source has them; no block for an attribute."""
    if not callable(thing) or (inspect.isclass(thing) and (not made_by_us(thing) or issubclass(thing, Settings))):
        return []
    found = inspect.signature(thing)
    shown, starred = [], False
    for parameter in found.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            shown.append("*")
        starred = starred or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        shown.append(("*" if parameter.kind is parameter.VAR_POSITIONAL else "") + declared(parameter))
    returned = "" if found.return_annotation in (found.empty, None, "None") else f" -> {plain(found.return_annotation)}"
    line = f"{name}({', '.join(shown)}){returned}"
    if len(line) > _LONGEST:
        line = f"{name}(\n    " + ",\n    ".join(shown) + f",\n){returned}"
    return [f"```python\n{line}\n```"]


def made_by_us(thing: type) -> bool:
    """Whether the class says itself how it is made: exceptions and abstract modules leave that to Python and torch."""
    return any("__init__" in vars(one) or hasattr(one, "_fields") for one in thing.__mro__ if ours(one))


def ours(thing: type) -> bool:
    return thing.__module__.startswith(linearpatch_kernels.__name__)


def declared(parameter: inspect.Parameter) -> str:
    kind = "" if parameter.annotation is parameter.empty else f": {plain(parameter.annotation)}"
    if parameter.default is parameter.empty:
        return f"{'**' if parameter.kind is parameter.VAR_KEYWORD else ''}{parameter.name}{kind}"
    value = parameter.default
    if isinstance(value, Enum):
        told = f"{type(value).__name__}.{value.name}"
    elif repr(value) == "<factory>":  # of a dataclass
        told = "..."
    else:  # a function's repr has its address
        told = getattr(value, "__name__", None) or repr(value)
    return f"{parameter.name}{kind} = {told}"


def plain(annotation: Any) -> str:
    """An annotation as it is written."""
    return str(getattr(annotation, "__forward_arg__", annotation))


def markdown(docstring: str | None) -> list[str]:
    """A docstring's paragraphs, its blocks of code and its sections, as blocks of Markdown."""
    blocks: list[str] = []
    code = False
    for block in re.split(r"\n\s*\n", docstring or ""):
        head, _, body = block.partition("\n")
        if head.rstrip(":") in SECTIONS and head.endswith(":"):
            body = textwrap.dedent(body)
            blocks.append(f"**{head.rstrip(':')}**\n\n{inline(body) if head == 'Returns:' else listed(body)}")
        elif code and block.startswith("    "):
            blocks.append(f"```python\n{textwrap.dedent(block)}\n```")
        else:
            code = block.endswith("::")
            blocks.append(inline(block.removesuffix("::") + (":" if code else "")))
    return blocks


def listed(body: str) -> str:
    """The entries of a section: a line that is indented goes on with the entry before it."""
    entries: list[str] = []
    for line in body.splitlines():
        if line.startswith(" ") and entries:
            entries[-1] += f" {line.strip()}"
        else:
            entries.append(line)
    return "\n".join(f"- {inline(named(one))}" for one in entries)


def named(line: str) -> str:
    """What an entry is about, as code."""
    about, colon, rest = line.partition(": ")
    if not colon or not re.fullmatch(r"[\w`, ]+", about):
        return line
    return ", ".join(f"`{name.strip('`')}`" for name in about.split(", ")) + f": {rest}"


def inline(text: str) -> str:
    """Roles and double backticks become Markdown's code; what Markdown would take for its own is escaped."""
    text = re.sub(r":\w+:`~?([^`]+)`", lambda role: f"`{role[1].split('.')[-1]}`", text)
    parts = re.split(r"(``.+?``|`[^`]+`)", text, flags=re.DOTALL)
    return "".join(
        f"`{' '.join(part.strip('`').split())}`" if part.startswith("`") else re.sub(r"([*_<])", r"\\\1", part)
        for part in parts
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
