"""``linearpatch doctor``: what this machine and installation can do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from linearpatch_kernels.cli.console import check_json, print_table, write_json
from linearpatch_kernels.cli.flags import in_flags
from linearpatch_kernels.cli.options import JsonFile
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.healing.ways import HEALS
from linearpatch_kernels.pruning.fits import FITS
from linearpatch_kernels.pruning.scores import SCORES
from linearpatch_kernels.report.tables import Table


def records() -> str:
    """What doctor's help says of the records that only the library names: families and implementations.

    It is made when it is shown: their modules import torch and Transformers, and records may be added until then.
    """
    from linearpatch_kernels.modeling.families import STOCK_FAMILIES
    from linearpatch_kernels.ops.backends import BACKENDS

    return (
        f"Families of models that can be cut, merged and fitted again: {STOCK_FAMILIES.described()}. Of most other "
        "decoders of Transformers layers can be removed, and patches put at the joints.\n\n"
        f"Implementations of the operators: {BACKENDS.described()}."
    )


def doctor(json_file: JsonFile = None) -> None:
    """Say what this machine and installation can do, and what is missing for the rest."""
    import importlib.metadata
    import platform
    import shutil

    import torch

    from linearpatch_kernels.demo_data import demo_model_path, demo_text
    from linearpatch_kernels.modeling.families import STOCK_FAMILIES
    from linearpatch_kernels.ops.backends import BACKENDS
    from linearpatch_kernels.text import cache_dir

    def version(package: str) -> str:
        if package == "torch":  # which says for what it was built, too
            return torch.__version__
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    def reason(check: Callable[[], object]) -> str:
        try:
            check()
        except InputError as error:
            return in_flags(str(error))
        return "yes"

    def free_disk() -> str:
        try:
            return f"{shutil.disk_usage(Path.cwd()).free / 1e9:.0f} GB"
        except OSError as error:
            return f"not known: {error.strerror}"

    check_json(json_file)
    packages = [
        "linearpatch-kernels",
        "torch",
        "transformers",
        "triton",
        "safetensors",
        "gguf",
        "peft",
        "accelerate",
        "lm-eval",
        "datasets",
        "vllm",
    ]
    summary: dict[str, dict[str, Any]] = {
        "machine": {
            "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            "cpu": torch.backends.cpu.get_cpu_capability() + f", {torch.get_num_threads()} threads",
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
            "free disk": free_disk(),
            "cache": str(cache_dir()),
        },
        "backends": {name: "yes" if (found := one.available()).ok else found.reason for name, one in BACKENDS.items()},
        "families": {name: one.about for name, one in STOCK_FAMILIES.items()},
        "scores": {name: one.about for name, one in SCORES.items()},
        "fits": {name: one.about for name, one in FITS.items()},
        "ways to heal": {name: one.about for name, one in HEALS.items()},
        "packages": {name: version(name) for name in packages},
        "demo": {"model": reason(demo_model_path), "texts": reason(lambda: demo_text("calibration"))},
    }
    told = {"backends": {name: f"{name}: {one.about}" for name, one in BACKENDS.items()}}
    for section, entries in summary.items():
        names = told.get(section, {})
        rows = [[names.get(name, name), str(state)] for name, state in entries.items()]
        print_table(Table(["what", "state"], rows, section.capitalize()))
    write_json(json_file, summary)
