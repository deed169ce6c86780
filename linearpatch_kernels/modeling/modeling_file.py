"""The modeling file of a patched checkpoint, put together from this package's own sources.

A checkpoint must load where the package is not installed, so its directory carries the code. Nothing is written twice
for that: the file holds the definitions that a patched model reaches (`patched_classes`, the patches, the reference
operator, the Hadamard transform), copied from the modules they live in, and no other.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Container
from dataclasses import dataclass, field
from functools import cache

from linearpatch_kernels.modeling.families import Family, twin_name

_PACKAGE = "linearpatch_kernels"
_OPERATOR = ("linearpatch_kernels.ops.hadamard_patch", "hadamard_patch")
_REFERENCE = ("linearpatch_kernels.ops.hadamard_patch.reference", "hadamard_patch_reference")

# The oldest with which the modeling file was tried: tests/field/test_older_transformers.py.
_OLDEST = {"python": (3, 11), "transformers": (4, 57)}

_HEAD = r'''"""{stock} with patched joints. Apache-2.0.

Generated from the sources of linearpatch-kernels when the checkpoint was saved; needs torch and transformers only, and
uses the package's faster operator where that is installed.
"""

from __future__ import annotations

import platform
import re

import transformers


def _version(text):
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


# Before these, the classes that are derived from below are others, or read the config otherwise.
if _version(platform.python_version()) < {python} or _version(transformers.__version__) < {transformers}:
    raise ImportError(
        "this model needs Python >= {python_name} and transformers >= {transformers_name}, not "
        f"{{platform.python_version()}} and {{transformers.__version__}}: pip install -U transformers"
    )

'''

_FOOT = """


try:
    from {operator_module} import {operator}
except ImportError:
    {operator} = {reference}

{names} = patched_classes(
    {classes},
    own_code=lambda: Path(__file__).read_text(encoding="utf-8"),
)
"""


@dataclass(frozen=True)
class _Module:
    """The top level of one module of this package: what it defines and what it imports."""

    lines: list[str]
    definitions: dict[str, ast.stmt] = field(default_factory=dict)
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)
    own_imports: dict[str, str] = field(default_factory=dict)

    def text(self, statement: ast.stmt) -> str:
        """The source lines of a statement, with its decorators and the comment above it."""
        first = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))]) - 1
        while first and self.lines[first - 1].startswith("#") and not self.lines[first - 1].startswith("# ---"):
            first -= 1
        return "\n".join(self.lines[first : statement.end_lineno])


@cache
def _module(name: str) -> _Module:
    source = inspect.getsource(importlib.import_module(name))
    module = _Module(source.splitlines())
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith(_PACKAGE):
            module.own_imports.update({alias.name: str(statement.module) for alias in statement.names})
        elif isinstance(statement, ast.ImportFrom | ast.Import):
            origin = str(statement.module) if isinstance(statement, ast.ImportFrom) else ""
            for alias in statement.names:
                bound = alias.asname or alias.name.partition(".")[0]
                module.imports[bound] = (origin, f"{alias.name} as {alias.asname}" if alias.asname else alias.name)
        else:
            module.definitions.update(dict.fromkeys(_bound_names(statement), statement))
    return module


def _bound_names(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _used_names(statement: ast.stmt) -> set[str]:
    return {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}


def _reach(roots: list[tuple[str, str]]) -> tuple[set[tuple[str, str]], dict[str, dict[str, ast.stmt]]]:
    """The foreign names and, per module, the definitions that the roots ``(module, name)`` need."""
    imports: set[tuple[str, str]] = set()
    found: dict[str, dict[str, ast.stmt]] = {}
    todo = list(roots)
    while todo:
        place, name = todo.pop()
        if (place, name) == _OPERATOR or name in found.get(place, {}):
            continue
        module = _module(place)
        if name in module.definitions:
            statement = module.definitions[name]
            found.setdefault(place, {})[name] = statement
            todo += [(place, used) for used in _used_names(statement)]
        elif name in module.own_imports:
            todo.append((module.own_imports[name], name))
        elif name in module.imports:
            imports.add(module.imports[name])
    return imports, found


def _import_lines(imports: set[tuple[str, str]]) -> str:
    lines = [f"import {name}" for origin, name in sorted(imports) if not origin]
    for origin in sorted({origin for origin, _ in imports if origin}):
        names = sorted(name for place, name in imports if place == origin)
        lines.append(f"from {origin} import {', '.join(names)}")
    return "\n".join(lines)


def _height(place: str, places: Container[str]) -> int:
    """How many of the places stand below this one: what a module imports is defined before it."""
    below = {name for name in _module(place).own_imports.values() if name in places}
    return 1 + max((_height(name, places) for name in below), default=0)


def modeling_source(family: Family) -> str:
    """The text of ``modeling_linearpatch.py`` for one family: imports torch and transformers, nothing else."""
    roots = [(f"{_PACKAGE}.modeling.patched", "patched_classes"), (f"{_PACKAGE}.nn", "build_patch"), _REFERENCE]
    imports, found = _reach(roots)
    names = [name for definitions in found.values() for name in definitions]
    assert len(names) == len(set(names)), f"two modules define the same name: {sorted(names)}"
    stock = [family.config_class, family.decoder_class, family.causal_lm_class]
    imports |= {("pathlib", "Path"), *((cls.__module__, cls.__name__) for cls in stock)}
    oldest: dict[str, object] = {**_OLDEST}
    oldest |= {f"{name}_name": ".".join(map(str, version)) for name, version in _OLDEST.items()}
    text = _HEAD.format(stock=family.causal_lm_class.__name__, **oldest) + _import_lines(imports)
    for place in sorted(found, key=lambda place: _height(place, found)):
        text += f"\n\n\n# --- {place} ---"
        for statement in sorted(found[place].values(), key=lambda one: one.lineno):
            text += "\n\n\n" + _module(place).text(statement)
    return text + _FOOT.format(
        operator_module=_OPERATOR[0],
        operator=_OPERATOR[1],
        reference=_REFERENCE[1],
        names=", ".join(twin_name(cls, family.config_class) for cls in stock),
        classes=",\n    ".join(cls.__name__ for cls in stock),
    )
