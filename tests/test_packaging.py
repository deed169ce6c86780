"""What is installed: a light root, the public names, the floors of the house, and a whole wheel."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import torch

import linearpatch_kernels

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "linearpatch_kernels"
# What lies in a checkout and is no part of it.
IGNORED = (".*", "__pycache__", "*.so", "*.egg-info", "build", "dist", "demo-output")


def python(program: str, *, path: Path = ROOT) -> str:
    """What a program prints in a process of its own that finds the package under ``path``."""
    finished = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=path,
        env={**os.environ, "PYTHONPATH": str(path)},
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_the_root_imports_nothing_heavy() -> None:
    program = """
import sys
import linearpatch_kernels
linearpatch_kernels.__version__, dir(linearpatch_kernels), linearpatch_kernels.__all__
print(*{name.partition(".")[0] for name in sys.modules})
"""
    loaded = set(python(program).split())
    assert "linearpatch_kernels" in loaded
    assert not loaded & {"torch", "transformers", "triton", "numpy", "matplotlib", "typer", "rich", "safetensors"}


def test_a_name_brings_its_own_module_and_not_the_rest() -> None:
    program = """
import sys
from linearpatch_kernels import InputError, hadamard_transform, hadamard_patch
print(*sys.modules)
"""
    loaded = set(python(program).split())
    assert "torch" in loaded
    assert not loaded & {"transformers", "matplotlib", "typer", "linearpatch_kernels.modeling"}


@pytest.mark.parametrize("name", linearpatch_kernels.__all__)
def test_public_names_exist_and_are_documented(name: str) -> None:
    value = getattr(linearpatch_kernels, name)
    # A module has its whole path for a name.
    assert value.__name__.rpartition(".")[2] == name
    assert value.__doc__
    assert getattr(value, "__module__", value.__name__).startswith("linearpatch_kernels.")
    assert name in dir(linearpatch_kernels)


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(AttributeError, match="no attribute 'hadamard_catch'"):
        _ = linearpatch_kernels.hadamard_catch


def test_type_checkers_see_the_same_names() -> None:
    body = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body
    guarded = [node for node in body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    imported = [node for block in guarded for node in ast.walk(block) if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: node.module for node in imported for alias in node.names}
    assert sorted(seen) == sorted(linearpatch_kernels.__all__) == linearpatch_kernels.__all__
    for name, module in seen.items():
        assert getattr(linearpatch_kernels, name) is getattr(sys.modules[str(module)], name)


def lint_imports(directory: Path) -> subprocess.CompletedProcess[str]:
    command = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    return subprocess.run(
        [sys.executable, "-c", command, "--no-cache"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(directory)},
    )


def test_an_arrow_only_points_down() -> None:
    checked = lint_imports(ROOT)
    assert checked.returncode == 0, checked.stdout
    assert "2 kept, 0 broken" in checked.stdout


def test_an_arrow_that_points_up_is_noticed(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / PACKAGE.name / "text.py").open("a", encoding="utf-8") as module:
        module.write("\n\nfrom linearpatch_kernels.calibration import Span\n")
    checked = lint_imports(tmp_path)
    assert checked.returncode == 1
    assert "linearpatch_kernels.text -> linearpatch_kernels.calibration" in checked.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built on a machine without a compiler."""
    source = tmp_path_factory.mktemp("source") / "project"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*IGNORED, "tests"))
    place = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", place, source],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "CXX": "/bin/false", "CC": "/bin/false"},
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (file,) = place.glob("*.whl")
    return file


def test_the_source_distribution_is_the_whole_project(tmp_path: Path) -> None:
    """It lacked the tests' helpers, the benchmarks, the docs, and the generator of a file that it had."""
    source = tmp_path / "project"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*IGNORED))
    parts = ("linearpatch_kernels", "csrc", "tests", "benchmarks", "docs", "examples", "tools", ".ci")
    shutil.copytree(ROOT / ".ci", source / ".ci")
    wanted = {str(file.relative_to(source)) for part in parts for file in (source / part).rglob("*") if file.is_file()}
    wanted |= {"README.md", "CHANGELOG.md", "LICENSE", "Makefile", "constraints.txt", "pyproject.toml", "setup.py"}
    command = f"from setuptools.build_meta import build_sdist; print(build_sdist({str(tmp_path)!r}))"
    made = python(command, path=source).splitlines()[-1]
    with tarfile.open(tmp_path / made) as archive:
        found = {file.name.partition("/")[2] for file in archive if file.isfile()}
    assert wanted - found == set()


