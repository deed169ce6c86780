"""The vLLM plug-in: patched checkpoints run on vLLM's own models.

vLLM calls `register` in each of its processes (entry point ``vllm.general_plugins``). It makes two things known:

- for every architecture of vLLM's that writes text, its twin ``LinearPatch<architecture>``, the name that a patched
  checkpoint has in ``architectures``. `model` makes the class when vLLM asks for it;
- a reader of configs (`config`), with which a patched checkpoint loads without ``--trust-remote-code``.

Where the plug-in is missing, vLLM knows neither name and refuses the checkpoint. Nothing but the standard library is
imported here: every vLLM process imports this module, whatever model it serves.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator

TESTED = ("0.32",)
"""The versions of vLLM (major and minor) that tests/engines ran."""
PREFIX = "LinearPatch"
# What the names of architectures that write text end in.
_WRITES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_MODELS = f"{__name__}.model"
# vLLM shows what loggers below its own say.
_LOGGER = logging.getLogger("vllm.linearpatch_kernels")


def register() -> None:
    """Make patched checkpoints known to the vLLM of this process; once or several times.

    A vLLM that lacks what this needs serves its other models as before, and one line says so.
    """
    try:
        from vllm.model_executor.models import ModelRegistry

        from linearpatch_kernels.engines.vllm.config import add_reader

        for name in [*ModelRegistry.get_supported_archs()]:
            if name.startswith(PREFIX) or not name.endswith(_WRITES):
                continue
            # Not the class: that would import vLLM's models, and those may touch the GPU before vLLM forks.
            ModelRegistry.register_model(PREFIX + name, f"{_MODELS}:{PREFIX}{name}")
        add_reader()
    except (ImportError, AttributeError, TypeError) as error:
        _LOGGER.error("this vLLM does not load patched checkpoints: %s (%s)", untested() or "its plug-in failed", error)


def untested(version: str | None = None) -> str | None:
    """One line where a version of vLLM, the installed one, is not one that was tested."""
    if version is None:
        import vllm

        version = vllm.__version__
    if ".".join(version.split(".")[:2]) in TESTED:
        return None
    tested = ", ".join(f"{one}.x" for one in TESTED)
    return f"linearpatch-kernels was tested with vLLM {tested}, not {version}"


def warn_if_untested() -> None:
    """Say the line of `untested`, where there is one, once in this process."""
    if line := untested():
        _warn(f"{line}: compare what a patched model writes there and in Transformers")


@functools.cache
def _warn(line: str) -> None:
    _LOGGER.warning(line)


@contextlib.contextmanager
def without_warnings(logger: str) -> Iterator[None]:
    """Let a logger pass errors alone."""
    named = logging.getLogger(logger)
    level = named.level
    named.setLevel(logging.ERROR)
    try:
        yield
    finally:
        named.setLevel(level)
