"""Build the compiled kernels where that can be done; without them the package installs and says so when it is used.

They need torch's headers and a C++20 compiler. Torch is looked for only when something is to be compiled, so that
metadata can be had without it, and is not imported: pip's isolated build hides the torch that is installed, but not
where it lies. So torch has to be there before this is installed.

Where nvcc is found (CUDA_HOME, the PATH, /usr/local/cuda) the CUDA kernels go into the same file, with CUDA's run-time
library inside, so that it loads where there is neither a driver nor CUDA. TORCH_CUDA_ARCH_LIST says for which GPUs, as
for torch's own extensions ("8.0;9.0+PTX"); without it, machine code for 8.0, 9.0, 10.0 and 12.0, as far as this nvcc
knows them, and PTX of the newest, which the driver compiles for newer GPUs when it first loads it.
LINEARPATCH_NO_CUDA=1 leaves the CUDA kernels out.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

# What lies in a folder of the name cuda is compiled where nvcc is found, all other sources always.
SOURCES = sorted(str(path) for path in Path("csrc").rglob("*.cpp") if path.parent.name != "cuda")
CUDA_SOURCES = sorted(str(path) for suffix in ("cpp", "cu") for path in Path("csrc").rglob(f"cuda/*.{suffix}"))
HEADERS = sorted(str(path) for suffix in ("h", "cuh") for path in Path("csrc").rglob(f"*.{suffix}"))
BINDINGS = str(Path("csrc/bindings.cpp"))

# libtorch's stable ABI as of 2.11: one file for every later torch and every Python from 3.11 on.
DEFINITIONS = [("TORCH_TARGET_VERSION", "0x020b000000000000"), ("Py_LIMITED_API", "0x030b0000")]
if namespace := os.environ.get("LINEARPATCH_NAMESPACE"):  # csrc/common/namespace.h
    DEFINITIONS.append(("LINEARPATCH_NAMESPACE", namespace))
COMPILE = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-missing-field-initializers"]
CUDA_COMPILE = [
    "-std=c++20",
    "-O3",
    "--expt-relaxed-constexpr",
    "-Xfatbin=-compress-all",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
]
CUDA_ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")


def find_cuda() -> Path | None:
    """The toolkit's folder, if there is one to be used."""
    if os.environ.get("LINEARPATCH_NO_CUDA", "0") not in ("", "0"):
        return None
    compiler = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), compiler and Path(compiler).resolve().parents[1], "/usr/local/cuda"]
    needed = ("bin/nvcc", "lib64/libcudart_static.a")
    return next((Path(place) for place in places if place and all(Path(place, file).exists() for file in needed)), None)


def nvcc_architectures(cuda: Path) -> list[str]:
    """Those that this nvcc compiles for, without the suffixes a and f: 8.0, 9.0, ..."""
    listed = subprocess.run([cuda / "bin" / "nvcc", "--list-gpu-arch"], check=True, capture_output=True, text=True)
    return [f"{number[:-1]}.{number[-1]}" for number in re.findall(r"compute_(\d+)", listed.stdout)]