def test_torch_is_found_from_a_build_that_hides_it() -> None:
    """pip's isolated build has setuptools and no torch; the kernels are built nevertheless."""
    program = f"""
import importlib.util, runpy, setuptools
setuptools.setup = lambda **_: None
importlib.util.find_spec = lambda name: None
print(runpy.run_path({str(ROOT / "setup.py")!r})["find_torch"]())
"""
    assert Path(python(program).strip()) == Path(torch.__file__).parent


def test_a_wheel_without_kernels_is_not_named_like_one_that_has_them(wheel: Path) -> None:
    """Both were cp311-abi3-linux: pip kept the one that was built without torch, and put it in place of the other."""
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so") or ".data/" in name]
        (about,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        said = message_from_bytes(archive.read(about))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert said.get_all("Tag") == ["py3-none-any"]
    assert said["Root-Is-Purelib"] == "true"


def architecture_flags(asked: str, known: str) -> str:
    """What setup.py tells an nvcc that knows some GPUs; or what it says is wrong; then what it prints."""
    program = f"""
import runpy, setuptools, sys
setuptools.setup = lambda **_: None
sys.stderr = sys.stdout
flags = runpy.run_path({str(ROOT / "setup.py")!r})["architecture_flags"]
try:
    print(*flags({asked!r}, {known!r}.split()))
except ValueError as error:
    print(error)
"""
    return python(program)


def test_gpus_that_are_compiled_for() -> None:
    def flag(gpu: str, kind: str = "sm") -> str:
        return f"-gencode=arch=compute_{gpu},code={kind}_{gpu}"

    today, older = "7.5 8.0 8.6 9.0 10.0 12.0", "7.5 8.0 8.6 9.0"
    machine_code = [flag(gpu) for gpu in ("80", "90", "100", "120")]
    assert architecture_flags("", today).split() == [*machine_code, flag("120", "compute")]
    said = architecture_flags("", older)
    assert said.splitlines()[-1].split() == [flag("80"), flag("90"), flag("90", "compute")]
    assert "this nvcc does not know GPUs of 10.0, 12.0: their driver compiles PTX of 9.0" in said
    assert architecture_flags("8.6;9.0a+PTX", older).split() == [flag("86"), flag("90a"), flag("90a", "compute")]
    assert "has 12.0, and this nvcc knows only 7.5, 8.0, 8.6, 9.0" in architecture_flags("8.0 12.0", older)
    assert "has 'Hopper': write numbers" in architecture_flags("Hopper", today)
    assert "knows none of 8.0, 9.0, 10.0, 12.0" in architecture_flags("", "5.2 6.0")


def test_the_wheel_is_whole(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(about))
        scripts = archive.read(about.replace("METADATA", "entry_points.txt")).decode()
    sources = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")}
    assert sources | {"linearpatch_kernels/py.typed"} <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"linearpatch_kernels"}
    assert "linearpatch = linearpatch_kernels.cli:main" in scripts
    assert metadata["Name"] == "linearpatch-kernels"
    assert metadata["Version"] == linearpatch_kernels.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert any(name.endswith("LICENSE") for name in names)
    needed = {line.split(";")[0].strip() for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert not any("==" in line for line in needed)


def test_the_installed_wheel_answers(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    program = """
import sys, linearpatch_kernels
from linearpatch_kernels.cli import main
print(linearpatch_kernels.__file__)
sys.argv = ["linearpatch", "--help"]
main()
"""
    printed = python(program, path=tmp_path)
    assert printed.splitlines()[0].startswith(str(tmp_path))
    assert "prune" in printed
