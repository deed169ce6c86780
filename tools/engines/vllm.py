"""vLLM's own environment, which ``make vllm`` makes: where it is, and what a process in it is given."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import linearpatch_kernels
from linearpatch_kernels.text import cache_dir

REQUIREMENTS = Path(__file__).parents[2] / "tests" / "engines" / "vllm-requirements.txt"
VENV = Path(os.environ.get("LINEARPATCH_VLLM") or cache_dir() / "vllm")


def is_complete(venv: Path) -> bool:
    """The last step of ``make vllm`` is a copy of what it installed."""
    installed = venv / REQUIREMENTS.name
    return installed.is_file() and installed.read_bytes() == REQUIREMENTS.read_bytes()


def plug_in(root: Path) -> Path:
    """A folder from which vLLM's environment takes this package as if it were installed there."""
    package = Path(linearpatch_kernels.__file__).parent
    folder = root / "installed"
    about = folder / f"linearpatch_kernels-{linearpatch_kernels.__version__}.dist-info"
    about.mkdir(parents=True)
    (folder / package.name).symlink_to(package)
    (about / "METADATA").write_text(f"Name: linearpatch-kernels\nVersion: {linearpatch_kernels.__version__}\n")
    named = tomllib.loads((package.parent / "pyproject.toml").read_text())["project"]["entry-points"]
    for group, points in named.items():
        (about / "entry_points.txt").write_text(
            f"[{group}]\n" + "".join(f"{name} = {place}\n" for name, place in points.items())
        )
    return folder


def environment_of_vllm(root: Path, installed: Path | None = None) -> dict[str, str]:
    """The variables of a process in vLLM's environment, which finds this package in ``installed`` or not at all."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # The processes of one model would share a core that each binds for itself.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(root / "vllm-cache"),
        "HF_HOME": str(root / "home"),
        "HF_HUB_OFFLINE": "1",
        # Not by a flag: vLLM starts further processes.
        "PYTHONNOUSERSITE": "1",
        "PYTHONSAFEPATH": "1",
    }
    return environment if installed is None else {**environment, "PYTHONPATH": str(installed)}
