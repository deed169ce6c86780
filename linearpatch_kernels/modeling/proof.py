"""Whether a cut model is what it should be: a few tokens tell.

A cut is right where it computes what the dense model does with the removed layers passed by, and where what it keeps
for generation (keys and values, the states of recurrent layers) is that of its own layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import said
from linearpatch_kernels.modeling.families import family_of
from linearpatch_kernels.modeling.stream import difference, rounding, some_tokens, traced
from linearpatch_kernels.modeling.views import bypassing
from linearpatch_kernels.torch_state import eval_mode, own_state

_TOKENS = 24
_GENERATED = 8
_CACHED_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


@own_state()
@torch.no_grad()
def check_cut(
    model: PreTrainedModel, cut: PreTrainedModel, built: PreTrainedModel, kept: Sequence[int], *, exact: bool
) -> None:
    """Hold a cut against the model that it was made from, on 24 tokens.

    The logits must be the same but for `stream.rounding`: bit for bit in float32 on the CPU. Cached and plain logits of
    8 generated tokens may differ by a thousandth in float32, a tenth in bfloat16; or by twice what they differ by in
    the dense model.

    Args:
        cut: the layers ``kept`` of ``model``; built: the same as its config file alone describes it, as it loads from
            a checkpoint.
        exact: whether all modules of ``model`` are of the classes that are built.

    Raises:
        InputError: it is not what it should be; says what differs.
    """
    told = f"models of type {family_of(model).model_type!r} cannot be cut like this"
    ids = some_tokens(model, _TOKENS)
    built.eval()
    with eval_mode(model, cut):
        calls = dict(enumerate(traced(model, ids)))
        try:
            wanted = bypassing(model, {i: call.form for i, call in calls.items() if i not in kept})(
                ids, use_cache=False
            )
        except Exception as error:
            # Layers that later ones go back to are missed in as many ways as there are.
            raise InputError(f"{told}: the layers that stay need one that goes ({said(error)})") from error
        for one, what in ((built, "the model of the shorter config"), (cut, "the cut model")):
            found = _run(one, ids, f"{told}: {what} does not run")
            differs = difference(found, wanted.logits)
            # Classes that compute the same otherwise, such as fused norms, round otherwise.
            if differs > (rounding(found) if exact or one is cut else 8 * torch.finfo(found.dtype).eps):
                raise InputError(
                    f"{told}: {what} computes something else than the dense one with these layers passed by (a "
                    f"relative difference of {differs:.1e} in the logits)"
                )
        _check_cache(model, cut, ids, told)


def _run(model: PreTrainedModel, ids: Tensor, told: str) -> Tensor:
    try:
        logits: Tensor = model(ids, use_cache=False).logits
    except Exception as error:
        raise InputError(f"{told} ({said(error)})") from error
    return logits


def _check_cache(model: PreTrainedModel, cut: PreTrainedModel, ids: Tensor, told: str) -> None:
    if not cut.can_generate():
        return
    try:
        error = _cache_error(cut, ids)
    except Exception as failure:
        raise InputError(f"{told}: it does not generate with a cache ({said(failure)})") from failure
    if error > _CACHED_TOLERANCE[cut.dtype] and error > 2 * _cache_error(model, ids):
        raise InputError(
            f"{told}: with a cache it generates something else than without (a relative difference of {error:.1e} in "
            "the logits)"
        )


def _cache_error(model: PreTrainedModel, ids: Tensor) -> float:
    """The relative difference between cached and plain logits of a few generated tokens."""
    generate: Any = model.generate
    # By name, as the model's own settings take the place of what a whole GenerationConfig leaves out.
    found = generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=_GENERATED,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    cached = torch.stack(found.logits, dim=1)
    plain = model(found.sequences[:, :-1], use_cache=False).logits[:, -_GENERATED:]
    return difference(cached, plain)
