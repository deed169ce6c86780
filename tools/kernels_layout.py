"""``python tools/kernels_layout.py DIR``: the operators as the package ``kernels`` of Hugging Face loads them.

Writes DIR/build/VARIANT with the operators' modules, whose imports are made relative, the CPU kernels, built for this,
and metadata.json. ``kernels.get_local_kernel(Path("DIR"))`` loads it. Modules and torch operators have names of their
own, made of what the sources hold, so that several versions, and linearpatch_kernels itself, share a process.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "linearpatch_kernels"
# torch's stable ABI that setup.py builds for: any torch from 2.11 on.
VARIANT = f"torch-stable-abi211-cpu-{platform.machine()}-{platform.system().lower()}"
SHARED_OBJECT = "_C.abi3.so"
OLDEST_KERNELS = "0.17.2"  # the one that it was tried with


def module_file(name: str) -> Path | None:
    """Where a module of the package lies, relative to it; None: it is none."""
    _, *parts = name.split(".")
    places = (Path(*parts).with_suffix(".py"), Path(*parts, "__init__.py")) if parts else ()
    return next((place for place in places if (PACKAGE / place).is_file()), None)


def imported(file: Path) -> Iterator[str]:
    """The modules of the package that one of its files imports, by their whole names."""
    for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE.name:
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def operators_modules() -> list[Path]:
    """The files of the operators, and of what they import."""
    found = {file.relative_to(PACKAGE) for file in (PACKAGE / "ops").rglob("*.py")}
    waiting = [*found]
    while waiting:
        for file in map(module_file, imported(waiting.pop())):
            if file and file not in found:
                found.add(file)
                waiting.append(file)
    return sorted(found)


def with_relative_imports(file: Path) -> str:
    """The text of a file of the package, as it reads under a package of any other name."""
    dots = "." * len(file.parts)
    text = (PACKAGE / file).read_text(encoding="utf-8")
    text = re.sub(rf"^(\s*from ){PACKAGE.name}\.(\S+ import )", rf"\1{dots}\2", text, flags=re.MULTILINE)
    return re.sub(rf"^(\s*from ){PACKAGE.name}( import )", rf"\1{dots}\2", text, flags=re.MULTILINE)


def public_names(files: list[Path]) -> str:
    """The module's own ``__init__.py``: of the package's public names, those that these files define."""
    lines, names = ['"""The operators of linearpatch-kernels."""\n'], []
    for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and module_file(str(node.module)) in files:
            names += [alias.name for alias in node.names]
            lines.append(
                f"from {str(node.module).removeprefix(PACKAGE.name)} import {', '.join(names[-len(node.names) :])}"
            )
    return "\n".join([*lines, "", f"__all__ = {json.dumps(sorted(names))}", ""])


def identity(files: list[Path]) -> str:
    """A name for what these files and the kernels hold: of the module, and of the operators' namespace."""
    sources = sorted(file for file in (ROOT / "csrc").rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in (*(PACKAGE / file for file in files), PACKAGE / "__init__.py", *sources, ROOT / "setup.py"):
        digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return f"_{PACKAGE.name}_cpu_{digest.hexdigest()[:8]}"


def write_modules(variant: Path, files: list[Path], name: str) -> None:
    texts = {file: with_relative_imports(file) for file in files}
    texts[Path("_ops.py")] = f'"""The namespace of these operators in torch.ops."""\n\nNAMESPACE = "{name}"\n'
    texts[Path("__init__.py")] = public_names(files)
    for file, text in texts.items():
        (variant / file).parent.mkdir(parents=True, exist_ok=True)
        (variant / file).write_text(text, encoding="utf-8")


def build_kernels(variant: Path, name: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        command = [
            sys.executable,
            "setup.py",
            "-q",
            "build_ext",
            f"--build-lib={place}",
            f"--build-temp={place}/objects",
        ]
        subprocess.run(
            command, check=True, cwd=ROOT, env={**os.environ, "LINEARPATCH_NAMESPACE": name, "LINEARPATCH_NO_CUDA": "1"}
        )
        built = Path(place, PACKAGE.name, SHARED_OBJECT)
        if not built.exists():
            sys.exit("the kernels were not built, for the reason above")
        shutil.copy(built, variant / SHARED_OBJECT)


def write_metadata(variant: Path, name: str) -> None:
    files = sorted(file for file in variant.rglob("*") if file.is_file())
    digests = {
        file.relative_to(variant).as_posix(): b64encode(hashlib.sha256(file.read_bytes()).digest()).decode()
        for file in files
    }
    metadata = {
        "id": name,
        "name": PACKAGE.name.replace("_", "-"),
        "version": 0,  # kernels' own word for what may still change
        "license": "Apache-2.0",
        "kernels-minver": OLDEST_KERNELS,
        "python-depends": [],
        "backend": {"type": "cpu"},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("directory", type=Path, metavar="DIR")
    variant = parser.parse_args().directory / "build" / VARIANT
    if variant.exists():
        sys.exit(f"{variant} is there already: remove it, or name another directory")
    files = operators_modules()
    name = identity(files)
    write_modules(variant, files, name)
    build_kernels(variant, name)
    write_metadata(variant, name)
    print(f"{variant}: {len(files)} modules, torch.ops.{name}")


if __name__ == "__main__":
    main()