def architecture_flags(asked: str, known: Sequence[str]) -> list[str]:
    """What nvcc is told of ``TORCH_CUDA_ARCH_LIST``; without it, of the default.

    Args:
        asked: the list, or nothing.
        known: what this nvcc compiles for.

    Raises:
        ValueError: a name that is none, or that this nvcc does not know.
    """
    names = re.split(r"[;,\s]+", asked.strip()) if asked.strip() else default_architectures(known)
    flags = []
    for name in names:
        parts = re.fullmatch(r"(\d+\.\d)([af]?)(\+PTX)?", name)
        if not parts:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST has {name!r}: write numbers, as in 8.0;9.0+PTX")
        if parts[1] not in known:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST has {name}, and this nvcc knows only {', '.join(known)}")
        number = parts[1].replace(".", "") + parts[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if parts[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def default_architectures(known: Sequence[str]) -> list[str]:
    here = [name for name in CUDA_ARCHITECTURES if name in known]
    if not here:
        wanted = ", ".join(CUDA_ARCHITECTURES)
        raise ValueError(f"this nvcc knows none of {wanted}: say in TORCH_CUDA_ARCH_LIST for which GPUs")
    if unknown := [name for name in CUDA_ARCHITECTURES if name not in known]:
        print(
            f"linearpatch_kernels: this nvcc does not know GPUs of {', '.join(unknown)}: their driver compiles PTX of"
            f" {here[-1]} when it first loads it, which takes seconds",
            file=sys.stderr,
        )
    return [*here[:-1], here[-1] + "+PTX"]


def find_torch() -> Path:
    """The folder of this Python's torch."""
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec is not None and spec.origin else []
    places += [Path(sysconfig.get_path(kind), "torch") for kind in ("platlib", "purelib")]
    for place in places:
        if (place / "include" / "torch" / "csrc" / "stable").is_dir():
            return place
    raise FileNotFoundError("torch 2.11 or newer is not installed: pip install torch, then install this again")


class BuildKernels(build_ext):
    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except Exception as error:  # no torch, no compiler, one that is too old: whatever it is, Python is enough
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"linearpatch_kernels is built without its compiled kernels: {reason}", file=sys.stderr)
            self.extensions = self.distribution.ext_modules = []

    def build_extension(self, extension: Extension) -> None:
        target = self.get_ext_fullpath(extension.name)
        if not (self.force or newer_group([*extension.sources, *extension.depends, __file__], target)):
            return
        torch = find_torch()
        flags = [*COMPILE, "-isystem", str(torch / "include")]
        cuda = find_cuda()

        def compiled(source: str, *macros: tuple[str, str]) -> str:
            (object_file,) = self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=[*extension.define_macros, *macros],
                extra_postargs=flags,
            )
            return object_file

        def compiled_for_gpus(source: str) -> str:
            if source.endswith(".cpp"):
                return compiled(source)
            target = Path(self.build_temp, source).with_suffix(".o")
            target.parent.mkdir(parents=True, exist_ok=True)
            host = ["-ccbin", os.environ["CXX"]] if os.environ.get("CXX") else []
            command = [cuda / "bin" / "nvcc", *CUDA_COMPILE, *gpus.result(), *host, "-c", source, "-o", target]
            subprocess.run(command, check=True)
            return str(target)

        def flags_for_gpus() -> list[str]:
            asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
            return architecture_flags(asked, nvcc_architectures(cuda)) if cuda else []

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            gpus = pool.submit(flags_for_gpus)  # what is wrong with it is wrong with all of the CUDA kernels
            for_gpus = [pool.submit(compiled_for_gpus, source) for source in CUDA_SOURCES if cuda]
            objects = list(pool.map(compiled, [source for source in extension.sources if source != BINDINGS]))
            failed = next((error for task in for_gpus if (error := task.exception())), None)
        if failed:
            print(f"linearpatch_kernels is built without its CUDA kernels: {failed}", file=sys.stderr)
        with_cuda = cuda and not failed
        objects.append(compiled(BINDINGS, *([("LINEARPATCH_CUDA", "1")] if with_cuda else [])))
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            [*objects, *(task.result() for task in for_gpus if with_cuda)],
            target,
            libraries=["torch_cpu", *(["cudart_static", "dl", "rt", "pthread"] if with_cuda else [])],
            library_dirs=[str(torch / "lib"), *([str(cuda / "lib64")] if with_cuda else [])],
            extra_postargs=["-Wl,--as-needed", "-Wl,--exclude-libs,libcudart_static.a"],
            target_lang="c++",
        )


class Wheel(bdist_wheel):
    def run(self) -> None:
        self.run_command("build")
        # Only now it is known whether there are kernels. Without them the wheel is everybody's, and must not be taken
        # for the one that has them.
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


KERNELS = Extension(
    "linearpatch_kernels._C",
    SOURCES,
    depends=[*HEADERS, *CUDA_SOURCES],
    define_macros=DEFINITIONS,
    py_limited_api=True,
    language="c++",
)

setup(
    ext_modules=[KERNELS],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
