"""Transformers models with patched joints.

``import linearpatch_kernels.modeling`` makes the Auto classes know them: `AutoModelForCausalLM.from_pretrained` then
loads a patched checkpoint. It costs the import of Transformers, which importing the package root does not.
"""

from __future__ import annotations

from typing import Any

from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.families import (
    STOCK_FAMILIES,
    Family,
    LayerModules,
    decoder_layers,
    family_of,
    model_types,
)
from linearpatch_kernels.modeling.loading import load_model
from linearpatch_kernels.modeling.patched import carried_patches, patched_model, patches, twin_of
from linearpatch_kernels.modeling.saving import check_output, save_checkpoint
from linearpatch_kernels.modeling.views import partial_decoder

__all__ = [
    "FAMILIES",
    "Family",
    "LayerModules",
    "add_family",
    "carried_patches",
    "check_output",
    "decoder_layers",
    "family_of",
    "keep_layers",
    "load_model",
    "partial_decoder",
    "patched_model",
    "patches",
    "save_checkpoint",
]


def add_family(family: Family) -> None:
    """Make a family known: its models can be loaded, cut, merged and patched, and its patched checkpoints load.

    Raises:
        InputError: a family of its model type is there.
    """
    STOCK_FAMILIES.add(family)
    twin_of(family)


def __getattr__(name: str) -> Any:
    # Not a constant: families can be added.
    if name == "FAMILIES":
        return model_types()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
