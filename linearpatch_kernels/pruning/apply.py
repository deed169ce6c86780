"""A plan put into practice: the shallower model."""

from __future__ import annotations

from transformers import PreTrainedModel

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.families import hidden_size, num_layers
from linearpatch_kernels.modeling.patched import carried_patches, patched_model, patches
from linearpatch_kernels.nn import PatchChain
from linearpatch_kernels.pruning.plan import PrunePlan
from linearpatch_kernels.span import Span
from linearpatch_kernels.torch_state import own_state


@own_state()
def apply_plan(model: PreTrainedModel, plan: PrunePlan) -> PreTrainedModel:
    """The shallower model: the plan's spans removed, its patches at the joints.

    ``model`` is not changed; the result shares its parameters. Layers are renumbered, per-layer config lists and the
    key/value cache follow. Without any patch (the fit ``none``) the result is of the stock class and saves as a stock
    checkpoint.

    Raises:
        InputError: a plan for another depth or width.
    """
    if num_layers(model) != plan.num_layers:
        raise InputError(f"the plan is for a model of {plan.num_layers} layers and this one has {num_layers(model)}")
    for joint in plan.joints:
        if joint.patch is not None and joint.patch.dim != hidden_size(model):
            raise InputError(f"the plan's patches have width {joint.patch.dim} and the model {hidden_size(model)}")
    cut = keep_layers(model, plan.kept_layers)
    maps = joint_maps(model, plan)
    new = {at: maps[joint.span] for at, joint in plan.joint_positions().items() if joint.span in maps}
    # Where there were patches before, the config remembers this cut too, a plain one.
    return patched_model(cut, new, provenance=plan.provenance) if new or patches(cut) else cut


def joint_maps(model: PreTrainedModel, plan: PrunePlan) -> dict[Span, PatchChain]:
    """The patches of every joint that has some: its own, or at a plain removal what healed an earlier cut in that span.

    They were fitted on what came before all the patches that they replace, so they stand alone.
    """
    carried = carried_patches(model, plan.kept_layers)
    maps = {
        joint.span: carried.get(at) if joint.patch is None else joint.patch
        for at, joint in plan.joint_positions().items()
    }
    return {span: chain for span, chain in maps.items() if chain is not None}
