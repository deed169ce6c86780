"""Let a CUDA build of torch run on a machine that has none of NVIDIA's libraries: its CPU half, for tests.

``python tools/torch_without_cuda.py TORCH STUBS``, with TORCH the installed package's folder, fills the folder STUBS;
set ``LD_LIBRARY_PATH=STUBS`` for what imports that torch. It needs readelf, nm and gcc.

torch's shared libraries name others that the loader must find (libcublas.so.13, ...) before Python can import torch,
gigabytes in all, although a machine without a GPU never calls them. For each that is neither beside torch nor on the
system, a small library of the same name is written. It defines every symbol that torch wants of it, under the version
that torch wants; each is a function that returns 35 (cudaErrorInsufficientDriver; in the other libraries an error of
theirs), so that a call fails, and torch says that there is no GPU.

An ELF file says which library a symbol is from where it has a version, and nowhere else. Those without one that look
like NVIDIA's are defined in every library that is wanted without versions.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

_NVIDIA = re.compile(r"_{0,2}(cu|nv|nccl|cupti)", re.IGNORECASE)
_ERROR = 35


def write_stubs(torch: Path, target: Path) -> list[str]:
    """The names of the libraries that were missing, and are in ``target`` now."""
    libraries = sorted((torch / "lib").glob("*.so*"))
    wanted = {name for library in libraries for name in _needed(library)}
    missing = sorted(wanted - {library.name for library in libraries} - _of_the_system())
    versions = _versions(libraries)
    symbols = _undefined(libraries)
    plain = {symbol for symbol in symbols[""] if _NVIDIA.match(symbol)}
    target.mkdir(parents=True, exist_ok=True)
    for name in missing:
        versioned = {version: symbols[version] for version in sorted(versions[name])}
        _write(target, name, versioned, plain if not versioned else ())
    return missing


def _needed(library: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.*)\]", _output("readelf", "--dynamic", library))


def _of_the_system() -> set[str]:
    return {line.split()[0] for line in _output("ldconfig", "-p").splitlines() if "=>" in line}


def _versions(libraries: Iterable[Path]) -> dict[str, set[str]]:
    """A needed library -> the versions of symbols that are wanted of it."""
    found: dict[str, set[str]] = defaultdict(set)
    for library in libraries:
        # A section of readelf's lists first what the library defines, then, file by file, what it needs.
        _, _, needs = _output("readelf", "--version-info", library).partition("Version needs section")
        file = ""
        for line in needs.splitlines():
            if named := re.search(r"File: (\S+)", line):
                file = named[1]
            elif version := re.search(r"Name: (\S+)\s+Flags", line):
                found[file].add(version[1])
    return found


def _undefined(libraries: Iterable[Path]) -> dict[str, set[str]]:
    """A version ("": none) -> the symbols of it that no library of torch's own defines."""
    defined: set[str] = set()
    wanted: set[tuple[str, str]] = set()
    for library in libraries:
        for line in _output("nm", "--dynamic", "--with-symbol-versions", library).splitlines():
            kind, name = line.split()[-2:]
            symbol, _, version = name.partition("@")
            if kind == "U":
                wanted.add((symbol, version.strip("@")))
            elif kind not in "wv":
                defined.add(symbol)
    by_version: dict[str, set[str]] = defaultdict(set)
    for symbol, version in wanted:
        if symbol not in defined:
            by_version[version].add(symbol)
    return by_version


def _write(target: Path, name: str, versioned: Mapping[str, Iterable[str]], plain: Iterable[str]) -> None:
    symbols = sorted({*plain, *(symbol for those in versioned.values() for symbol in those)})
    source, script = target / f"{name}.c", target / f"{name}.map"
    lines = [f"static int failing(void) {{ return {_ERROR}; }}"]
    # One function serves every signature: whatever it was called with, its result is in a register.
    lines += [f'int {symbol}(void) __attribute__((alias("failing")));' for symbol in symbols]
    source.write_text("\n".join(lines) + "\n")
    nodes = [f"{node} {{ global: {' '.join(f'{symbol};' for symbol in those)} }};" for node, those in versioned.items()]
    script.write_text("\n".join(nodes))
    options = [f"-Wl,--version-script,{script}"] if nodes else []
    command: list[str | Path] = [
        "gcc",
        "-shared",
        "-fPIC",
        "-fno-builtin",
        f"-Wl,-soname,{name}",
        *options,
        "-o",
        target / name,
        source,
    ]
    subprocess.run(command, check=True)
    source.unlink()
    script.unlink()


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    print(*write_stubs(Path(sys.argv[1]), Path(sys.argv[2])), sep="\n")
