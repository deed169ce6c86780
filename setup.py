"""Build the compiled kernels where that can be done; without them the package installs and says so when it is used.

They need torch's headers and a C++20 compiler. Torch is looked for only when something is to be compiled, so that
metadata can be had without it; an isolated build has no torch, which is why the set-up commands turn isolation off.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

SOURCES = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.h"))

# libtorch's stable ABI as of 2.13: one file for every later torch and every Python from 3.11 on.
DEFINITIONS = [("TORCH_TARGET_VERSION", "0x020d000000000000"), ("Py_LIMITED_API", "0x030b0000")]
COMPILE = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-missing-field-initializers"]


class BuildKernels(build_ext):
    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except Exception as error:  # no torch, no compiler, one that is too old: whatever it is, Python is enough
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"linearpatch_kernels is built without its compiled kernels: {reason}", file=sys.stderr)
            self.extensions = []

    def build_extension(self, extension: Extension) -> None:
        target = self.get_ext_fullpath(extension.name)
        if not (self.force or newer_group([*extension.sources, *extension.depends, __file__], target)):
            return
        from torch.utils.cpp_extension import include_paths, library_paths

        flags = [*COMPILE, *(argument for path in include_paths() for argument in ("-isystem", path))]

        def compiled(source: str) -> str:
            (object_file,) = self.compiler.compile(
                [source], output_dir=self.build_temp, macros=extension.define_macros, extra_postargs=flags
            )
            return object_file

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, extension.sources))
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects,
            target,
            libraries=["torch_cpu"],
            library_dirs=library_paths(),
            extra_postargs=["-Wl,--as-needed"],
            target_lang="c++",
        )


KERNELS = Extension(
    "linearpatch_kernels._C",
    SOURCES,
    depends=HEADERS,
    define_macros=DEFINITIONS,
    py_limited_api=True,
    language="c++",
)

setup(
    ext_modules=[KERNELS],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
