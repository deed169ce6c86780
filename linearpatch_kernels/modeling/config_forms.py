"""A checkpoint's config that Transformers 4 and 5, and the engines that follow either, read as the same model.

Transformers 5 renamed what a config says of positions and of the dtype:

===========================================================  ==========================================
Transformers 5                                               before
===========================================================  ==========================================
``dtype``                                                    ``torch_dtype``
``rope_parameters["rope_theta"]``                            ``rope_theta``
``rope_parameters["partial_rotary_factor"]``                 ``partial_rotary_factor``
``rope_parameters`` without these, where it scales           ``rope_scaling``, else null
``rope_parameters["full_attention"]`` (Gemma 3)              ``rope_theta`` and ``rope_scaling``
``rope_parameters["sliding_attention"]["rope_theta"]``       ``rope_local_base_freq``
===========================================================  ==========================================

Who reads the other form finds nothing under its own names and takes defaults, without a word. So both are written.
(Transformers 5 believes ``rope_scaling`` before ``rope_parameters`` where it is not null: with ``rope_theta`` it says
all that they say.)
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linearpatch_kernels.errors import InputError

_OLD_ROPE = ("rope_theta", "rope_scaling", "rope_local_base_freq")
# What classes call the number of layers and their width.
_SIZES = (("num_hidden_layers", "num_layers", "n_layer", "n_layers"), ("hidden_size", "d_model", "n_embd"))
_KINDS = ("full_attention", "sliding_attention")
_PHI3 = ("phi3", "linearpatch_phi3")
_PHI3_SCALING = ("type", "short_factor", "long_factor")


def both_forms(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a config with what Transformers 5 renamed under the old names, too.

    A rotary embedding that the old form cannot describe (one that is scaled in the sliding layers of Gemma 3) gets a
    ``rope_theta`` of None there, at which an older reader stops instead of computing another model.

    Args:
        entries: JSON values by the names of Transformers 5, as ``config.to_dict()`` gives them.
    """
    both = dict(entries)
    if isinstance(both.get("text_config"), Mapping):
        both["text_config"] = both_forms(both["text_config"])
    if both.get("dtype") is not None:
        both["torch_dtype"] = both["dtype"]
    rope = both.get("rope_parameters")
    if not isinstance(rope, Mapping) or not rope:
        return both
    if not any(isinstance(part, Mapping) for part in rope.values()):
        if _is_longrope(rope) and both.get("model_type") in _PHI3:
            # Phi-3 reads no other name of the type before Transformers 5.
            both["rope_parameters"] = rope = {**rope, "type": "longrope"}
        return both | _old_rope(rope, both)
    full, local = (part if isinstance(part := rope.get(kind), Mapping) else {} for kind in _KINDS)
    old = {**_old_rope(full, {}), "rope_local_base_freq": local.get("rope_theta")}
    if local.get("rope_type", "default") != "default":
        old["rope_theta"] = None
    return both | old


def written_sizes(entries: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """How many decoder layers a config file says the model has, and how wide they are; None where it says nothing."""
    named = [[of_decoder(entries).get(name) for name in names] for names in _SIZES]
    depth, width = (next((size for size in sizes if type(size) is int), None) for sizes in named)
    return depth, width


def of_decoder(entries: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config file says of the decoder: all that it says, but for a model that reads more than text."""
    text = entries.get("text_config")
    return text if isinstance(text, Mapping) else entries


def both_tokenizer_forms(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a tokenizer_config.json with the names of before Transformers 5, which 5 reads, too.

    It stops at the class that 5 writes for a tokenizer without one of its own, and at a list of special tokens.
    """
    old = dict(entries)
    if old.get("tokenizer_class") == "TokenizersBackend":
        old["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(old.get("extra_special_tokens"), list):
        old["additional_special_tokens"] = old.pop("extra_special_tokens")
    return old


def write_both_forms(directory: Path) -> None:
    """Rewrite the config and the tokenizer's, where they are there, for either Transformers; all else in them stays."""
    for name, forms in (("config.json", both_forms), ("tokenizer_config.json", both_tokenizer_forms)):
        path = directory / name
        # A tokenizer's may have been carried over from somewhere else: what is no JSON object stays as it is.
        with contextlib.suppress(FileNotFoundError, ValueError):
            entries = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(entries, dict):
                path.write_text(json.dumps(forms(entries), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def one_form(entries: Mapping[str, Any], *, new: bool) -> dict[str, Any]:
    """The entries of a config in both forms in one: by the names of Transformers 5, or by those of before.

    Raises:
        InputError: the forms say different things of the positions, or the old one cannot say what the new one does.
    """
    if isinstance(entries.get("text_config"), Mapping):
        entries = {**entries, "text_config": one_form(entries["text_config"], new=new)}
    if not entries.get("rope_parameters"):
        return dict(entries)
    both = both_forms(entries)
    for name in _OLD_ROPE:
        if name in entries and entries[name] != both.get(name):
            raise InputError(
                f"the config's {name} and its rope_parameters say different things: restore config.json, or change both"
            )
    if not new and both["rope_theta"] is None:
        raise InputError("transformers < 5 cannot compute this model's rope_parameters: pip install -U transformers")
    if new:
        return {name: value for name, value in entries.items() if name not in _OLD_ROPE}
    return {name: value for name, value in both.items() if name != "rope_parameters"}


def _is_longrope(rope: Mapping[str, Any]) -> bool:
    return rope.get("rope_type", rope.get("type")) == "longrope"


def _old_rope(rope: Mapping[str, Any], entries: Mapping[str, Any]) -> dict[str, Any]:
    """What Transformers 4 calls the parameters of one kind of layer, in a config with these ``entries``."""
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    old: dict[str, Any] = {"rope_theta": rope.get("rope_theta"), "rope_scaling": scaling if scaled else None}
    rotated = rope.get("partial_rotary_factor", 1.0)
    if rotated != 1.0 or "partial_rotary_factor" in entries:
        old["partial_rotary_factor"] = rotated
    if _is_longrope(rope):
        trained = rope.get("original_max_position_embeddings")
        old["original_max_position_embeddings"] = trained
        if entries.get("model_type") in _PHI3:
            if scaling.keys() <= {*_PHI3_SCALING, "rope_type", "original_max_position_embeddings"}:
                old["rope_scaling"] = {name: scaling.get(name) for name in _PHI3_SCALING}
        elif trained and rope.get("factor") not in (None, _ratio(entries.get("max_position_embeddings"), trained)):
            # Before Transformers 5 the factor of such a model is the ratio of its two lengths, whatever it says.
            old |= {"rope_theta": None, "rope_scaling": dict(rope)}
    return old


def _ratio(length: Any, trained: Any) -> float | None:
    return length / trained if isinstance(length, int) and isinstance(trained, int) else None
