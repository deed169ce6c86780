"""A plan beside a checkpoint says again what the checkpoint's config and weights say: here the two are compared.

Copied or edited by hand, the files of a directory may come from different outputs; then one of them is wrong, and
whoever goes on from the wrong one makes a model that is described as another.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearpatch_kernels.files import refuse_mixture
from linearpatch_kernels.modeling.config_forms import written_sizes
from linearpatch_kernels.modeling.families import decoder_layers
from linearpatch_kernels.modeling.patched import listed, patches
from linearpatch_kernels.pruning.plan import PrunePlan

# In which a checkpoint may have been written.
_STORED = (torch.float32, torch.bfloat16, torch.float16)
# Of every matrix of a layer.
_SAMPLED_VALUES = 32


def check_plan(plan: PrunePlan, config: Mapping[str, Any], directory: Path) -> None:
    """InputError where ``plan.json`` and the content of ``config.json`` in a directory tell of different cuts.

    Compared are the number of layers, the patch at every joint of the plan, and where the config remembers the cut, the
    cut. (Other joints of the config may be those of an earlier cut.)
    """
    layers, kept = written_sizes(config)[0], len(plan.kept_layers)
    if layers != kept:
        refuse_mixture(directory, f"plan.json leaves {kept} layers and config.json has {layers}")
    told = config.get("linearpatch") or {}
    there = told.get("joints", {})
    for at, joint in plan.joint_positions().items():
        if joint.patch is None:
            continue
        ours = joint.patch.description()
        # The plan's own patches lead up to those of earlier cuts.
        theirs = listed(there.get(str(at), []))[: len(ours)]
        # A version may tell more of a patch than an earlier one.
        pairs = zip(ours, theirs, strict=False)
        if len(theirs) < len(ours) or any(one.get(name) != told[name] for one, told in pairs for name in told):
            refuse_mixture(
                directory, f"plan.json has the patches {ours} at layer {at} and config.json {theirs or 'none'}"
            )
    # The last cut is the plan's.
    record = next(reversed(told.get("provenance", [])), None)
    if record is not None and any(record.get(name) != value for name, value in plan.provenance.items()):
        refuse_mixture(directory, f"plan.json tells of the cut {plan.provenance} and config.json of {record}")


def check_patches(plan: PrunePlan, model: nn.Module, directory: Path) -> None:
    """InputError where ``plan.safetensors`` and the weights of ``model``, loaded from the same directory, differ.

    They are equal once rounded as the weights are.
    """
    there = patches(model)
    for at, joint in plan.joint_positions().items():
        if joint.patch is None:
            continue
        state = there[at].state_dict() if at in there else {}
        for name, ours in joint.patch.state_dict().items():
            if name not in state or not _is_rounded(state[name].cpu(), ours):
                refuse_mixture(directory, f"plan.safetensors and the weights have other patches at layer {at} ({name})")


def _is_rounded(weight: Tensor, exact: Tensor) -> bool:
    """Whether a weight, as it was loaded, is the exact one in some dtype that it may have been written in."""
    return any(torch.equal(exact.to(stored).to(weight.dtype), weight) for stored in (weight.dtype, *_STORED))


def check_kept_layers(plan: PrunePlan, student: PreTrainedModel, dense: PreTrainedModel, directory: Path) -> None:
    """InputError where a layer of ``student`` is, to the bit, another one of ``dense`` than the plan says.

    Layers that were trained since are none of the dense model's. (A few values of every matrix are looked at.)
    """
    ours = [_sampled(layer) for layer in decoder_layers(student)]
    theirs = [_sampled(layer, student.dtype) for layer in decoder_layers(dense)]
    for index, (sample, kept) in enumerate(zip(ours, plan.kept_layers, strict=True)):
        same = [number for number, other in enumerate(theirs) if _agree(sample, other)]
        if same and kept not in same:
            refuse_mixture(directory, f"its layer {index} is layer {same[0]} of the teacher, and plan.json says {kept}")


def _sampled(layer: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    matrices = {name: one.detach() for name, one in layer.named_parameters() if one.dim() == 2}
    found = {}
    for name, matrix in matrices.items():
        if matrix.device.type != "meta":
            flat = matrix.flatten()[:: max(1, matrix.numel() // _SAMPLED_VALUES)]
            found[name] = flat.to("cpu", dtype or matrix.dtype)
    return found


def _agree(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    names = one.keys() & other.keys()
    return bool(names) and all(torch.equal(one[name], other[name]) for name in names)
