"""Transformers models with patched joints.

``import linearpatch_kernels.modeling`` makes the Auto classes know them: `AutoModelForCausalLM.from_pretrained` then
loads a patched checkpoint. It costs the import of Transformers, which importing the package root does not.
"""

from linearpatch_kernels.modeling.families import FAMILIES, decoder_layers, family_of, keep_layers, partial_decoder
from linearpatch_kernels.modeling.loading import load_model
from linearpatch_kernels.modeling.patched import carried_patches, patched_model, patches
from linearpatch_kernels.modeling.saving import check_output, save_checkpoint

__all__ = [
    "FAMILIES",
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
