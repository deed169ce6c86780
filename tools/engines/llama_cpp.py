"""Where llama-cpp-python is, which nothing here installs: it is compiled for a quarter of an hour."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from linearpatch_kernels.text import cache_dir

PYTHON = Path(os.environ.get("LINEARPATCH_LLAMA_CPP") or cache_dir() / "llama-cpp" / "bin" / "python")


def can_import(python: Path) -> bool:
    return python.is_file() and subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode == 0
